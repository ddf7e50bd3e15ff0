"""Which tokens a training step hides, and what each hidden token weighs in the loss."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Trainer, TrainerCallback

from ...input_checks import check_choice, check_integer, check_number, check_shape, check_tensor
from ...seeding import seeded_generator
from .masking import positions_of


NOISE_LEVELS = ("block", "sample")
WEIGHTINGS = ("inverse", "none")
IMAGE_NOISES = ("linear", "cosine")


def settle_noise_inputs(
    labels: torch.Tensor,
    document_ids: torch.Tensor | None,
    block_length: int,
    generator: torch.Generator | list[torch.Generator],
) -> tuple[torch.Tensor, list[torch.Generator]]:
    """
    What every noise begins with, see [`BlockDiffusionNoise.sample`].

    Returns:
        The documents' numbers `(batch, length)`, and a generator for each row.

    Raises:
        ValueError, TypeError: for inputs that do not fit together.
    """
    check_tensor("labels", labels, (torch.int64,), ndim=2)
    check_integer("block_length", block_length, 1)
    if document_ids is None:
        document_ids = torch.zeros_like(labels)
    check_shape("document_ids", document_ids, tuple(labels.shape))
    generators = generator if isinstance(generator, list) else [generator] * len(labels)
    if len(generators) != len(labels):
        raise ValueError(f"`generator` must hold one generator per row, {len(labels)}, got {len(generators)}.")
    return document_ids, generators


@dataclass(frozen=True)
class BlockDiffusionNoise:
    r"""
    The noising process of masked diffusion with its linear schedule: at level t a token is masked with probability t,
    independently of the others.

    With `weighting="inverse"` the sum over masked tokens of `-log p / t` is an unbiased estimate of a bound on the
    negative log-likelihood (MDLM, arXiv 2406.07524, eq. 11; per block given the blocks before it: BD3-LM,
    arXiv 2503.09573, eq. 8). The bound holds for `noise_range=(0, 1)`; the default leaves out the first thousandth,
    whose rare tokens would weigh more than 1000.

    Args:
        noise_range (`tuple[float, float]`, defaults to `(1e-3, 1.0)`): t is uniform between the two.
        noise_level (`str`, defaults to `"block"`): `"block"` draws a t for every block, `"sample"` one for a document.
        weighting (`str`, defaults to `"inverse"`): `"inverse"` weighs a masked token 1/t; `"none"` weighs all masked
            tokens alike, scaled so that a token's expected weight is 1 as well.
        complementary (`bool`, defaults to `False`): Adds to every noisy copy another that masks exactly the tokens
            which the first leaves visible; its level is 1 - t. Each token is then learnt from once per pair
            (LLaDA2.0, arXiv 2512.15745).
        num_noise_samples (`int`, defaults to 1): Independent noisy copies (pairs if complementary). Their levels are
            stratified: copy s of S has t in a different S-th of the range, which lowers the variance.
        image_noise (`str`, defaults to `"linear"`): With `"cosine"` image codes have cos(pi r / 2), r uniform, in the
            place of a uniform number (MaskGIT, arXiv 2202.04200; LLaDA-Image): more of an image is masked.
        image_token_offset (`int`, *optional*): The first image code among the ids, for `image_noise="cosine"`.

    Raises:
        ValueError: for a range that is not `0 <= low < high <= 1`, an unknown name, or fewer than one sample.
    """

    noise_range: tuple[float, float] = (1e-3, 1.0)
    noise_level: str = "block"
    weighting: str = "inverse"
    complementary: bool = False
    num_noise_samples: int = 1
    image_noise: str = "linear"
    image_token_offset: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.noise_range, (tuple, list)) or len(self.noise_range) != 2:
            raise ValueError(f"`noise_range` must be two numbers (low, high), got {self.noise_range!r}.")
        for bound in self.noise_range:
            check_number("noise_range", bound, 0.0, 1.0)
        if self.noise_range[0] >= self.noise_range[1]:
            raise ValueError(f"`noise_range` must rise from low to high, got {self.noise_range!r}.")
        check_choice("noise_level", self.noise_level, NOISE_LEVELS)
        check_choice("weighting", self.weighting, WEIGHTINGS)
        check_choice("image_noise", self.image_noise, IMAGE_NOISES)
        check_integer("num_noise_samples", self.num_noise_samples, 1)

    def masked_share(self, labels: torch.Tensor) -> torch.Tensor:
        """How probable it is that a copy masks a token; of the shape of `labels`."""
        share = self._mean_level(labels)
        return torch.full_like(share, 0.5) if self.complementary else share

    def _mean_level(self, labels: torch.Tensor) -> torch.Tensor:
        low, high = self.noise_range
        cosine = 2 / math.pi if self.image_noise == "cosine" else 0.5
        return torch.where(self._is_image(labels), low + (high - low) * cosine, (low + high) / 2)

    def _is_image(self, labels: torch.Tensor) -> torch.Tensor:
        offset = self.image_token_offset
        return torch.zeros_like(labels, dtype=torch.bool) if offset is None else labels >= offset

    def sample(
        self,
        labels: torch.Tensor,
        document_ids: torch.Tensor | None,
        block_length: int,
        generator: torch.Generator | list[torch.Generator],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Draws the noise of one batch.

        Args:
            labels: `(batch, length)`, -100 where no loss is taken: those tokens (prompts) are never masked.
            document_ids: `(batch, length)`, the number of each token's document in its row, -1 for padding; `None`
                for one document a row.
            block_length: Tokens of a block, counted from each document's begin.
            generator: One for all rows or one per row. They draw on their own device; the result lies where `labels`
                lie. With one per row, a row's noise depends neither on its companions nor on its padding.

        Returns:
            `masked` and `weights`, both `(batch, copies, length)`. `weights` is 0 where `masked` is false, and divided
            by the number of copies: summed over the copies, its expectation is 1 for every token with a label.
        """
        document_ids, generators = settle_noise_inputs(labels, document_ids, block_length, generator)
        length = labels.shape[1]
        num_samples, device = self.num_noise_samples, labels.device

        # 1. One uniform number per block or document, and from it num_samples stratified levels
        # A token's numbers stand together, so that a longer row begins with the numbers of a shorter one.
        rows = [torch.rand(length, 1 + num_samples, generator=one, device=one.device) for one in generators]
        numbers = torch.stack(rows).to(device).transpose(1, 2)  # [b, 1 + s, l]
        positions = positions_of(document_ids)
        unit_length = block_length if self.noise_level == "block" else length
        begins = (
            torch.arange(length, device=device) - positions % unit_length
        )  # [b, l], where each token's block or document begins
        uniform = numbers[:, :1].gather(2, begins[:, None])  # [b, 1, l]: the number at the unit's first token
        strata = torch.arange(num_samples, device=device)[:, None]
        low, high = self.noise_range
        share = (uniform + strata) / num_samples  # [b, s, l]
        if self.image_noise == "cosine":
            share = torch.where(self._is_image(labels)[:, None], (share * math.pi / 2).cos(), share)
        levels = low + (high - low) * share

        # 2. The masks
        target = (labels != -100)[:, None]  # [b, 1, l]
        masked = (numbers[:, 1:] < levels) & target
        if self.weighting == "inverse":
            weights = masked / levels.clamp(min=torch.finfo(levels.dtype).tiny)
        else:
            weights = masked / self._mean_level(labels)[:, None]
        if not self.complementary:
            return masked, weights / num_samples

        # 3. Their complements
        complement = ~masked & target
        if self.weighting == "inverse":
            complement_weights = complement / (1 - levels).clamp(min=torch.finfo(levels.dtype).eps)
            weights = torch.cat([weights, complement_weights], dim=1) / 2
        else:
            weights = torch.cat([masked, complement], dim=1).to(levels.dtype)  # every token once per pair
        return torch.cat([masked, complement], dim=1), weights / num_samples


class NoiseStream(TrainerCallback):
    """
    Seeds the noise of every row that a trainer sees by the run's seed, the optimiser step, and the row's number in
    that step, counted over all processes and accumulated batches. So a resumed run draws what the uninterrupted run
    draws, and the split of a step's rows over processes and batches changes nothing. Evaluation draws the same noise
    every time: its losses can be compared.
    """

    def __init__(self) -> None:
        self.num_rows = {"train": 0, "eval": 0}

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.num_rows["train"] = 0

    def on_evaluate(self, *args: Any, **kwargs: Any) -> None:
        self.num_rows["eval"] = 0

    on_predict = on_evaluate

    def generators(self, trainer: Trainer, num_rows: int) -> list[torch.Generator]:
        assert trainer.model is not None
        is_training = trainer.model.training
        mode, step = ("train", trainer.state.global_step) if is_training else ("eval", 0)
        # Tensor-parallel processes work on one batch together and need the same noise.
        tp_size = trainer.get_tp_size()
        process, num_processes = trainer.args.process_index // tp_size, trainer.args.world_size // tp_size
        first = self.num_rows[mode] * num_processes + process * num_rows
        self.num_rows[mode] += num_rows
        return [
            seeded_generator(trainer.args.seed, int(not is_training), step, row)
            for row in range(first, first + num_rows)
        ]


def step_generators(trainer: Trainer, num_rows: int) -> list[torch.Generator]:
    """A generator, on the CPU, for each of the next `num_rows` rows of `trainer`; see [`NoiseStream`]."""
    callbacks = trainer.callback_handler.callbacks
    stream = next((callback for callback in callbacks if isinstance(callback, NoiseStream)), None)
    if stream is None:
        stream = NoiseStream()
        trainer.add_callback(stream)
    return stream.generators(trainer, num_rows)


def step_generator(trainer: Trainer) -> torch.Generator:
    """One generator, on the CPU, for a draw of `trainer` that does not belong to a row."""
    return step_generators(trainer, 1)[0]
