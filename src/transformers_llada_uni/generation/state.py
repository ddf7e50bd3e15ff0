"""What a step of denoising reads and writes of the block it works on."""

import copy
from typing import Self

import torch

from .canvas import Canvas
from .sampling import Generators


class BlockState:
    """
    The block under work, in tensors that stay where they are: a step changes them in place, so that a recorded step
    finds them again.

    Args:
        num_branches (`int`): Branches of guidance.
        num_rows (`int`): Rows of the batch.
        block_length (`int`): Tokens in a block.
        num_steps (`int`): Steps a block may take.
        device (`torch.device`): Where the tensors are.
        is_sampled (`bool`): Whether steps draw tokens.
        has_credits (`bool`): Whether predictions earn credit.
        has_guidance_weights (`bool`): Whether guidance changes from step to step.

    Attributes:
        tokens: `(branches, rows, block)`.
        masked: `(rows, block)`, true where a token is still to be found.
        is_new: `(rows, block)`, false in the prompt, where branches have words of their own.
        confidence: `(rows, block)`, the probability a token was committed with.
        predicted: `(rows, block)`, true where the next step needs a prediction.
        num_left: `()`, the most of them that a row has; 0 ends the block.
        generated: `(rows, block)`, what was masked at the start of the block, for token editing and re-masking; the
            prompt stays.
        is_active: `(rows,)`, rows with masks, and rows whose last step has changed something, for token editing.
        num_post_steps: `(rows,)`, steps after a row's last mask, for token editing; of re-masking those that check.
        checked: `(rows, block)`, true where the next step checks a token that is masked for it, for re-masking.
        before: `(rows, block)`, the tokens before the round of checks, for re-masking.
        step: `()`, counts the steps.
        uniforms: `(steps, rows, block)`, a number from 0 to 1 for every draw there may be: a step draws no random
            number itself, and a row's numbers do not depend on the other rows. `None` where nothing is drawn.
        credited, credits: `(steps, rows, block)`, the most probable token of each step, as an index into the logits,
            and what it earned, 0 in steps to come; for credit decoding. `None` without.
        guidance_weights: `(steps, rows)`, from 0 to 1. `None` where guidance stays the same.
    """

    def __init__(
        self,
        num_branches: int,
        num_rows: int,
        block_length: int,
        num_steps: int,
        device: torch.device,
        is_sampled: bool,
        has_credits: bool = False,
        has_guidance_weights: bool = False,
    ):
        shape = (num_rows, block_length)
        self.tokens = torch.zeros(num_branches, *shape, dtype=torch.long, device=device)
        self.masked = torch.zeros(shape, dtype=torch.bool, device=device)
        self.is_new = torch.zeros(shape, dtype=torch.bool, device=device)
        self.confidence = torch.zeros(shape, dtype=torch.float32, device=device)
        self.predicted = torch.zeros(shape, dtype=torch.bool, device=device)
        self.num_left = torch.zeros((), dtype=torch.long, device=device)
        self.generated = torch.zeros(shape, dtype=torch.bool, device=device)
        self.is_active = torch.zeros(num_rows, dtype=torch.bool, device=device)
        self.num_post_steps = torch.zeros(num_rows, dtype=torch.long, device=device)
        self.checked = torch.zeros(shape, dtype=torch.bool, device=device)
        self.before = torch.zeros(shape, dtype=torch.long, device=device)
        self.step = torch.zeros((), dtype=torch.long, device=device)
        self.uniforms = None
        if is_sampled:
            self.uniforms = torch.zeros(num_steps, *shape, dtype=torch.float32, device=device)
        self.credited = self.credits = None
        if has_credits:
            self.credited = torch.zeros(num_steps, *shape, dtype=torch.long, device=device)
            self.credits = torch.zeros(num_steps, *shape, dtype=torch.float32, device=device)
        self.guidance_weights = None
        if has_guidance_weights:
            self.guidance_weights = torch.zeros(num_steps, num_rows, dtype=torch.float32, device=device)

    def select_rows(self, rows: torch.Tensor) -> Self:
        """A state of these rows (shape `(rows,)`), in the midst of the same block."""
        state = copy.copy(self)
        for name in ("masked", "is_new", "confidence", "predicted", "generated", "checked", "before"):
            setattr(state, name, getattr(self, name)[rows])
        state.is_active, state.num_post_steps = self.is_active[rows], self.num_post_steps[rows]
        state.tokens = self.tokens[:, rows]
        for name in ("uniforms", "credited", "credits", "guidance_weights"):
            values = getattr(self, name)
            setattr(state, name, None if values is None else values[:, rows])
        return state

    def write(self, where: torch.Tensor, tokens: torch.Tensor) -> None:
        """
        All branches take the same tokens; what their prompts say instead is their own.

        Args:
            where: `(rows, block)`, true where a token is written.
            tokens: `(rows, block)`.
        """
        self.tokens[0].copy_(torch.where(where, tokens, self.tokens[0]))
        if len(self.tokens) > 1:
            self.tokens[1:].copy_(torch.where(where & self.is_new, tokens, self.tokens[1:]))

    def load(self, canvas: Canvas, rows: torch.Tensor, start: int) -> None:
        """Takes the block that begins at column `start`, of these rows, from the canvas."""
        stop = start + self.masked.shape[-1]
        self.tokens.copy_(canvas.ids[:, rows, start:stop])
        self.masked.copy_(canvas.masked[rows, start:stop])
        self.is_new.copy_(torch.arange(start, stop, device=rows.device) >= canvas.prompt_end[rows, None])
        self.confidence.copy_(canvas.confidence[rows, start:stop])
        self.predicted.copy_(self.masked)
        self.step.zero_()
        if self.credits is not None:
            self.credits.zero_()

    def store(self, canvas: Canvas, rows: torch.Tensor, start: int) -> None:
        """Puts the block back."""
        stop = start + self.masked.shape[-1]
        canvas.ids[:, rows, start:stop] = self.tokens
        canvas.masked[rows, start:stop] = self.masked
        canvas.confidence[rows, start:stop] = self.confidence

    def draw(self, generator: Generators, rows: list[int], num_masked: list[int], num_rows: int) -> None:
        """
        Draws the block's uniforms.

        Args:
            generator: One for the batch, or one per row of the canvas.
            rows: Which row of the canvas each row of the state is.
            num_masked: Masks of each row of the state in this block. With a generator of its own a row draws nothing
                where it has none, as alone.
            num_rows: Of the canvas. One generator draws for all of them, also for those that have ended.
        """
        if self.uniforms is None:
            return
        num_steps, _, block_length = self.uniforms.shape
        if not isinstance(generator, list):
            device = self.uniforms.device if generator is None else generator.device  # a CPU generator serves any
            shape = num_steps, num_rows, block_length
            drawn = torch.rand(shape, generator=generator, dtype=torch.float32, device=device)
            self.uniforms.copy_(drawn[:, rows])
            return
        for index, row in ((index, row) for index, row in enumerate(rows) if num_masked[index]):
            device = generator[row].device
            drawn = torch.rand(num_steps, block_length, generator=generator[row], dtype=torch.float32, device=device)
            self.uniforms[:, index] = drawn.to(self.uniforms.device)
