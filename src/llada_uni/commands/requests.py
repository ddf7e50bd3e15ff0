"""What a command is asked to do, once or many times: from its arguments, a file, or standard input."""

import csv
import io
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Request:
    """
    Attributes:
        prompt: Text.
        images: Paths of its images.
        mask: Path of its mask.
        seed: Of its randomness; `None` where the command's holds.
    """

    prompt: str
    images: tuple[str, ...] = ()
    mask: str | None = None
    seed: int | None = None


COLUMNS = ("prompt", "image", "mask", "seed")
MAX_SEED = 2**63 - 1


def read_requests(path: str) -> list[Request]:
    """
    Requests of a file: lines of text, or rows of JSONL, CSV or parquet with the columns `prompt` and, as far as a
    command takes them, `image` (a path or a list of them), `mask` and `seed`. Paths are seen from the file's folder.

    Args:
        path: A file; `-` is standard input, as text or JSONL.

    Raises:
        ValueError: naming the file and the row, if a row cannot be read.
        FileNotFoundError: if there is no such file.
    """
    folder = Path(path).parent if path != "-" else Path()
    source = "standard input" if path == "-" else path
    requests = [_request(row, f"{source}, row {number}", folder) for number, row in enumerate(_rows(path, source), 1)]
    if not requests:
        raise ValueError(f"{source} holds no prompts.")
    return requests


def _rows(path: str, source: str) -> Iterator[Any]:
    suffix = Path(path).suffix.lower()
    if suffix == ".parquet":
        import pyarrow.parquet

        yield from pyarrow.parquet.read_table(path).to_pylist()
        return
    content = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{source} is no text in UTF-8: {error}.") from error
    if suffix in (".csv", ".tsv"):
        try:
            yield from csv.DictReader(io.StringIO(text, newline=""), delimiter="\t" if suffix == ".tsv" else ",")
        except csv.Error as error:
            raise ValueError(f"{source} is no CSV: {error}.") from error
        return
    # Lines end as files' lines do; `splitlines` ends them at characters that JSON may have in its strings, too.
    lines = [line for line in io.StringIO(text, newline=None) if line.strip()]
    is_json = suffix in (".jsonl", ".ndjson") or (path == "-" and lines and lines[0].lstrip().startswith("{"))
    for number, line in enumerate(lines, 1):
        if not is_json:
            yield line
            continue
        try:
            yield json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{source}, row {number} is no JSON: {error}.") from error


def _request(row: Any, where: str, folder: Path) -> Request:
    if isinstance(row, str):
        row = {"prompt": row.strip()}
    if not isinstance(row, dict):
        raise ValueError(f"{where} must be an object with a `prompt`, got {row!r}.")
    row = {name: value for name, value in row.items() if value not in (None, "", [])}
    if None in row:  # what `csv` calls it
        raise ValueError(f"{where} has more cells than the first line has names.")
    if unknown := sorted(set(map(str, row)) - set(COLUMNS)):
        raise ValueError(f"{where} has `{unknown[0]}`; known are {', '.join(COLUMNS)}.")
    prompt, images, seed = row.get("prompt"), row.get("image", []), row.get("seed")
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError(f"{where} has no `prompt`.")
    if not prompt.isascii() and any("\ud800" <= character <= "\udfff" for character in prompt):
        raise ValueError(f"{where}: `prompt` holds half a character: {prompt!r}.")
    images = [images] if isinstance(images, str) else images
    if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
        raise ValueError(f"{where}: `image` must be a path or a list of paths, got {images!r}.")
    mask = row.get("mask")
    if mask is not None and not isinstance(mask, str):
        raise ValueError(f"{where}: `mask` must be a path, got {mask!r}.")
    if isinstance(seed, str) and seed.strip().isdecimal() or isinstance(seed, float) and seed.is_integer():
        seed = int(seed)
    if seed is not None and (type(seed) is not int or not 0 <= seed <= MAX_SEED):
        raise ValueError(f"{where}: `seed` must be an integer from 0 to {MAX_SEED}, got {seed!r}.")
    return Request(
        prompt, tuple(str(folder / image) for image in images), None if mask is None else str(folder / mask), seed
    )
