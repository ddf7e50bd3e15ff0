"""Names the folder whose weights cannot be read, where transformers raises the error of its file reader."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from safetensors import SafetensorError


@contextmanager
def named_when_damaged(name_or_path: str | os.PathLike | None) -> Iterator[None]:
    """
    Raises:
        OSError: if a weights file in `name_or_path` is cut off or damaged. ValueError: if its index says nothing.
    """
    try:
        yield
    except SafetensorError as error:
        raise OSError(f"A weights file in {name_or_path} is truncated or damaged: {error}") from error
    except KeyError as error:
        if error.args != ("weight_map",):
            raise
        raise ValueError(f"The index of the weights in {name_or_path} has no `weight_map`.") from error
