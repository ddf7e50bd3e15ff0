"""Which kind of example a dataset holds, and what its rows must look like."""

from collections.abc import Iterable
from typing import Any, NoReturn

from datasets import Dataset, Image, IterableDataset
from trl.data_utils import get_dataset_column_names


# Columns that make a format, the most telling first. The columns of pictures that go with it are named after it.
FORMATS: dict[str, tuple[str, ...]] = {
    "preference": ("prompt", "chosen", "rejected"),
    "prompt_completion": ("prompt", "completion"),
    "messages": ("messages",),
    "editing": ("source_image", "instruction", "target_image"),
    "text_to_image": ("image", "caption"),
    "text": ("text",),
    "prompt": ("prompt",),
}
PICTURE_COLUMNS = ("image", "images", "source_image", "target_image")
CODES_COLUMN = "image_codes"
ROLES = ("system", "user", "assistant", "tool")


def format_of(columns: Iterable[str]) -> str:
    """
    The format of a dataset, a key of `FORMATS`, by the names of its columns. Pictures may have been replaced by codes.

    Raises:
        ValueError: if the columns make no format; lists what would.
    """
    names = set(columns)
    is_encoded = CODES_COLUMN in names
    for name, needed in FORMATS.items():
        if all(column in names or (is_encoded and column in PICTURE_COLUMNS) for column in needed):
            return name
    known = "; ".join(" + ".join(needed) for needed in FORMATS.values())
    raise ValueError(f"The columns {sorted(names)} make no example of training. Known are: {known}.")


def with_caption(dataset: Dataset | IterableDataset) -> Dataset | IterableDataset:
    """The dataset with its column `text` named `caption`, if a picture stands beside it and nothing else."""
    columns = get_dataset_column_names(dataset)
    if format_of(columns) == "text" and ("image" in columns or CODES_COLUMN in columns):
        return dataset.rename_column("text", "caption")
    return dataset


def refuse_row(index: int, message: str) -> NoReturn:
    raise ValueError(f"Row {index}: {message}")


def check_text(value: Any, index: int, field: str) -> str:
    """`value`, if it is a text with at least one word."""
    if not isinstance(value, str) or not value.strip():
        refuse_row(index, f"`{field}` must be a text that is not empty, got {value!r:.80}.")
    return value


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
        content = message["content"]
        if isinstance(content, str):
            continue
        if not isinstance(content, list) or not all(_is_part(part) for part in content):
            refuse_row(
                index,
                f"`{field}[{number}]['content']` must be a text or a list of parts of type 'text' or 'image', got "
                f"{content!r:.80}.",
            )
    if last_role is not None and messages[-1]["role"] != last_role:
        refuse_row(index, f"`{field}` must end with a message of role {last_role!r}, got {messages[-1]['role']!r}.")
    return messages


def _is_part(part: Any) -> bool:
    if not isinstance(part, dict):
        return False
    return part.get("type") == "image" or (part.get("type") == "text" and isinstance(part.get("text"), str))


def without_empty_fields(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """
    The messages without the fields that `datasets` fills with None, because another row has them: a column's rows
    share one schema.
    """

    def clean(value: Any) -> Any:
        if isinstance(value, list):
            return [clean(entry) for entry in value]
        if isinstance(value, dict):
            return {name: clean(entry) for name, entry in value.items() if entry is not None}
        return value

    return clean(messages)


def pictures_of(row: dict[str, Any], format_name: str, index: int) -> list[tuple[Any, str]]:
    """
    The pictures of a row in the order of their places, each with the size rule under which it is read: that of
    understanding for what a user shows, that of editing for what the model shall make.
    """
    if format_name == "editing":
        return [(_picture(row, name, index), "editing") for name in ("source_image", "target_image")]
    if format_name == "text_to_image":
        return [(_picture(row, "image", index), "editing")]
    given = row.get("images") if row.get("images") is not None else row.get("image")
    given = given if isinstance(given, list) else [] if given is None else [given]
    if format_name == "text" and given:
        refuse_row(index, "a `text` has no place for `images`; a chat (`messages`) or a `caption` with `image` has.")
    # Of the parts that are pictures: the role, and the picture if the part holds it.
    fields = ("prompt", "messages", "completion", "chosen", "rejected")
    places = [place for field in fields for place in _picture_parts(row.get(field))]
    if not places:
        return [(picture, "understanding") for picture in given]  # they go before the first user message
    remaining = iter(given)
    pictures = []
    for role, part in places:
        held = _decoded(part.get("image"))
        picture = held if held is not None else next(remaining, None)
        if picture is None:
            refuse_row(index, f"its messages have {len(places)} pictures, `images` holds {len(given)}.")
        pictures.append((picture, "editing" if role == "assistant" else "understanding"))
    if next(remaining, None) is not None:
        refuse_row(index, f"`images` holds {len(given)} pictures, more than its messages have places for.")
    return pictures


def num_pictures(chat: Any) -> int:
    """The parts of a chat that are pictures."""
    return len(_picture_parts(chat))


def _picture_parts(chat: Any) -> list[tuple[str, dict[str, Any]]]:
    """The parts of a chat that are pictures, each with its message's role; nothing where it is no chat."""
    messages = [message for message in chat if isinstance(message, dict)] if isinstance(chat, list) else []
    return [
        (message.get("role"), part)
        for message in messages
        if isinstance(message.get("content"), list)
        for part in message["content"]
        if isinstance(part, dict) and part.get("type") == "image"
    ]


def _decoded(picture: Any) -> Any:
    """A picture; `datasets` stores one inside messages as the bytes of a file, or fills its place with None."""
    if not isinstance(picture, dict) or not {"bytes", "path"} & set(picture):
        return picture
    if picture.get("bytes") is None and picture.get("path") is None:
        return None
    return Image().decode_example({"bytes": picture.get("bytes"), "path": picture.get("path")})


def _picture(row: dict[str, Any], name: str, index: int) -> Any:
    if row.get(name) is None:
        refuse_row(index, f"`{name}` is missing.")
    return row[name]
