"""Datasets by name: of the Hub, of files and folders, or saved by `save_to_disk`; and the split that is meant."""

import glob
import os
from pathlib import Path
from typing import TypeAlias

from datasets import (
    Dataset,
    DatasetDict,
    Image,
    IterableDataset,
    IterableDatasetDict,
    load_dataset,
    load_from_disk,
)
from datasets.exceptions import DatasetGenerationError
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder


FILE_SUFFIXES = (".jsonl", ".json", ".parquet", ".csv", ".tsv", ".arrow", ".txt")
SPLITS = ("train", "validation", "test")
SAVED_TO_DISK = ("dataset_dict.json", "state.json")

AnyDataset: TypeAlias = Dataset | IterableDataset
AnyDatasetDict: TypeAlias = DatasetDict | IterableDatasetDict


def load_training_dataset(
    name_or_path: str, config_name: str | None = None, streaming: bool = False
) -> AnyDatasetDict:
    """
    A dataset with its splits.

    Args:
        name_or_path (`str`): A file (JSON lines, parquet, CSV and what else `datasets.load_dataset` reads, also
            compressed), a pattern of files (`data/*.jsonl`, `data/**/*.parquet`), a folder of files, of images with a
            text file of the same name beside each (columns image, caption), a folder written by `save_to_disk`, or
            the name of a dataset on the Hub. Files and one saved `Dataset` are a split "train".
        config_name (`str`, *optional*): Of a dataset with several configurations.
        streaming (`bool`, defaults to `False`): Read rows when they are needed. Not for what `save_to_disk` wrote.

    Returns:
        `datasets.DatasetDict`, or with `streaming` `datasets.IterableDatasetDict`.

    Raises:
        FileNotFoundError: if `name_or_path` looks like a file, pattern or folder, and there is none.
        ValueError: if the files are not what their names say; in what place. For an image without its text, too.
    """
    path = Path(name_or_path).expanduser()
    if any((path / marker).is_file() for marker in SAVED_TO_DISK):
        saved = load_from_disk(str(path))
        saved = DatasetDict(train=saved) if isinstance(saved, Dataset) else saved
        if streaming:
            raise ValueError(f"`streaming`: {name_or_path!r} was written by `save_to_disk`, and is not a stream.")
        return saved
    files = _files_of(path)
    if texts := _texts_of_images(files):
        splits = _captioned(path, texts)
        return IterableDatasetDict({k: v.to_iterable_dataset() for k, v in splits.items()}) if streaming else splits
    folder, pattern = folder_and_pattern(path)
    source = name_or_path if not path.is_dir() else str(path)
    if pattern is not None:
        if not glob.glob(str(path), recursive=True):
            raise FileNotFoundError(f"`dataset_name`: there is no file {name_or_path!r}.")
        source = folder
    elif not path.is_dir() and (
        path.is_absolute() or name_or_path.startswith((".", "~")) or name_or_path.endswith("/") or len(path.parts) > 2
    ):
        raise FileNotFoundError(f"`dataset_name`: there is no folder {name_or_path!r}, and the Hub has no such names.")
    try:
        if pattern is None and _are_images_with_metadata(files):
            return load_dataset("imagefolder", data_dir=source, streaming=streaming)
        return load_dataset(source, name=config_name, data_files=pattern, streaming=streaming)
    except StopIteration as error:  # what `datasets` raises of files without a row
        raise ValueError(f"`dataset_name`: {name_or_path!r} has no rows.") from error
    except DatasetGenerationError as error:
        raise ValueError(f"`dataset_name`: {name_or_path!r} cannot be read: {error.__cause__ or error}") from error


def _files_of(folder: Path) -> list[Path]:
    """All in a folder and in those in it, but what is hidden."""
    every = sorted(folder.rglob("*")) if folder.is_dir() else []
    return [file for file in every if not any(part.startswith(".") for part in file.relative_to(folder).parts)]


def _is_image(file: Path) -> bool:
    return file.suffix.lower() in ImageFolder.EXTENSIONS


def _texts_of_images(files: list[Path]) -> dict[Path, Path]:
    """
    Of each image the text file of its name, where at least one is there, and no file of metadata. By itself `datasets`
    would take either the images or the texts, whichever are more.
    """
    if any(file.name in ImageFolder.METADATA_FILENAMES for file in files):
        return {}
    texts = {image: image.with_suffix(".txt") for image in files if _is_image(image)}
    return texts if any(map(Path.is_file, texts.values())) else {}


def _captioned(folder: Path, texts: dict[Path, Path]) -> DatasetDict:
    """What lies in folders of these names is split by them, as `datasets` splits images."""
    rows: dict[str, dict[str, list[str]]] = {}
    for image, text in texts.items():
        if not text.is_file():
            raise ValueError(f"`dataset_name`: {str(image)!r} has no {text.name} beside it.")
        try:
            caption = text.read_text(encoding="utf-8-sig").strip()
        except UnicodeDecodeError as error:
            raise ValueError(f"`dataset_name`: {str(text)!r} is no text in UTF-8: {error}") from error
        first = image.relative_to(folder).parts[0]
        split = rows.setdefault(first if first in SPLITS else "train", {"image": [], "caption": []})
        split["image"].append(str(image))
        split["caption"].append(caption)
    return DatasetDict({name: Dataset.from_dict(own).cast_column("image", Image()) for name, own in rows.items()})


def _are_images_with_metadata(files: list[Path]) -> bool:
    """
    With captions in a file of metadata. `datasets` goes by the commonest suffix, and would take a `cat.txt` beside
    each `cat.jpg` for the data.
    """
    return any(file.name in ImageFolder.METADATA_FILENAMES for file in files) and any(map(_is_image, files))


def folder_and_pattern(path: Path) -> tuple[str, str | None]:
    """A path of files, cut before the first part that is a pattern; no pattern if it names a folder or a dataset."""
    if path.is_dir():
        return str(path), None
    is_pattern = [glob.has_magic(part) for part in path.parts]
    if any(is_pattern):
        first = is_pattern.index(True)
    elif path.is_file() or any(suffix in FILE_SUFFIXES for suffix in path.suffixes[-2:]):
        first = len(path.parts) - 1
    else:
        return str(path), None
    return os.path.abspath(os.path.join("", *path.parts[:first])), os.path.join(*path.parts[first:])


def only_dataset(argument: str, dataset: AnyDataset | AnyDatasetDict) -> AnyDataset:
    """
    `dataset`, or the split of a `DatasetDict` that has one only.

    Raises:
        TypeError: for anything else than a dataset.
        ValueError: for a `DatasetDict` of several splits; names them.
    """
    if isinstance(dataset, Dataset | IterableDataset):
        return dataset
    if not isinstance(dataset, DatasetDict | IterableDatasetDict):
        raise TypeError(
            f"`{argument}` must be a `datasets.Dataset` or `IterableDataset`, got {type(dataset).__name__}."
        )
    if len(dataset) != 1:
        splits = ", ".join(f"{argument}[{split!r}]" for split in dataset)
        raise ValueError(f"`{argument}` has {len(dataset)} splits; give one of them: {splits or 'there is none'}.")
    return next(iter(dataset.values()))


def split_of(data: AnyDatasetDict, split: str, argument: str) -> AnyDataset:
    """
    The split of that name.

    Raises:
        ValueError: if there is none; names `argument`, and the splits that there are.
    """
    if split not in data:
        raise ValueError(f"`{argument}`: the data has no split {split!r}, only {', '.join(map(repr, data))}.")
    return data[split]
