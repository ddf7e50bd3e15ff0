"""What a command is asked to do, once or many times: from its arguments, a file, or standard input."""

import csv
import io
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple


COLUMNS = ("prompt", "image", "mask", "seed")
MAX_SEED = 2**63 - 1


class PromptRow(NamedTuple):
    """
    What is asked once.

    Attributes:
        prompt: Text.
        images: Paths of its images.
        mask: Path of its mask.
        seed: Of its randomness; `None` where that of the run holds.
    """

    prompt: str
    images: tuple[str, ...] = ()
    mask: str | None = None
    seed: int | None = None


def requests_of(
    command: Literal["draw", "edit", "fill", "ask"],
    prompt: str | None,
    prompts: str | None,
    images: list[str] | None = None,
    mask: str | None = None,
) -> list[PromptRow]:
    """
    What a command is asked, once or by a file; all is looked at before anything is made, or torch imported.

    Args:
        command: Its name.
        prompt, images, mask: Of what is asked once.
        prompts: The file; exactly one of `prompt` and `prompts` is given.

    Raises:
        ValueError: naming the argument, or the file and the row, that is missing, is too many, or cannot be read.
        OSError: as [`read_prompts`].
    """
    from ..image_files import open_image

    what = "question" if command == "ask" else "prompt"
    if prompt is None and prompts is None:
        raise ValueError(f"Give a {what}, or `--prompts` with a file of them.")
    if prompt is not None and prompts is not None:
        raise ValueError(f"Give a {what} or `--prompts`, and not both.")
    if prompts is not None and (images or mask):
        raise ValueError(f"`--image` and `--mask` are for one {what}; with `--prompts` its file names them.")
    if prompt is not None:
        if not prompt.strip():
            raise ValueError(f"`{what}` is empty.")
        check_text(prompt, f"`{what}`")
        _check_request(command, images or [], mask)
    requests = None if prompts is None else read_prompts(prompts)
    for number, request in enumerate(requests or [], 1):
        _check_request(command, request.images, request.mask, f"{prompts}, row {number}: ")

    requests = [PromptRow(prompt or "", tuple(images or ()), mask)] if requests is None else requests
    for number, request in enumerate(requests, 1):
        where = "" if prompts is None else f"{prompts}, row {number}: "
        try:
            sizes = [open_image(path).size for path in request.images]
            if request.mask is not None and open_image(request.mask, "mask").size != sizes[0]:
                size = f"{sizes[0][0]} x {sizes[0][1]}"
                raise ValueError(f"`mask` {request.mask} must be as large as the image, {size}.")
        except ValueError as error:
            raise ValueError(f"{where}{error}") from error
    return requests


def _check_request(command: str, images: Sequence[str], mask: str | None, where: str = "") -> None:
    wants_image, wants_mask = command != "draw", command == "fill"
    if bool(images) != wants_image and command != "ask":
        raise ValueError(f"{where}`image` is {'missing' if wants_image else 'for `edit` and `fill`'}.")
    if (mask is not None) != wants_mask:
        raise ValueError(f"{where}`mask` is {'missing' if wants_mask else 'for `fill`'}.")


def read_prompts(path: str) -> list[PromptRow]:
    """
    The prompts of a file: lines of text, or rows of JSON, JSONL, CSV, TSV or parquet with the columns `prompt` and, as
    far as a command takes them, `image` (a path or a list of them), `mask` and `seed`. Paths are seen from the file's
    folder.

    Args:
        path: A file; `-` is standard input, as text, JSONL, or CSV whose first line names columns.

    Raises:
        ValueError: naming the file and the row, if a row cannot be read.
        OSError: if there is no such file, or it cannot be read.
    """
    folder = Path(path).parent if path != "-" else Path()
    source = "standard input" if path == "-" else path
    rows = [
        _prompt_row(row, f"{source}, row {number}", folder)
        for number, row in enumerate(_rows(path, source), 1)
        if row is not None
    ]
    if not rows:
        raise ValueError(f"{source} holds no prompts.")
    return rows


def check_text(text: str, where: str) -> None:
    """Refuses what no tokenizer can read: bytes of a terminal that are no UTF-8, half of a surrogate pair in JSON."""
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError(f"{where} holds half a character: {text!r:.100}.")


def _delimiter_of(header: str) -> str:
    """Spreadsheets of some languages write semicolons; names of columns hold none of these."""
    return max(",;\t", key=header.count)


def _names_columns(line: str) -> bool:
    """Whether a line is the first one of a table, and no prompt."""
    names = [name.strip().strip('"') for name in line.split(_delimiter_of(line))]
    return len(names) > 1 and "prompt" in names and set(names) <= set(COLUMNS)


def _rows(path: str, source: str) -> Iterator[Any]:
    """`None` for a row of a table without anything in it."""
    suffix = Path(path).suffix.lower()
    if suffix == ".parquet":
        from transformers_llada_uni.optional_dependencies import require_extra

        require_extra("train", "pyarrow")
        import pyarrow.parquet

        yield from pyarrow.parquet.read_table(path).to_pylist()
        return
    content = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{source} is no text in UTF-8: {error}.") from error
    header = text.partition("\n")[0]
    if suffix in (".csv", ".tsv") or (path == "-" and _names_columns(header)):
        try:
            for row in csv.DictReader(io.StringIO(text, newline=""), delimiter=_delimiter_of(header)):
                yield row if any(row.values()) else None
        except csv.Error as error:
            raise ValueError(f"{source} is no CSV: {error}.") from error
        return
    if suffix == ".json":
        rows = _parse(text, source)
        if not isinstance(rows, list):
            raise ValueError(f"{source} must be a list of prompts, got {rows!r:.100}.")
        yield from rows
        return
    # Lines end as files' lines do; `splitlines` ends them at characters that JSON may have in its strings, too.
    lines = [line for line in io.StringIO(text, newline=None) if line.strip()]
    is_json = suffix in (".jsonl", ".ndjson") or (path == "-" and lines and lines[0].lstrip().startswith("{"))
    for number, line in enumerate(lines, 1):
        yield _parse(line, f"{source}, row {number}") if is_json else line


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is no JSON: {error}.") from error


def _prompt_row(row: Any, where: str, folder: Path) -> PromptRow:
    if isinstance(row, str):
        row = {"prompt": row.strip()}
    if not isinstance(row, dict):
        raise ValueError(f"{where} must be an object with a `prompt`, got {row!r:.100}.")
    row = {name: value for name, value in row.items() if value is not None and value != "" and value != []}
    if None in row:  # what `csv` calls it
        raise ValueError(f"{where} has more cells than the first line has names.")
    if unknown := sorted(set(map(str, row)) - set(COLUMNS)):
        raise ValueError(f"{where} has `{unknown[0]}`; known are {', '.join(COLUMNS)}.")
    prompt, images, seed = row.get("prompt"), row.get("image", []), row.get("seed")
    if prompt is not None and not isinstance(prompt, str):
        raise ValueError(f"{where}: `prompt` must be a text, got {prompt!r:.100}.")
    if prompt is None or not prompt.strip():
        raise ValueError(f"{where} has no `prompt`.")
    check_text(prompt, f"{where}: `prompt`")
    images = [images] if isinstance(images, str) else images
    if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
        raise ValueError(f"{where}: `image` must be a path or a list of paths, got {images!r:.100}.")
    mask = row.get("mask")
    if mask is not None and not isinstance(mask, str):
        raise ValueError(f"{where}: `mask` must be a path, got {mask!r:.100}.")
    if isinstance(seed, str) and seed.strip().isdecimal() or isinstance(seed, float) and seed.is_integer():
        seed = int(seed)
    if seed is not None and (type(seed) is not int or not 0 <= seed <= MAX_SEED):
        raise ValueError(f"{where}: `seed` must be an integer from 0 to {MAX_SEED}, got {seed!r:.100}.")
    paths = tuple(str(folder / image) for image in images)
    return PromptRow(prompt, paths, None if mask is None else str(folder / mask), seed)
