"""The canvas of block diffusion: prompts and the room to be filled, of all rows and branches of guidance."""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F


@dataclass
class Canvas:
    """
    Prompts and the room to be filled, laid out so that blocks of all rows and guidance branches fall together.

    A row is moved right by whole blocks until the block that holds its prompt's end is that of all other rows; so a
    block of the canvas is a block of the row, and a row in a batch equals the row alone. The other prompts of guidance
    are padded to the column where the conditional one ends. Padding is never seen, and positions start after it.

    Attributes:
        ids: `(branches, rows, columns)`.
        padding: `(branches, rows)`, columns of padding on the left.
        masked: `(rows, columns)`, true where a token is to be generated.
        prompt_end: `(rows,)`, first column after the prompt.
        end: `(rows,)`, first column after what is to be generated.
        confidence: `(rows, columns)`, the probability a token was committed with, 1 in prompts.
    """

    ids: torch.Tensor
    padding: torch.Tensor
    masked: torch.Tensor
    prompt_end: torch.Tensor
    end: torch.Tensor
    confidence: torch.Tensor

    @classmethod
    def lay_out(
        cls, branches: list[list[torch.Tensor]], num_new_tokens: int, block_length: int, mask_token_id: int
    ) -> "Canvas":
        """
        Args:
            branches: Per branch the unpadded prompts of all rows, each `(length,)`; the first is the conditional one,
                in which mask tokens are filled in too.
            num_new_tokens: Room after the prompt.
            block_length: Tokens in a block.
            mask_token_id: What the room is filled with.
        """
        device = branches[0][0].device
        prompt_end_blocks = 0
        for row in zip(*branches, strict=True):
            longest, tail = max(len(prompt) for prompt in row), len(row[0]) % block_length
            prompt_end_blocks = max(prompt_end_blocks, -(-(longest - tail) // block_length))
        prompt_ends = [prompt_end_blocks * block_length + len(prompt) % block_length for prompt in branches[0]]
        num_columns = -(-(max(prompt_ends) + num_new_tokens) // block_length) * block_length

        ids = torch.full((len(branches), len(prompt_ends), num_columns), mask_token_id, device=device)
        padding = torch.zeros(len(branches), len(prompt_ends), dtype=torch.long, device=device)
        for branch, prompts in enumerate(branches):
            for index, (prompt, end) in enumerate(zip(prompts, prompt_ends, strict=True)):
                padding[branch, index] = end - len(prompt)
                ids[branch, index, end - len(prompt) : end] = prompt
        columns = torch.arange(num_columns, device=device)
        masked = (ids[0] == mask_token_id) & (columns >= padding[0][:, None])
        prompt_end = torch.tensor(prompt_ends, device=device)
        return cls(
            ids, padding, masked, prompt_end, prompt_end + num_new_tokens, torch.ones_like(masked, dtype=torch.float32)
        )

    def select(self, rows: torch.Tensor, first: int, stop: int) -> "Canvas":
        """These rows (indices of shape `(rows,)`) and the columns from `first` to `stop`: a copy."""
        return Canvas(
            self.ids[:, rows, first:stop],
            self.padding[:, rows] - first,
            self.masked[rows, first:stop],
            self.prompt_end[rows] - first,
            self.end[rows] - first,
            self.confidence[rows, first:stop],
        )

    def moved_right(self, shift: int, num_columns: int, mask_token_id: int) -> "Canvas":
        """With so many columns of padding before it, and as many columns in all; what is added behind is room."""
        room = shift, num_columns - shift - self.num_columns
        return Canvas(
            F.pad(self.ids, room, value=mask_token_id),
            self.padding + shift,
            F.pad(F.pad(self.masked, (shift, 0)), (0, room[1]), value=True),
            self.prompt_end + shift,
            self.end + shift,
            F.pad(self.confidence, room, value=1.0),
        )

    def conditional(self) -> "Canvas":
        """The first branch alone: a view, so what is filled in there is filled in here."""
        return replace(self, ids=self.ids[:1], padding=self.padding[:1])

    def share_new_tokens(self) -> None:
        """Gives all branches what the first one has behind the prompt."""
        columns = torch.arange(self.num_columns, device=self.ids.device)
        self.ids.copy_(torch.where(columns >= self.prompt_end[:, None], self.ids[0], self.ids))

    @staticmethod
    def side_by_side(canvases: list["Canvas"]) -> "Canvas":
        """The rows of several canvases of one width in one."""
        branches = [torch.cat([getattr(one, name) for one in canvases], dim=1) for name in ("ids", "padding")]
        others = "masked", "prompt_end", "end", "confidence"
        ids, padding = branches
        return Canvas(ids, padding, *(torch.cat([getattr(one, name) for one in canvases]) for name in others))

    @property
    def num_columns(self) -> int:
        return self.ids.shape[-1]

    def num_masked(self, block_length: int) -> list[list[int]]:
        """How many masks each block of each row holds, `[rows][blocks]`: the one look at the canvas that is needed."""
        return self.masked.unflatten(-1, (-1, block_length)).sum(dim=-1).tolist()
