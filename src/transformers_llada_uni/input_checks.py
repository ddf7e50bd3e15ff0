"""Checks of arguments: each refuses a bad value by the argument's name, before any work is done."""

import math
from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask


def check_integer(name: str, value: Any, minimum: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"`{name}` must be an integer, got {value!r}.")
    if value < minimum:
        raise ValueError(f"`{name}` must be at least {minimum}, got {value}.")
    return value


def check_number(
    name: str, value: Any, minimum: float, maximum: float = math.inf, exclude_minimum: bool = False
) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"`{name}` must be a number, got {value!r}.")
    if not math.isfinite(value):
        raise ValueError(f"`{name}` must be a finite number, got {value}.")
    if not minimum <= value <= maximum or (exclude_minimum and value == minimum):
        wanted = f"above {minimum:g}" if exclude_minimum else f"at least {minimum:g}"
        raise ValueError(
            f"`{name}` must be {wanted}{'' if math.isinf(maximum) else f' and at most {maximum:g}'}, got {value}."
        )
    return value


def check_flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"`{name}` must be True or False, got {value!r}.")
    return value


def check_choice(name: str, value: Any, choices: Collection[Any]) -> None:
    # A list cannot be looked up in a dict; 2.0 and True equal an integer, and are none.
    if isinstance(value, bool) or not any(isinstance(value, type(known)) and value == known for known in choices):
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, choices))}, got {value!r}.")


def check_texts(name: str, value: Any) -> None:
    """A string or a list of strings, none of them empty."""
    texts = value if isinstance(value, list | tuple) else [value]
    if not all(isinstance(text, str) for text in texts):
        raise TypeError(f"`{name}` must be a string or a list of strings, got {value!r}.")
    if not texts or not all(texts):
        raise ValueError(f"`{name}` must hold strings that are not empty, got {value!r}.")


def check_generator(generator: Any, count: int, items: str = "rows") -> None:
    """`None`, one generator for all, or a list with one for each of `count` items."""
    for item in generator if isinstance(generator, list) else [] if generator is None else [generator]:
        if not isinstance(item, torch.Generator):
            hint = f"; for a seed write torch.Generator().manual_seed({item})" if isinstance(item, int) else ""
            raise TypeError(
                f"`generator` must be a torch.Generator or a list of them, got {type(item).__name__}{hint}."
            )
    if isinstance(generator, list) and len(generator) != count:
        raise ValueError(f"`generator` has {len(generator)} generators for {count} {items}; give one for each.")


def check_token_id(name: str, value: Any, vocab_size: float = math.inf) -> None:
    """A token's id, or a list of them; `None` where there is none."""
    for token_id in value if isinstance(value, list) else [] if value is None else [value]:
        if isinstance(token_id, bool) or not isinstance(token_id, int):
            raise TypeError(f"`{name}` must be a token's id, an integer, got {value!r}.")
        if not 0 <= token_id < vocab_size:
            limit = "" if math.isinf(vocab_size) else f" below the vocabulary's size of {vocab_size}"
            raise ValueError(f"`{name}` must be an id of at least 0{limit}, got {value!r}.")


def check_tensor(name: str, value: Any, dtypes: Iterable[torch.dtype] | None = None, ndim: int | None = None) -> None:
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"`{name}` must be a torch.Tensor, got {type(value).__name__}.")
    if (dtypes is not None and value.dtype not in dtypes) or (ndim is not None and value.ndim != ndim):
        wanted = "" if dtypes is None else f" of {' or '.join(map(str, dtypes))}"
        dims = "" if ndim is None else f" with {ndim} dimension{'s' * (ndim > 1)}"
        raise ValueError(f"`{name}` must be a tensor{wanted}{dims}, got {value.dtype} of shape {tuple(value.shape)}.")


def refuse_settings(method: str, settings: dict[str, Any], instead: dict[str, str]) -> None:
    """Refuses settings that a method would have to ignore; `instead` says what it goes by."""
    for name in settings:
        if name in instead:
            raise TypeError(f"`{method}` goes by `{instead[name]}`: it takes no `{name}`.")


def check_ids(name: str, ids: Any) -> None:
    """Token ids `(batch, length)`."""
    check_tensor(name, ids, (torch.long, torch.int), ndim=2)
    if ids.shape[0] == 0:
        raise ValueError(f"`{name}` must have the shape (batch, length), but its batch is empty.")


def check_shape(name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"`{name}` must have the shape {shape}, got {tuple(tensor.shape)}.")


def check_forward_inputs(
    input_ids: Any,
    inputs_embeds: Any,
    attention_mask: Any,
    position_ids: Any,
    block_length: Any,
    hidden_size: int,
    past_length: int,
    positions_to_keep: Any = None,
) -> None:
    """What the backbone's `forward` can tell of its arguments without reading the values of a tensor."""
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("Give exactly one of `input_ids` and `inputs_embeds`.")
    check_integer("block_length", block_length, minimum=1)
    if inputs_embeds is None:
        check_ids("input_ids", input_ids)
        batch_size, length = input_ids.shape
    else:
        check_tensor("inputs_embeds", inputs_embeds, ndim=3)
        batch_size, length = inputs_embeds.shape[:2]
        check_shape("inputs_embeds", inputs_embeds, (batch_size, length, hidden_size))
    if attention_mask is not None and not isinstance(attention_mask, BlockMask):
        check_tensor("attention_mask", attention_mask)
        if attention_mask.ndim == 2:
            check_shape("attention_mask", attention_mask, (batch_size, past_length + length))
        elif attention_mask.ndim != 4:
            raise ValueError(f"`attention_mask` must have 2 or 4 dimensions, got shape {tuple(attention_mask.shape)}.")
    if position_ids is not None:
        check_tensor("position_ids", position_ids, ndim=2)
        if position_ids.shape[1] != length or position_ids.shape[0] not in (1, batch_size):
            check_shape("position_ids", position_ids, (batch_size, length))
    if positions_to_keep is not None:
        check_tensor("positions_to_keep", positions_to_keep, (torch.long,), ndim=2)
        check_shape("positions_to_keep", positions_to_keep, (batch_size, positions_to_keep.shape[1]))


def check_labels(labels: Any, inputs: torch.Tensor | None, logits_to_keep: int | torch.Tensor) -> None:
    """Labels belong to the positions that logits are computed for: all, unless `logits_to_keep` says otherwise."""
    if labels is not None:
        check_tensor("labels", labels, (torch.long,), ndim=2)
        if isinstance(logits_to_keep, int) and logits_to_keep == 0 and inputs is not None:
            check_shape("labels", labels, tuple(inputs.shape[:2]))


def split_rows(
    name: str, input_ids: Any, attention_mask: Any, vocab_size: int, pad_token_id: int | None = None
) -> list[torch.Tensor]:
    """
    Rows without the padding on their left, each `(length,)`. Without a mask, of several rows the tokens `pad_token_id`
    that they begin with are padding.
    """
    check_ids(name, input_ids)
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
        if len(input_ids) > 1 and pad_token_id is not None:
            attention_mask = (input_ids != pad_token_id).cumsum(dim=-1).clamp(max=1)
    mask_name = f"attention_mask` of `{name}"
    check_tensor(mask_name, attention_mask)
    check_shape(mask_name, attention_mask, tuple(input_ids.shape))
    visible = attention_mask.to(torch.bool)
    if bool((attention_mask != visible.to(attention_mask)).any()):
        raise ValueError(f"`{mask_name}` must hold 0 (padding) and 1 only.")
    if bool((visible[:, :-1] & ~visible[:, 1:]).any()):
        raise ValueError(
            f"`{name}` must be padded on the left, but its `attention_mask` hides tokens after visible ones. Set "
            "`padding_side='left'` in the tokenizer."
        )
    lengths = visible.sum(dim=-1).tolist()
    if min(lengths) == 0:
        raise ValueError(f"Row {lengths.index(0)} of `{name}` is empty.")
    if int(input_ids.min()) < 0 or int(input_ids.max()) >= vocab_size:
        raise ValueError(f"`{name}` holds ids outside of the vocabulary of {vocab_size} tokens.")
    return [row[len(row) - length :] for row, length in zip(input_ids, lengths, strict=True)]


def check_length(name: str, prompts: list[torch.Tensor], num_new_tokens: int, limit: int) -> None:
    longest = max(len(prompt) for prompt in prompts)
    if longest + num_new_tokens > limit:
        raise ValueError(
            f"A prompt of {longest} tokens and {num_new_tokens} new ones (`{name}`) exceed "
            f"`max_position_embeddings` ({limit}); at most {max(limit - longest, 0)} new tokens fit."
        )


def check_streamer(streamer: Any, num_rows: int) -> None:
    if streamer is None:
        return
    if not all(callable(getattr(streamer, method, None)) for method in ("put", "end")):
        raise TypeError(f"`streamer` must have the methods `put` and `end`, got {type(streamer).__name__}.")
    if num_rows > 1:
        raise ValueError(f"`streamer` takes one row at a time, but `input_ids` has {num_rows}.")


def check_grid(grid: Any) -> int:
    """Returns the number of codes."""
    is_pair = isinstance(grid, (tuple, list)) and len(grid) == 2
    if not is_pair or not all(isinstance(side, int) and not isinstance(side, bool) and side > 0 for side in grid):
        raise ValueError(f"`grid` must be two positive integers (height, width in codes), got {grid!r}.")
    return grid[0] * grid[1]


def check_known_codes(
    image_codes: Any, image_codes_mask: Any, shape: tuple[int, int], codebook_size: int
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Codes and the mask of those to generate anew, `shape` = (batch, H * W); `None` where none are known."""
    if (image_codes is None) != (image_codes_mask is None):
        raise ValueError("`image_codes` and `image_codes_mask` go together: give both or neither.")
    if image_codes is None:
        return None
    check_tensor("image_codes", image_codes, (torch.long, torch.int))
    check_tensor("image_codes_mask", image_codes_mask, (torch.bool,))
    check_shape("image_codes", image_codes, shape)
    check_shape("image_codes_mask", image_codes_mask, shape)
    if int(image_codes.min()) < 0 or int(image_codes.max()) >= codebook_size:
        raise ValueError(f"`image_codes` must lie between 0 and {codebook_size - 1}.")
    return image_codes, image_codes_mask


def check_images(pixel_values: Any, image_grid_thw: Any, patch_width: int) -> list[int]:
    """Returns the number of patches of each image."""
    check_tensor("pixel_values", pixel_values, ndim=2)
    if not pixel_values.is_floating_point():
        raise ValueError(f"`pixel_values` must hold floating-point numbers, got {pixel_values.dtype}.")
    if image_grid_thw is None:
        raise ValueError("`pixel_values` need `image_grid_thw`, the (images, 3) sizes in patches, got None.")
    check_tensor("image_grid_thw", image_grid_thw, (torch.long, torch.int))
    if image_grid_thw.ndim != 2 or image_grid_thw.shape[-1] != 3 or image_grid_thw.shape[0] == 0:
        raise ValueError(f"`image_grid_thw` must have shape (images, 3), got {tuple(image_grid_thw.shape)}.")
    if bool((image_grid_thw < 1).any()) or bool((image_grid_thw[:, 0] != 1).any()):
        raise ValueError(
            f"`image_grid_thw` must hold rows of 1, height and width, at least one patch each, got "
            f"{image_grid_thw.tolist()}."
        )
    lengths = image_grid_thw.prod(dim=-1).tolist()
    if sum(lengths) != pixel_values.shape[0]:
        raise ValueError(
            f"`pixel_values` holds {pixel_values.shape[0]} patches, but `image_grid_thw` speaks of {sum(lengths)}."
        )
    check_shape("pixel_values", pixel_values, (sum(lengths), patch_width))
    if not bool(pixel_values.isfinite().all()):
        raise ValueError("`pixel_values` must be finite, but hold NaN or infinity.")
    return lengths
