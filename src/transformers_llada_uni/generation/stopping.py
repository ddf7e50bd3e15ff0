"""Where rows end: after an end token, where a criterion of transformers stops them, or when time is up."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import (
    MaxTimeCriteria,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
    StopStringCriteria,
)

from .canvas import Canvas
from .configuration import BlockDiffusionGenerationConfig


class RowEnds:
    r"""
    Looks at finished blocks, and moves the `end` of the rows that end in them to where they do.

    Criteria are asked as if tokens came one by one: of each row, after each of its new tokens, with the ids
    `(1, length)` of the prompt as it was given (padded on the left) and of the answer up to that token, and with
    `None` for scores. The row ends with the first token for which one of them says so. A limit of time does not cut
    what it has already cost: it is asked after each block, which all rows keep.

    Args:
        end_ids: Tokens that end a row, `(n,)`.
        input_ids: The prompts as they were given, `(rows, length)`.
        criteria: What stops rows besides.
    """

    def __init__(self, end_ids: torch.Tensor, input_ids: torch.Tensor, criteria: StoppingCriteriaList) -> None:
        self.end_ids, self.input_ids = end_ids, input_ids
        self.timers = [criterion for criterion in criteria if isinstance(criterion, MaxTimeCriteria)]
        self.criteria = StoppingCriteriaList(one for one in criteria if not isinstance(one, MaxTimeCriteria))

    def __call__(self, canvas: Canvas, rows: torch.Tensor, block: range) -> torch.Tensor:
        """
        Args:
            canvas: The block in it is finished.
            rows: `(n,)`, the rows under work.
            block: Its columns.

        Returns:
            `(n,)`, true for the rows that end in it.
        """
        columns = torch.arange(block.start, block.stop, device=rows.device)
        is_new = (columns >= canvas.prompt_end[rows, None]) & (columns < canvas.end[rows, None])
        is_end = torch.isin(canvas.ids[0, rows, block.start : block.stop], self.end_ids) & is_new
        is_done = is_end.any(dim=-1)
        behind_end = block.start + is_end.to(torch.int8).argmax(dim=-1) + 1
        canvas.end[rows] = torch.where(is_done, behind_end, canvas.end[rows])
        for index, row in enumerate(rows.tolist() if self.criteria else []):
            stop = self._first_stop(canvas, row, block)
            if stop is not None:
                canvas.end[row], is_done[index] = stop, True
        if self.timers and block.stop > int(canvas.prompt_end.max()) and self._time_is_up(canvas):
            canvas.end.clamp_(max=block.stop)
            is_done[:] = True
        return is_done

    def _first_stop(self, canvas: Canvas, row: int, block: range) -> int | None:
        first, prompt_end, end = (int(at[row]) for at in (canvas.padding[0], canvas.prompt_end, canvas.end))
        padding = self.input_ids[row, : self.input_ids.shape[1] - (prompt_end - first)]
        ids = torch.cat([padding, canvas.ids[0, row, first : min(block.stop, end)]])[None]
        offset = first - len(padding)
        for stop in range(max(block.start, prompt_end) + 1, min(block.stop, end) + 1):
            if bool(self.criteria(ids[:, : stop - offset], None).any()):
                return stop
        return None

    def _time_is_up(self, canvas: Canvas) -> bool:
        return any(bool(timer(canvas.ids[0], None).any()) for timer in self.timers)


def make_criteria(
    config: BlockDiffusionGenerationConfig, criteria: Any, tokenizer: Any = None
) -> StoppingCriteriaList:
    """
    What stops a text by the settings, and what the caller has given besides. The time begins now.

    Args:
        criteria: A list of [`~transformers.StoppingCriteria`] or other callables. `None`: none.
        tokenizer: For `stop_strings`; may be a processor, which holds one.

    Raises:
        TypeError: for criteria that are no list of callables, or a tokenizer that is none.
        ValueError: for `stop_strings` without a tokenizer.
    """
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    if tokenizer is not None and not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise TypeError(f"`tokenizer` must be a tokenizer of transformers, got {type(tokenizer).__name__}.")
    if criteria is not None and not (isinstance(criteria, Sequence) and all(map(callable, criteria))):
        raise TypeError(f"`stopping_criteria` must be a list of StoppingCriteria, got {criteria!r:.100}.")
    stopping = StoppingCriteriaList(criteria or [])
    if config.max_time is not None:
        stopping.append(MaxTimeCriteria(config.max_time))
    if config.stop_strings is not None:
        if tokenizer is None:
            raise ValueError("`stop_strings` need `tokenizer`, the model's tokenizer or processor, got None.")
        stop_strings = [config.stop_strings] if isinstance(config.stop_strings, str) else list(config.stop_strings)
        stopping.append(StopStringCriteria(tokenizer, stop_strings))
    return stopping
