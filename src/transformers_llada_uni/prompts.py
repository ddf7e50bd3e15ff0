"""The prompts LLaDA2.0-Uni was trained on, as text. Spaces matter: one stands on either side of the system's words."""

import math
from collections.abc import Callable
from typing import Any, NoReturn


SYSTEM_PROMPTS = {
    "understanding": "You are a multimodal understanding assistant.",
    "text_to_image": "You are a text-to-image generation assistant.",
    "thinking": "You are a text-to-image generation assistant with a thinking process.",
    "editing": "You are an image editing assistant.",
    "interleaved": "You are a interleaved generation assistant.",
}
TASKS = tuple(SYSTEM_PROMPTS)

# Stands for "no text" in the negative prompts of guidance. Ordinary text to the tokenizer, not a special token.
UNCONDITION = "<uncondition>"

ANSWER = "<role>ASSISTANT</role>"


def build_prompt(task: str, text: str, images: str = "") -> str:
    """
    One turn of a task, up to where the model's answer starts.

    Args:
        task (`str`): One of `TASKS`.
        text (`str`): The user's words, or `UNCONDITION`.
        images (`str`, defaults to `""`): What stands for the images; they come before the words.
    """
    return f"<role>SYSTEM</role> {SYSTEM_PROMPTS[task]} <role>HUMAN</role>{images}{text}{ANSWER}"


# Several turns, with images. For one user turn it gives `build_prompt("understanding", ...)`.
CHAT_TEMPLATE = (
    """{%- macro text_of(content) -%}
    {%- if content is string -%}
        {{- content -}}
    {%- else -%}
        {%- for part in content -%}
            {%- if part.type == 'text' -%}
                {{- part.text -}}
            {%- elif part.type != 'image' -%}
                {{- raise_exception("Content must be of type 'text' or 'image', got '" ~ part.type ~ "'.") -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- if tools -%}
    {{- raise_exception('Tools can only be used in a chat without images.') -}}
{%- endif -%}
{%- if messages and messages[0].role == 'system' -%}
    {%- set system = text_of(messages[0].content) -%}
    {%- set turns = messages[1:] -%}
{%- else -%}
    {%- set system = '"""
    + SYSTEM_PROMPTS["understanding"]
    + """' -%}
    {%- set turns = messages -%}
{%- endif -%}
{{- '<role>SYSTEM</role> ' ~ system ~ ' ' -}}
{%- for message in turns -%}
    {%- if message.role == 'user' -%}
        {{- '<role>HUMAN</role>' -}}
        {%- if message.content is not string -%}
            {%- for part in message.content if part.type == 'image' -%}
                {{- '<|image|>' -}}
            {%- endfor -%}
        {%- endif -%}
        {{- text_of(message.content) -}}
    {%- elif message.role == 'assistant' -%}
        {{- '<role>ASSISTANT</role>' -}}
        {%- generation -%}
        {%- if message.content is string -%}
            {{- message.content -}}
        {%- else -%}
            {%- for part in message.content -%}
                {{- '<|image|>' if part.type == 'image' else text_of([part]) -}}
            {%- endfor -%}
        {%- endif -%}
        {{- '<|role_end|>' -}}
        {%- endgeneration -%}
    {%- else -%}
        {{- raise_exception("Roles must be 'user' or 'assistant' after at most one 'system', got '" ~ message.role) -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<role>ASSISTANT</role>' -}}
{%- endif -%}
"""
)


def list_of_texts(text: str | list[str], name: str) -> list[str]:
    """
    `text` as a list; raises TypeError if it is neither a string nor a list of strings, ValueError if it is empty, or
    no text in Unicode.
    """
    texts = [text] if isinstance(text, str) else text
    if not isinstance(texts, list | tuple) or not all(isinstance(entry, str) for entry in texts):
        raise TypeError(f"`{name}` must be a string or a list of strings, got {text!r:.100}.")
    if not texts:
        raise ValueError(f"`{name}` is an empty list.")
    for entry in texts:
        try:
            entry.encode()
        except UnicodeEncodeError as error:
            lone = entry[error.start]
            raise ValueError(
                f"`{name}` holds half a character: {lone!r} at {error.start} is a lone surrogate."
            ) from None
    return list(texts)


def deal_out(images: Any, num_texts: int, counts: list[int] | None) -> list[list]:
    """
    Gives each text its images.

    Args:
        images: None, an image, a list (dealt out in order), or a list of lists with one list per text.
        num_texts (`int`): Number of texts.
        counts (`list[int]`, *optional*): How many images each text asks for. Without it a list is dealt out one by
            one, or goes to the only text.

    Raises:
        ValueError: if the images do not fit the texts.
    """
    images = [] if images is None else images if isinstance(images, list) else [images]
    if any(isinstance(entry, list) for entry in images):
        if not all(isinstance(entry, list) for entry in images) or any(
            isinstance(entry, list) for sample in images for entry in sample
        ):
            raise ValueError("`images` must be one list of images, or one list of lists with a list per text.")
        if len(images) != num_texts:
            raise ValueError(f"`images` has {len(images)} lists of images for {num_texts} texts.")
        samples = images
    elif num_texts == 1:
        samples = [images]
    elif not images:
        samples = [[] for _ in range(num_texts)]
    elif counts is None:
        if len(images) != num_texts:
            raise ValueError(
                f"`images` has {len(images)} images for {num_texts} texts; a list of lists says which are whose."
            )
        samples = [[image] for image in images]
    else:
        if len(images) != sum(counts):
            raise ValueError(f"`images`: {len(images)} were given for {sum(counts)} <|image|> in `text`.")
        remaining = iter(images)
        samples = [[next(remaining) for _ in range(count)] for count in counts]
    for sample, count in zip(samples, counts or [], strict=counts is not None):
        if len(sample) != count:
            raise ValueError(f"`images`: {len(sample)} were given for {count} <|image|> in a text.")
    return samples


def replacements(text: str, spans: list[tuple[int, int]], blocks: list[str]) -> list[dict[str, Any]]:
    """What to put where, with the places before and after, in the form transformers' processors report it."""
    found, shift = [], 0
    for (start, end), block in zip(spans, blocks, strict=True):
        new_span = (start + shift, start + shift + len(block))
        found.append(
            {
                "type": "image",
                "span": (start, end),
                "new_span": new_span,
                "text": text[start:end],
                "replacement": block,
            }
        )
        shift += len(block) - (end - start)
    return found


def replace(text: str, found: list[dict[str, Any]]) -> str:
    """`text` with the [`replacements`] made."""
    pieces, last = [], 0
    for entry in found:
        pieces += [text[last : entry["span"][0]], entry["replacement"]]
        last = entry["span"][1]
    return "".join([*pieces, text[last:]])


def has_image(message: dict[str, Any]) -> bool:
    """Whether a message of a chat holds an image."""
    content = message.get("content")
    return isinstance(content, list | tuple) and any(part.get("type") == "image" for part in content)


def text_of_message(message: dict[str, Any]) -> str:
    """All text of a message."""
    content = message["content"]
    return content if isinstance(content, str) else "".join(part["text"] for part in content if part["type"] == "text")


def flat_text(message: dict[str, Any]) -> dict[str, Any]:
    """A message whose content, if a list of texts, is one string, as templates of text-only chats expect."""
    content = message.get("content")
    if not isinstance(content, list | tuple) or any(part.get("type") != "text" for part in content):
        return message
    return {**message, "content": text_of_message(message)}


def codes_of_side(name: str, side: int, unit: int, largest: int) -> int:
    """
    The codes along a side of an image to generate.

    Args:
        name (`str`): `"height"` or `"width"`, for the message.
        side (`int`): Its length in pixels.
        unit (`int`): Pixels per code.
        largest (`int`): The largest number that a header can name.

    Raises:
        TypeError, ValueError: if `side` is no such length; with the nearest that is.
    """
    if not isinstance(side, int) or isinstance(side, bool):
        raise TypeError(f"`{name}` must be a whole number of pixels, got {side!r}.")
    if side < 1 or side % unit:
        nearest = min(max(1, round(side / unit)), largest) * unit
        raise ValueError(f"`{name}` must be a positive multiple of {unit}, got {side}; the nearest is {nearest}.")
    if side > largest * unit:
        raise ValueError(
            f"`{name}` may be at most {largest * unit}, got {side}: the tokenizer has no "
            f"<|reserved_token_{side // unit}|> for the header."
        )
    return side // unit


def refuse_grid(
    height: int, width: int, grid_of: Callable[[int, int], tuple[int, int]], largest: int, step: int
) -> NoReturn:
    """
    Raises the error for an image whose grid no header can name, with the size of a crop that one can.

    Args:
        height (`int`): Of the image in pixels.
        width (`int`): Of the image in pixels.
        grid_of: The grid (H, W) of an image of that height and width.
        largest (`int`): The largest number that a header can name.
        step (`int`): Sides are cropped to multiples of this.
    """
    grid = fitting = grid_of(height, width)
    sides = [height, width]
    while max(fitting) > largest:
        longer = sides.index(max(sides))
        shrunk = min(sides[longer] - 1, sides[longer] * largest // max(fitting))
        sides[longer] = max(step, shrunk // step * step)
        fitting = grid_of(*sides)
    raise ValueError(
        f"`images`: one of {width} x {height} pixels becomes a grid of {grid[0]} x {grid[1]} codes, but the "
        f"tokenizer has numbers up to {largest} only (no <|reserved_token_{max(grid)}|>); cropped to {sides[1]} x "
        f"{sides[0]} it fits."
    )


def refuse_length(length: int, limit: int, grid: tuple[int, int] | None, unit: int) -> NoReturn:
    """
    Raises the error for a sequence that overruns the model's positions.

    Args:
        length (`int`): Tokens of the prompt.
        limit (`int`): The model's positions.
        grid (`tuple[int, int]`, *optional*): Of the image to generate, in codes.
        unit (`int`): Pixels of the generated image per code.
    """
    room = limit - length
    if grid is None or room < 1:
        codes = math.prod(grid) if grid else 0
        raise ValueError(
            f"`text` and `images` make a prompt of {length} tokens, but the model has {limit} positions "
            f"(`max_position_embeddings`); shorten it to at most {limit - (codes if codes < limit else 1)} tokens."
        )
    scale = math.sqrt(room / math.prod(grid))
    rows = min(max(1, math.floor(grid[0] * scale)), room)
    columns = min(max(1, math.floor(grid[1] * scale)), room // rows)
    raise ValueError(
        f"`height` and `width`: a prompt of {length} tokens and {math.prod(grid)} image codes overrun the model's "
        f"{limit} positions (`max_position_embeddings`); height={rows * unit}, width={columns * unit} would fit."
    )


def cut_answer(row: list[int], answer: list[int], ends: set[int | None], image_start: int) -> list[int] | None:
    """
    A sequence without what the model wrote of an image's header: up to the last `image_start` of its answer, or else
    to the first of `ends` there. None if `answer`, with which the answer starts, is nowhere in it.
    """
    starts = [i for i in range(len(row)) if row[i : i + len(answer)] == answer]
    if not starts:
        return None
    start = starts[-1] + len(answer)
    end = next((i for i in range(start, len(row)) if row[i] in ends), len(row))
    begun = [i for i in range(start, end) if row[i] == image_start]
    return row[: begun[-1] if begun else end]


def left_pad(rows: list[list[int]], pad_token_id: int | None) -> tuple[list[list[int]], list[list[int]]]:
    """Rows of one length, and their attention mask; raises ValueError if padding is needed and there is no token."""
    length = max(map(len, rows))
    padding = [length - len(row) for row in rows]
    if pad_token_id is None:
        if any(padding):
            raise ValueError("`tokenizer` has no pad token, so rows of different lengths cannot be padded.")
        pad_token_id = 0  # never needed
    ids = [[pad_token_id] * count + row for count, row in zip(padding, rows, strict=True)]
    return ids, [[0] * count + [1] * (length - count) for count in padding]


def to_lists(ids: Any) -> list[list[int]]:
    """Ids in any form as a list of rows; one row on its own is a batch of one."""
    rows = ids.tolist() if hasattr(ids, "tolist") else [row.tolist() if hasattr(row, "tolist") else row for row in ids]
    return rows if not rows or isinstance(rows[0], list | tuple) else [rows]


def split_images(
    row: list[int], grid_at: Callable[[list[int], int], tuple[int, int] | None], image_end: int
) -> list[tuple[tuple[int, int] | None, list[int]]]:
    """
    Splits a sequence at its images.

    Args:
        row (`list[int]`): Token ids.
        grid_at: Gives the grid (H, W) that the four tokens of a header at that position name, or None.
        image_end (`int`): The token after an image's codes.

    Returns:
        Pairs in order: None and the ids of a stretch of text, or the grid and what stands where its H*W codes should:
        fewer ids where the sequence, or by its end token the image, ends early.
    """
    pieces: list[tuple[tuple[int, int] | None, list[int]]] = []
    position = last = 0
    while position < len(row):
        grid = grid_at(row, position)
        if grid is None:
            position += 1
            continue
        codes = row[position + 4 : position + 4 + math.prod(grid)]
        codes = codes[: codes.index(image_end)] if image_end in codes else codes
        pieces += [(None, row[last:position]), (grid, codes)]
        position += 4 + len(codes)
        position += position < len(row) and row[position] == image_end
        last = position
    return [*pieces, (None, row[last:])]
