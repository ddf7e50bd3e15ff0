"""Which kind of example a dataset holds, and what its rows must look like."""

from collections.abc import Collection, Iterable
from typing import Any, NoReturn

from datasets import Image
from trl.data_utils import get_dataset_column_names

from ...prompts import list_of_texts
from .dataset_loading import AnyDataset


# Columns that make a format, the most telling first.
FORMATS: dict[str, tuple[str, ...]] = {
    "preference": ("prompt", "chosen", "rejected"),
    "prompt_completion": ("prompt", "completion"),
    "messages": ("messages",),
    "editing": ("source_image", "instruction", "target_image"),
    "text_to_image": ("image", "caption"),
    "text": ("text",),
    "prompt": ("prompt",),
}
IMAGE_COLUMNS = ("image", "images", "source_image", "target_image")
CODES_COLUMN = "image_codes"
CODES_FORM = '{"grid": [H, W], "codes": [H * W numbers]}'
ROLES = ("system", "user", "assistant", "tool")


def format_of(columns: Iterable[str], argument: str = "dataset") -> str:
    """
    The format of a dataset, a key of `FORMATS`, by the names of its columns. Images may have been replaced by codes.

    Raises:
        ValueError: if the columns make no format; names the argument, and lists what would.
    """
    names = set(columns)
    is_encoded = CODES_COLUMN in names
    for name, needed in FORMATS.items():
        if all(column in names or (is_encoded and column in IMAGE_COLUMNS) for column in needed):
            return name
    known = "; ".join(" + ".join(needed) for needed in FORMATS.values())
    raise ValueError(f"`{argument}`: the columns {sorted(names)} make no example of training. Known are: {known}.")


def check_format(argument: str, dataset: AnyDataset, expected: Collection[str]) -> str:
    """
    The format of a dataset.

    Raises:
        ValueError: if it is none of those expected; names the argument.
    """
    columns = get_dataset_column_names(dataset)
    format_name = format_of(columns, argument)
    if format_name not in expected:
        raise ValueError(
            f"`{argument}` has the columns {sorted(columns)} of the format '{format_name}'; expected "
            f"{' or '.join(expected)}."
        )
    return format_name


def with_caption(dataset: AnyDataset) -> AnyDataset:
    """The dataset with its column `text` named `caption`, if an image stands beside it and nothing else."""
    columns = get_dataset_column_names(dataset)
    if format_of(columns) == "text" and ("image" in columns or CODES_COLUMN in columns):
        return dataset.rename_column("text", "caption")
    return dataset


def rows_of(batch: dict[str, list]) -> list[dict[str, Any]]:
    """The rows of a batch of columns."""
    return [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]


def image_codes_of(row: dict[str, Any]) -> Any:
    """The images of a row that are given as codes; of one image they may be columns, as `llada-uni encode` writes."""
    return row[CODES_COLUMN] if CODES_COLUMN in row else [{name: row.get(name) for name in ("grid", "codes")}]


def are_image_codes(image: Any) -> bool:
    """Whether it is an image as `CODES_FORM` says."""
    try:
        height, width = image["grid"]
        return min(height, width) > 0 and len(image["codes"]) == height * width
    except (TypeError, ValueError, KeyError, IndexError):
        return False


def refuse_row(index: int, message: str) -> NoReturn:
    raise ValueError(f"Row {index}: {message}")


def check_text(value: Any, index: int, field: str) -> str:
    """`value`, if it is a text with at least one word."""
    if not isinstance(value, str) or not value.strip():
        refuse_row(index, f"`{field}` must be a text that is not empty, got {value!r:.80}.")
    _check_characters(value, index, field)
    return value


def _check_characters(text: str, index: int, field: str) -> None:
    try:
        list_of_texts(text, field)
    except ValueError as error:
        refuse_row(index, str(error))


def is_chat(value: Any, index: int, field: str) -> bool:
    """Whether `value` is a list of messages; a text is none, and all else is refused."""
    if not isinstance(value, str | list):
        refuse_row(index, f"`{field}` must be a text or a list of messages, got {value!r:.80}.")
    return isinstance(value, list)


def check_messages(messages: Any, index: int, field: str, last_role: str | None = None) -> list[dict[str, Any]]:
    """`messages`, if it is a chat; with `last_role`, one that ends with this role."""
    if not isinstance(messages, list) or not messages:
        refuse_row(index, f"`{field}` must be a list of messages, got {messages!r:.80}.")
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or message.get("role") not in ROLES or "content" not in message:
            refuse_row(
                index,
                f"`{field}[{number}]` must be a dict with a `content` and a `role` among {', '.join(ROLES)}, got "
                f"{message!r:.80}.",
            )
        content, place = message["content"], f"{field}[{number}]['content']"
        if not isinstance(content, str) and not (isinstance(content, list) and all(map(_is_part, content))):
            refuse_row(
                index, f"`{place}` must be a text or a list of parts of type 'text' or 'image', got {content!r:.80}."
            )
        for text in [content] if isinstance(content, str) else [part.get("text") or "" for part in content]:
            _check_characters(text, index, place)
    if last_role is not None and messages[-1]["role"] != last_role:
        refuse_row(index, f"`{field}` must end with a message of role {last_role!r}, got {messages[-1]['role']!r}.")
    return messages


def _is_part(part: Any) -> bool:
    if not isinstance(part, dict):
        return False
    return part.get("type") == "image" or (part.get("type") == "text" and isinstance(part.get("text"), str))


def without_empty_fields(value: Any) -> Any:
    """
    Messages without the fields that `datasets` fills with None, because another row has them: a column's rows share
    one schema.
    """
    if isinstance(value, list):
        return [without_empty_fields(entry) for entry in value]
    if isinstance(value, dict):
        return {name: without_empty_fields(entry) for name, entry in value.items() if entry is not None}
    return value


def images_of(row: dict[str, Any], format_name: str, index: int) -> list[tuple[Any, str]]:
    """
    The images of a row in the order of their places, as they are stored, each with the size rule under which it is
    read: that of understanding for what a user shows, that of editing for what the model shall make.
    """
    if format_name in ("editing", "text_to_image"):
        names = ("source_image", "target_image") if format_name == "editing" else ("image",)
        for name in names:
            if _is_missing(row.get(name)):
                refuse_row(index, f"`{name}` is missing.")
        return [(row[name], "editing") for name in names]
    given = row.get("images") if row.get("images") is not None else row.get("image")
    given = given if isinstance(given, list) else [] if _is_missing(given) else [given]
    if format_name == "text" and given:
        refuse_row(index, "a `text` has no place for `images`; a chat (`messages`) or a `caption` with `image` has.")
    # Of the parts that are images: the role, and the image if the part holds it.
    fields = ("prompt", "messages", "completion", "chosen", "rejected")
    places = [place for field in fields for place in _image_parts(row.get(field))]
    if not places:
        return [(image, "understanding") for image in given]  # they go before the first user message
    remaining = iter(given)
    images = []
    for role, part in places:
        held = part.get("image")
        image = next(remaining, None) if _is_missing(held) else held
        if image is None:
            refuse_row(index, f"its messages have {len(places)} images, `images` holds {len(given)}.")
        images.append((image, "editing" if role == "assistant" else "understanding"))
    if next(remaining, None) is not None:
        refuse_row(index, f"`images` holds {len(given)} images, more than its messages have places for.")
    return images


def num_images(chat: Any) -> int:
    """The parts of a chat that are images."""
    return len(_image_parts(chat))


def _image_parts(chat: Any) -> list[tuple[Any, dict[str, Any]]]:
    """The parts of a chat that are images, each with its message's role; nothing where it is no chat."""
    messages = [message for message in chat if isinstance(message, dict)] if isinstance(chat, list) else []
    return [
        (message.get("role"), part)
        for message in messages
        if isinstance(message.get("content"), list)
        for part in message["content"]
        if isinstance(part, dict) and part.get("type") == "image"
    ]


def stored_image(value: Any) -> Any:
    """
    An image of a row in a form that the image processor reads. Without the feature `Image`, `datasets` (and parquet)
    give the bytes of a file, alone or as `{"bytes": ..., "path": ...}`.

    Raises:
        OSError: for bytes that are no image, or a path that cannot be opened.
    """
    if isinstance(value, bytes):
        value = {"bytes": value}
    if not _is_file(value):
        return value
    return Image().decode_example({"bytes": value.get("bytes"), "path": value.get("path")})


def _is_file(value: Any) -> bool:
    return isinstance(value, dict) and bool({"bytes", "path"} & set(value))


def _is_missing(value: Any) -> bool:
    return value is None or (_is_file(value) and value.get("bytes") is None and value.get("path") is None)
