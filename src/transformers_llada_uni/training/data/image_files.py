"""Which files the rows of a dataset name as their images: what is made of rows is made anew when one has changed."""

import os
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
from datasets import Dataset

from .dataset_formats import IMAGE_COLUMNS


def versions_of_image_files(dataset: Dataset) -> list[tuple[str, int, int]]:
    """
    Of each file that is named in the place of an image, and whose bytes the dataset does not hold: its path, when it
    was last changed (nanoseconds), and its size (bytes). In columns of images, and inside of messages.
    """
    versions = set()
    for name in dataset.column_names:
        for chunk in dataset.data.column(name).chunks:
            for path in _paths(chunk, name in IMAGE_COLUMNS):
                file = Path(path)
                if file.is_file():
                    status = file.stat()
                    versions.add((os.path.abspath(path), status.st_mtime_ns, status.st_size))
    return sorted(versions)


def _paths(values: pa.Array, is_image: bool) -> Iterator[str]:
    kind = values.type
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        yield from _paths(values.flatten(), is_image)
    elif pa.types.is_struct(kind):
        names = {field.name for field in kind}
        if "path" in names:  # of a file, with or without its bytes
            is_alone = values.field("bytes").is_null() if "bytes" in names else pa.array([True] * len(values))
            yield from _paths(values.field("path").filter(is_alone), True)
        else:
            for field in kind:
                yield from _paths(values.field(field.name), is_image or field.name in IMAGE_COLUMNS)
    elif is_image and (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        yield from (path for path in values.unique().to_pylist() if path)
