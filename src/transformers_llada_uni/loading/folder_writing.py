"""Folders that appear whole or not at all, whatever stops the process that writes them."""

import glob
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from transformers.utils import CHAT_TEMPLATE_DIR, logging


try:
    import fcntl
except ImportError:  # Windows: leftovers stay, as one cannot tell whether somebody writes them
    fcntl = None  # type: ignore[assignment]

logger = logging.get_logger(__name__)


@contextmanager
def folder_at_once(destination: Path, replace: bool = False) -> Iterator[Path]:
    """
    A temporary folder beside `destination` to write into. It takes that name when all is written; where writing fails
    it is removed, with the parents that were made for it. What a killed process left there is removed first, with a
    warning; what a running one writes stays.

    Args:
        destination: The folder to write; its parents are made.
        replace: Whether a folder of that name gives way, once the new one is complete. A process that is killed
            between the two renames leaves both beside it, and the next one puts the old one back.

    Raises:
        FileExistsError: if a folder of that name stands there in the end and `replace` is false.
        OSError: if it cannot be written.
    """
    missing_parents = [parent for parent in destination.parents if not parent.exists()]
    stem = f".{destination.name}.{uuid.uuid4().hex[:8]}"
    temporary, old = destination.with_name(f"{stem}.partial"), destination.with_name(f"{stem}.old")
    _clear_leftovers(destination)
    try:
        temporary.mkdir(parents=True)
        with _locked(temporary):
            yield temporary
            if replace and destination.exists():
                with _locked(destination):
                    destination.rename(old)
                    temporary.rename(destination)
                    shutil.rmtree(old)
            else:
                try:
                    temporary.rename(destination)
                except OSError as error:  # it names the temporary folder, which nobody knows
                    if destination.exists():
                        raise FileExistsError(
                            f"{str(destination)!r} exists already; it has appeared meanwhile."
                        ) from error
                    raise
    except BaseException:  # Ctrl-C too
        if old.exists() and not destination.exists():
            old.rename(destination)
        shutil.rmtree(temporary, ignore_errors=True)
        for parent in missing_parents:
            with suppress(OSError):
                parent.rmdir()
        raise


def _clear_leftovers(destination: Path) -> None:
    beside = f".{glob.escape(destination.name)}.{'[0-9a-f]' * 8}"
    for leftover in [*destination.parent.glob(f"{beside}.old"), *destination.parent.glob(f"{beside}.partial")]:
        if not _is_abandoned(leftover):
            continue
        if leftover.suffix == ".old" and not destination.exists():
            leftover.rename(destination)
            logger.warning(f"{destination} is back: a process that was killed had moved it to {leftover.name}.")
        else:
            shutil.rmtree(leftover, ignore_errors=True)
            logger.warning(f"Removed {leftover}, which a process that was killed had left.")


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Others can tell that this process writes `folder`; the system forgets it when the process ends in any way."""
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def _is_abandoned(folder: Path) -> bool:
    if fcntl is None:
        return False
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True


def copy_chat_templates(source: Path, destination: Path) -> None:
    """The chat templates beside a processor's first one, such as that of its tokenizer: a folder of their own."""
    if (source / CHAT_TEMPLATE_DIR).is_dir():
        shutil.copytree(source / CHAT_TEMPLATE_DIR, destination / CHAT_TEMPLATE_DIR)
