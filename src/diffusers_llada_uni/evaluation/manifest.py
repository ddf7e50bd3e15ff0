"""A folder of results that knows what is in it: an interrupted run goes on, and nothing is made twice."""

import errno
import hashlib
import json
import logging
import os
import re
import time
import unicodedata
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeAlias

import PIL.Image


try:
    import fcntl
except ImportError:  # Windows: two runs at once in one folder may both make a result, under two names
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

Entry: TypeAlias = dict[str, Any]
Result: TypeAlias = PIL.Image.Image | dict[str, Any]

FILE = "manifest.jsonl"
# What only names a thing whose content stands beside it, as a digest
NAMES = ("model", "images", "mask")
RESERVED = re.compile(r"con|prn|aux|nul|(com|lpt)[0-9¹²³]")  # no names of files on Windows
PARTIAL = re.compile(r"\.[0-9a-f]{24}\.partial")
MOST_CLAIMS = 256  # each is an open file
NO_FILE = -1
SECONDS_BETWEEN_LOOKS = 0.2


def slug(text: str, length: int = 60) -> str:
    """A file's name from a prompt: letters and digits of any script, the rest as hyphens."""
    words = re.sub(r"[^\w]+", "-", unicodedata.normalize("NFKC", text).casefold()).strip("-_")
    words = words[:length].strip("-_") or "image"
    return f"{words}-image" if RESERVED.fullmatch(words) else words


def make_folder(folder: Path) -> None:
    """
    Makes a folder if there is none.

    Raises:
        OSError: naming it, if it cannot be made or nothing can be written into it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, "Nothing can be written here", str(folder))


class Manifest:
    """
    Results in a folder, with a line of JSON for each in `manifest.jsonl`: what was asked for, the seconds it took, and
    the file with the image, or what else came of it. A line is written when its file stands, so that a run that is
    killed leaves neither half a file nor a line without one.

    Several processes may work on one folder. A result is claimed before it is made: by a lock on the hidden file that
    its image is then written into, which the system takes from a process that ends in any way.

    Args:
        folder: Made if there is none.

    Raises:
        OSError: if it cannot be made, or nothing can be written into it.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        self.folder = Path(folder)
        make_folder(self.folder)
        self.path = self.folder / FILE
        self._done: dict[str, Entry] = {}
        self._key_of_file: dict[str, str] = {}
        self._num_read = 0  # bytes of the manifest
        self._numbers: dict[str, int] = {}  # of the next file by a name
        self._own = "" if fcntl is not None else f".{uuid.uuid4().hex}"
        self._look()
        self._clear_leftovers()

    @staticmethod
    def key(request: Entry) -> str:
        """What two requests have in common if their results are the same."""
        content = {name: value for name, value in request.items() if name not in NAMES}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:24]

    def find(self, request: Entry) -> Entry | None:
        """The entry of a request that has been done, or `None`."""
        return self._done.get(self.key(request))

    def complete(
        self,
        requests: Sequence[Entry],
        make: Callable[[list[int]], Sequence[Result]],
        batch_size: int = 1,
    ) -> Iterator[tuple[int, Entry, bool]]:
        """
        Has made what is not there yet. What another process is making is waited for, and made here if it gives up.

        Args:
            requests: Each all that its result follows from, as JSON can hold it; `prompt` names the file. Requests
                that are equal have one result.
            make: Takes the numbers of requests, at most `batch_size` of them; returns their results: images, or dicts
                of what JSON can hold.
            batch_size: Results made at once.

        Yields:
            For each request once its number, its entry, and whether it was made here and now: first those that were
            there, then the others as they are made.

        Raises:
            OSError: if nothing can be written; a file is then not there, rather than half.
        """
        waiting: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            waiting.setdefault(self.key(request), []).append(number)
        while True:
            for key in [key for key in waiting if key in self._done]:
                for number in waiting.pop(key):
                    yield number, self._done[key], False
            if not waiting:
                return
            with self._claims(waiting, min(batch_size, MOST_CLAIMS)) as keys:
                if keys:
                    firsts = [waiting[key][0] for key in keys]
                    began = time.perf_counter()
                    results = make(firsts)
                    seconds = (time.perf_counter() - began) / len(keys)
                    try:
                        # All of them, before who asks can stop at the first.
                        for key, first, result in zip(keys, firsts, results, strict=True):
                            self._add(key, requests[first], result, seconds)
                    except OSError as error:  # such as a full disk
                        error.filename = error.filename or str(self.folder)
                        raise
                    for key, first in zip(keys, firsts, strict=True):
                        for number in waiting.pop(key):
                            yield number, self._done[key], number == first
                    continue
            if not any(key in self._done for key in waiting):
                logger.info("%d results are made by another process; waiting for them.", len(waiting))
                time.sleep(SECONDS_BETWEEN_LOOKS)
                self._look()

    def _look(self) -> None:
        """Takes in what has been written into the manifest since the last look."""
        try:
            with self.path.open("rb") as file:
                file.seek(self._num_read)
                lines = file.read()
        except FileNotFoundError:
            return
        lines = lines[: lines.rfind(b"\n") + 1]  # one may be in the making
        self._num_read += len(lines)
        for line in lines.splitlines():  # of bytes: at line feeds alone
            try:
                entry = json.loads(line)
            except ValueError:  # of a run that was killed
                continue
            if not isinstance(entry, dict) or not isinstance(entry.get("key"), str):
                continue
            key: str = entry["key"]
            file_name = entry.get("file")
            if file_name is None:
                self._done[key] = entry
            elif isinstance(file_name, str) and (self.folder / file_name).is_file():
                # A name that was free again is another request's since.
                owner = self._key_of_file.get(file_name, key)
                if owner != key:
                    self._done.pop(owner, None)
                self._key_of_file[file_name] = key
                self._done[key] = entry

    def _partial(self, key: str) -> Path:
        return self.folder / f".{key}{self._own}.partial"

    @contextmanager
    def _claims(self, keys: Sequence[str] | dict[str, Any], most: int) -> Iterator[list[str]]:
        """The first keys that no other process has claimed nor done; they are held inside of this context."""
        held: dict[str, int] = {}
        try:
            for key in keys:
                if len(held) == most:
                    break
                descriptor = _lock(self._partial(key))
                if descriptor is not None:
                    held[key] = descriptor
            self._look()  # only now, when nobody else can add one of them
            yield [key for key in held if key not in self._done]
        finally:
            for key, descriptor in held.items():
                _unlock(self._partial(key), descriptor)

    def _clear_leftovers(self) -> None:
        """Of processes that were killed; not what another one is making now."""
        if fcntl is None:
            return
        for partial in self.folder.glob(".*.partial"):
            if not PARTIAL.fullmatch(partial.name) or not partial.is_file():
                continue  # somebody else's
            descriptor = _lock(partial)
            if descriptor is None:
                continue
            with suppress(OSError):
                status = partial.stat()
                if status.st_nlink > 1 and partial.name.split(".")[1] not in self._done:
                    # It has its place already, and was to be written into the manifest next.
                    for file in self.folder.glob("*.png"):
                        if file.stat().st_ino == status.st_ino:
                            file.unlink()
            _unlock(partial, descriptor)

    def _add(self, key: str, request: Entry, result: Result, seconds: float) -> Entry:
        entry, path = dict(request), None
        if isinstance(result, dict):
            entry |= result
        else:
            partial = self._partial(key)
            with partial.open("wb") as file:
                result.save(file, format="PNG")
                file.flush()
                os.fsync(file.fileno())
            path = self._place(partial, slug(str(request.get("prompt", ""))))
            entry["file"] = path.name
        entry |= {"seconds": round(seconds, 3), "key": key}
        try:
            self._write(entry)
        except BaseException:
            if path is not None:
                path.unlink(missing_ok=True)
            raise
        self._done[key] = entry
        return entry

    def _write(self, entry: Entry) -> None:
        line = json.dumps(entry, ensure_ascii=False).encode("utf-8", errors="backslashreplace") + b"\n"
        with self.path.open("ab+", buffering=0) as file:
            if fcntl is not None:
                with suppress(OSError):  # a file system without locks
                    fcntl.flock(file, fcntl.LOCK_EX)
            size = file.seek(0, os.SEEK_END)
            file.seek(max(size - 1, 0))
            if file.read(1) not in (b"", b"\n"):  # of a run that was killed
                line = b"\n" + line
            try:
                if file.write(line) != len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
                os.fsync(file.fileno())
            except BaseException:
                with suppress(OSError):
                    file.truncate(size)
                raise

    def _place(self, partial: Path, stem: str) -> Path:
        """Gives a file the first name that is free, also of what others write into the folder at this moment."""
        number = self._numbers.get(stem, 1)
        while True:
            path = self.folder / (f"{stem}-{number}.png" if number > 1 else f"{stem}.png")
            number += 1
            self._numbers[stem] = number
            if path.exists():
                continue
            try:
                os.link(partial, path)  # unlike a rename it replaces nothing
            except FileExistsError:
                continue
            except OSError:  # a file system without links
                os.replace(partial, path)
            return path


def _lock(path: Path) -> int | None:
    """
    An open file that this process alone holds; `None` if another one does. Made if there is none. `NO_FILE` on
    Windows, which neither renames nor removes a file that is open.
    """
    if fcntl is None:
        return NO_FILE
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        except OSError:  # a file system without locks
            return descriptor
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor
        os.close(descriptor)  # its holder has removed it meanwhile


def _unlock(path: Path, descriptor: int) -> None:
    with suppress(OSError):
        path.unlink()
    if descriptor != NO_FILE:
        os.close(descriptor)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A file of this process alone, which becomes `path` when it is written."""
    descriptor = None
    while descriptor is None:
        temporary = path.with_name(f".{uuid.uuid4().hex[:24]}.partial")
        descriptor = _lock(temporary)
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        _unlock(temporary, descriptor)


__all__ = ["Manifest"]
