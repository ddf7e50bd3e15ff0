"""In which step each token was committed: what there is to know of a decoding but its result."""

from dataclasses import dataclass

import torch

from .canvas import Canvas
from .state import BlockState


@dataclass
class Trajectory:
    """
    How the rows of a batch were decoded. Of its block a step saw the tokens of earlier steps, and masks in all other
    places; of what is before the block it saw all, but with SPRINT.

    Attributes:
        ids: `(batch, length)`, each row from the first token of its prompt on, in whole blocks of the row: also what a
            block holds behind the end of its row, since other tokens of the block were predicted from it. Mask tokens
            where nothing was generated.
        steps: `(batch, length)`, the step of its block in which a token was committed, from 0 on; -1 for what was
            given or never generated. With token editing or re-masking the first time it was.
    """

    ids: torch.Tensor
    steps: torch.Tensor


class TrajectoryRecorder:
    """
    Sees the steps of a [`BlockDiffusionDecoder`] as its `on_step`. No value is read, so no device is waited for.

    Args:
        canvas: What is decoded.
    """

    def __init__(self, canvas: Canvas) -> None:
        self.canvas = canvas
        self.steps = torch.full_like(canvas.ids[0], -1)

    def __call__(self, block: BlockState, start: int, rows: torch.Tensor) -> None:
        columns = slice(start, start + block.masked.shape[-1])
        steps = self.steps[rows, columns]
        # The canvas still says what was masked before the block, and of ended rows that nothing is.
        is_committed = self.canvas.masked[rows, columns] & ~block.masked & (steps < 0)
        self.steps[rows, columns] = torch.where(is_committed, block.step - 1, steps)

    def trajectory(self, mask_token_id: int) -> Trajectory:
        """What was recorded, once the canvas is filled in."""
        padding = self.canvas.padding[0][:, None]
        columns = torch.arange(self.canvas.num_columns, device=padding.device)
        is_beyond = columns >= self.canvas.num_columns - padding
        source = (columns + padding).masked_fill(is_beyond, 0)
        return Trajectory(
            ids=self.canvas.ids[0].gather(1, source).masked_fill(is_beyond, mask_token_id),
            steps=self.steps.gather(1, source).masked_fill(is_beyond, -1),
        )
