"""Self-speculation: blocks that diffusion has drafted are verified as if they had been written token by token."""

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from .cache import BlockDiffusionCache
from .canvas import Canvas
from .runners import EagerRunner, are_enough_to_leave_out
from .sampling import Generators, predict_tokens
from .state import BlockState
from .step import DenoisingStep, Mask


class SelfSpeculationRunner(EagerRunner):
    r"""
    Text as blocks of one token would give it, in fewer passes (after S2D2, arXiv 2603.25702: a block-diffusion model
    becomes an autoregressive one when its blocks have one token, and so can verify its own drafts). Of every block:

    1. Draft it by block diffusion, with the settings' `block_length`, steps and `threshold`.
    2. Predict all its tokens in one pass, each by a mask of its own that sees the tokens before it: columns of the
       block are forwarded under a causal mask, and one mask for each of them and for the token behind the block.
    3. Keep the draft up to the first token that is predicted otherwise, and the predicted one in its place. What was
       predicted behind it is the next draft, until nothing is left: each pass finds a token at least.

    The prefix is kept as for blocks of one token: each of its tokens sees those before it. Drafts see the same prefix,
    and the tokens of their own block in both directions.

    Args:
        canvas, generator, state, step, backbone: As [`EagerRunner`]'s.
        cache ([`BlockDiffusionCache`]): With [`num_spare_columns`] columns more than the canvas.
        mask_token_id (`int`): What stands where a token is to be found.
        end_ids (`list[int]`): Tokens that end a row: of what is behind them nothing is verified.

    Raises:
        ValueError: where the attention implementation takes no mask of its own for each query.
    """

    cache: BlockDiffusionCache

    def __init__(
        self,
        canvas: Canvas,
        generator: Generators,
        state: BlockState,
        step: DenoisingStep,
        backbone: PreTrainedModel,
        cache: BlockDiffusionCache,
        mask_token_id: int,
        end_ids: list[int],
    ) -> None:
        super().__init__(canvas, generator, state, step, backbone, cache)
        self.mask_token_id = mask_token_id
        self.end_ids = torch.tensor(end_ids, dtype=torch.long, device=canvas.ids.device)
        if self._is_flash:
            implementation = f"`attn_implementation={backbone.config._attn_implementation!r}`"
            raise ValueError(f"`self_speculation` needs masks that {implementation} does not take; use 'sdpa'.")

    def fill(self, start: int, num_masked: list[int]) -> None:
        to_find = self.canvas.masked[self.row_index, start : start + self.block_length]
        # The block before it may have found its first token, or its only one.
        num_masked = to_find.sum(dim=-1).tolist()
        if not any(num_masked):
            return
        super().fill(start, num_masked)
        with self.rows_put_back():
            while any(is_left := to_find.any(dim=-1).tolist()):
                if are_enough_to_leave_out(is_left):
                    self._keep([index for index, one in enumerate(is_left) if one], start + self.block_length)
                    to_find = to_find[to_find.any(dim=-1)]
                to_find = self._verify(start, to_find)

    def _verify(self, start: int, to_find: torch.Tensor) -> torch.Tensor:
        """
        Keeps of the draft in the canvas what is right.

        Args:
            start: First column of the block.
            to_find: `(rows, block)`, true where the canvas has but a draft.

        Returns:
            `(rows, block)`, where it still has.
        """
        canvas, rows, stop = self.canvas, self.row_index, start + self.block_length
        columns = torch.arange(start, stop, device=rows.device)
        draft, ends = canvas.ids[0, rows, start:stop], canvas.end[rows, None]
        to_find = to_find & (columns < ends)
        is_behind = torch.zeros_like(to_find[:, :1])  # the token behind the block comes for nothing
        if stop < canvas.num_columns:
            is_behind = canvas.masked[rows, stop : stop + 1] & (stop < ends)
        tokens, probabilities = self._predict(start, draft, torch.cat([to_find, is_behind], dim=-1))
        canvas.confidence[rows, start:stop] = torch.where(
            to_find, probabilities[:, :-1].to(canvas.confidence.dtype), canvas.confidence[rows, start:stop]
        )
        is_right = ~to_find | (tokens[:, :-1] == draft)
        is_led = is_right.to(torch.int8).cumprod(dim=-1).bool()
        num_led = is_led.sum(dim=-1, keepdim=True)
        is_next = columns - start == num_led
        draft = torch.where(to_find, tokens[:, :-1], draft)
        is_found = is_led | is_next
        is_end = torch.isin(draft, self.end_ids) & is_found & (columns >= canvas.prompt_end[rows, None])
        to_find = to_find & ~is_found & ~is_end.any(dim=-1, keepdim=True)
        canvas.ids[0, rows, start:stop] = draft
        if stop < canvas.num_columns:
            is_free = is_behind[:, 0] & is_led.all(dim=-1)
            canvas.ids[0, rows, stop] = torch.where(is_free, tokens[:, -1], canvas.ids[0, rows, stop])
            canvas.masked[rows, stop] &= ~is_free
        return to_find

    def _predict(self, start: int, draft: torch.Tensor, is_wanted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        What blocks of one token would predict behind the draft's tokens before each.

        Args:
            start: First column of the block; all before it is in the cache.
            draft: `(rows, block)`.
            is_wanted: `(rows, block + 1)`, which tokens to predict.

        Returns:
            Tokens and their probabilities, `(rows, block + 1)`; of no meaning where none was wanted.
        """
        padding = self.canvas.padding[0, self.row_index]
        # Those that are wanted come first; rows that want fewer than another are filled up with others.
        num_wanted = int(is_wanted.sum(dim=-1).max())
        columns = (~is_wanted).to(torch.int8).argsort(dim=-1, stable=True)[:, :num_wanted]
        masks = torch.full_like(columns, self.mask_token_id)
        of_block = torch.arange(self.block_length, device=draft.device).expand_as(draft)
        positions = start + torch.cat([of_block, columns], dim=-1) - padding[:, None]
        self.num_forward_passes += 1
        outputs = self.backbone(
            input_ids=torch.cat([draft, masks], dim=-1),
            attention_mask=self._mask_of(self._sees(start, padding, of_block, columns)),
            position_ids=positions.clamp(min=0),
            past_key_values=self.cache,
            use_cache=False,
            block_length=self.block_length,
            positions_to_keep=self.block_length + torch.arange(num_wanted, device=draft.device).expand_as(columns),
        )
        hidden_states = outputs.last_hidden_state.to(draft.device)  # as in `DenoisingStep.forward`
        logits = self.step.head(hidden_states.flatten(0, 1)[None])
        tokens, probabilities, _ = predict_tokens(logits)
        found = torch.zeros_like(is_wanted, dtype=tokens.dtype).scatter(1, columns, tokens.view_as(columns))
        nothing = torch.zeros(is_wanted.shape, dtype=probabilities.dtype, device=draft.device)
        return found, nothing.scatter(1, columns, probabilities.view_as(columns))

    def _sees(self, start: int, padding: torch.Tensor, of_block: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        """`(rows, queries, keys)`: tokens of the block see those before them and themselves, masks those before them
        and themselves, which are masks."""
        queries = torch.cat([of_block, columns], dim=-1)[:, :, None]
        is_mask = torch.arange(queries.shape[1], device=queries.device) >= self.block_length
        is_before = of_block[:, None] < queries + (~is_mask)[:, None]
        prefix = torch.ones_like(queries, dtype=torch.bool).expand(-1, -1, start)
        sees = torch.cat([prefix, is_before], dim=-1)
        sees = sees & (torch.arange(start + self.block_length, device=queries.device) >= padding[:, None, None])
        itself = torch.eye(queries.shape[1], dtype=torch.bool, device=queries.device)
        # Padding too sees itself: a query that sees nothing gives NaN in some implementations.
        sees = F.pad(sees, (0, columns.shape[1]))
        sees[..., start:] |= itself
        return sees

    def _attention_mask(self, first: int, stop: int) -> Mask | None:
        start = stop - self.block_length
        if first == start and not self._is_padded:
            return None
        if self._mask_columns != (first, stop):
            queries = torch.arange(first, stop, device=self.row_index.device)[:, None]
            keys = torch.arange(stop, device=self.row_index.device)
            # What enters the prefix sees what is before it, the block all of itself.
            sees = self._visible(stop)[:, None] & ((keys <= queries) | (queries >= start))
            self._mask, self._mask_columns = self._mask_of(sees | (keys == queries)), (first, stop)
        return self._mask

    def _mask_of(self, sees: torch.Tensor) -> Mask:
        """What attention takes for `(rows, queries, keys)`, true where a query sees a key."""
        config = self.backbone.config
        num_rows, num_queries, num_keys = sees.shape
        return ALL_MASK_ATTENTION_FUNCTIONS[config._attn_implementation](
            batch_size=num_rows,
            q_length=num_queries,
            kv_length=num_keys,
            q_offset=0,
            kv_offset=0,
            mask_function=lambda row, head, query, key: sees[row, query, key],
            allow_is_causal_skip=False,
            dtype=self.backbone.dtype,
            device=sees.device,
            config=config,
        )

    def _keep(self, indices: list[int], num_columns: int) -> None:
        super()._keep(indices, num_columns + num_spare_columns(self.block_length))


def num_spare_columns(block_length: int) -> int:
    """Columns of the cache behind the canvas: for the masks that verify the last block."""
    return block_length + 1
