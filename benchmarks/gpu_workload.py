"""What is decoded, by which method, and the least time that a step can take."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from gpu_machine import Machine
from gpu_model import UsedExperts, bytes_of_step, count_used_experts
from released_loop import released_loop

from transformers_llada_uni import LLaDA2MoeForBlockDiffusion
from transformers_llada_uni.kernels import fused_operations


PROMPT_LENGTH = 64
STEPS = 8  # of a block of codes
SCALES = {"guidance_scale": 2.0, "guidance_rescale": 0.7}
NUM_COUNTED = 64  # new tokens of the calls that count experts


@dataclass(frozen=True)
class Method:
    """Arguments of `generate`; implementation of the experts; fused small kernels; or the released loop."""

    settings: dict[str, Any] = field(default_factory=dict)
    experts: str | None = None  # what the model has by default
    is_fused: bool = True
    is_loop: bool = False

    @property
    def is_recorded(self) -> bool:
        is_exact = not self.is_loop and self.settings.get("use_cache", True)
        return is_exact and self.settings.get("use_cuda_graphs") is None


LOOP = Method(experts="grouped_mm", is_fused=False, is_loop=True)
DEFAULT = Method()
EAGER = Method({"use_cuda_graphs": False})
ALL_OFF = Method({"use_cuda_graphs": False}, experts="grouped_mm", is_fused=False)
PLAIN = Method({"use_cache": False}, experts="grouped_mm", is_fused=False)
METHODS = {
    "released loop": LOOP,
    "default": DEFAULT,
    "default, no CUDA graphs": EAGER,
    "default, grouped_mm experts": Method(experts="grouped_mm"),
    "default, small operations not fused": Method(is_fused=False),
    "all three off": ALL_OFF,
}


@contextmanager
def chosen(model: LLaDA2MoeForBlockDiffusion, method: Method) -> Iterator[None]:
    before = model.get_experts_implementation()
    model.set_experts_implementation(before if method.experts is None else method.experts)
    try:
        with fused_operations(method.is_fused):
            yield
    finally:
        model.set_experts_implementation(before)


@dataclass
class Decoded:
    """New tokens `(rows, new)`, and forwards of the backbone."""

    tokens: torch.LongTensor
    num_forwards: int


@dataclass(frozen=True)
class Task:
    """
    What is decoded.

    Args:
        num_new_tokens: A multiple of 32.
        num_rows: Rows of the batch.
        writes_codes: Image codes, or else text.
        is_guided: With a companion, for codes.
        num_steps: Of a block.
        threshold: 1 is never met, so that all steps are taken.
    """

    num_new_tokens: int
    num_rows: int = 1
    writes_codes: bool = True
    is_guided: bool = True
    num_steps: int = STEPS
    threshold: float = 1.0

    @property
    def num_branches(self) -> int:
        return 2 if self.writes_codes and self.is_guided else 1


class Workload:
    """Decodes [`Task`]s with a model. Prompts are random, of 64 tokens, the same for all methods."""

    def __init__(self, model: LLaDA2MoeForBlockDiffusion, machine: Machine):
        self.model, self.machine = model, machine
        self._used_experts: dict[tuple, UsedExperts] = {}

    def prompts(self, num_branches: int, num_rows: int) -> torch.LongTensor:
        """`(branches, rows, 64)`."""
        generator = torch.Generator().manual_seed(0)
        num_ids = min(6000, self.model.config.image_token_offset - 8)
        return torch.randint(num_ids, (num_branches, num_rows, PROMPT_LENGTH), generator=generator).to(
            self.model.device
        )

    def decode(self, task: Task, method: Method = DEFAULT) -> Decoded:
        model, config = self.model, self.model.config
        prompts = self.prompts(task.num_branches, task.num_rows)
        scales = SCALES if task.num_branches > 1 else {}
        settings = {"num_steps_per_block": task.num_steps, "threshold": task.threshold, **method.settings}
        settings["return_dict_in_generate"] = True
        with chosen(model, method):
            if method.is_loop:
                allowed = (config.image_token_offset, config.vocab_size) if task.writes_codes else None
                with torch.device(model.device):
                    tokens = released_loop(
                        model, prompts, task.num_new_tokens, task.num_steps, allowed=allowed, **scales
                    )
                if task.writes_codes:
                    tokens = tokens - config.image_token_offset
                return Decoded(tokens, task.num_new_tokens // config.block_length * task.num_steps)
            if not task.writes_codes:
                output = model.generate(prompts[0], max_new_tokens=task.num_new_tokens, eos_token_id=[], **settings)
                return Decoded(output.sequences[:, PROMPT_LENGTH:], output.num_forward_passes)
            companions = {"negative_input_ids": prompts[1]} if task.is_guided else {}
            grid = (task.num_new_tokens // 32, 32)
            output = model.generate_image_codes(prompts[0], grid, **companions, **scales, **settings)
            return Decoded(output.sequences, output.num_forward_passes)

    def used_experts(self, task: Task) -> UsedExperts:
        """Of a shorter call of the same kind, counted once."""
        kind = (task.num_rows, task.num_branches, task.writes_codes, task.num_steps)
        if kind not in self._used_experts:
            counted = Task(NUM_COUNTED, task.num_rows, task.writes_codes, task.is_guided, task.num_steps)
            most_tokens = 2 * self.model.config.block_length * task.num_rows * task.num_branches
            self._used_experts[kind] = count_used_experts(self.model, lambda: self.decode(counted, EAGER), most_tokens)
        return self._used_experts[kind]

    def bytes_of_step(self, task: Task) -> float:
        config = self.model.config
        num_columns = PROMPT_LENGTH + (task.num_new_tokens + config.block_length) / 2  # mean over the blocks
        num_predictable = config.vocab_size - (config.image_token_offset if task.writes_codes else 0)
        used, num_rows = self.used_experts(task).used, task.num_rows * task.num_branches
        return bytes_of_step(self.model, used, num_rows, num_columns, num_predictable)

    def floor(self, task: Task) -> float:
        """Milliseconds that a step takes at least: what it must read, over the bandwidth measured in this run."""
        return 1e3 * self.bytes_of_step(task) / self.machine.bandwidth

    def pace(self, task: Task, decoded: Decoded, seconds: float) -> dict[str, Any]:
        """Columns of a table."""
        step = 1e3 * seconds / decoded.num_forwards
        unit = "codes/s" if task.writes_codes else "tokens/s"
        floor = self.floor(task)
        return {
            "seconds": seconds,
            unit: decoded.tokens.numel() / seconds,
            "forwards": decoded.num_forwards,
            "ms a forward": step,
            "floor, ms": floor,
            "time / floor": step / floor,
        }
