"""A folder of results that knows what is in it: an interrupted run goes on, and nothing is made twice."""

import errno
import hashlib
import json
import os
import re
import unicodedata
import uuid
from pathlib import Path
from typing import Any

import PIL.Image


FILE = "manifest.jsonl"


def slug(text: str, length: int = 60) -> str:
    """A file's name from a prompt: letters and digits of any script, the rest as hyphens."""
    words = re.sub(r"[^\w]+", "-", unicodedata.normalize("NFKC", text).casefold()).strip("-_")
    return words[:length].strip("-_") or "image"


def make_folder(folder: Path) -> None:
    """
    Makes a folder if there is none.

    Raises:
        OSError: naming it, if it cannot be made or nothing can be written into it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, "Nothing can be written here", str(folder))


def _is_running(process: str) -> bool:
    try:
        os.kill(int(process), 0)
    except (ValueError, ProcessLookupError):
        return False
    except PermissionError:
        return True
    return True


class Manifest:
    """
    Results in a folder, with a line of JSON for each in `manifest.jsonl`: what was asked for, the file, the seconds it
    took. A line is written when its file stands, so that a run that is killed leaves neither half a file nor a line
    without one.

    Args:
        folder: Made if there is none.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        make_folder(self.folder)
        self.path = self.folder / FILE
        self._done: dict[str, dict[str, Any]] = {}
        self._numbers: dict[str, int] = {}  # of the next file by a name
        for leftover in self.folder.glob(".*.partial"):
            if not _is_running(leftover.name.split(".")[1]):
                leftover.unlink(missing_ok=True)
        if self.path.exists():
            text = self.path.read_text(encoding="utf-8", errors="replace")
            if text and not text.endswith("\n"):  # of a run that was killed
                with self.path.open("a", encoding="utf-8") as file:
                    file.write("\n")
            for line in text.split("\n"):
                try:
                    entry = json.loads(line)
                except json.JSONDecodeError:
                    continue
                if isinstance(entry, dict) and (self.folder / str(entry.get("file"))).is_file():
                    self._done[entry.get("key", "")] = entry

    @staticmethod
    def key(request: dict[str, Any]) -> str:
        """What two requests have in common if their results are the same."""
        return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()[:24]

    def find(self, request: dict[str, Any]) -> dict[str, Any] | None:
        """The entry of a request that has been done, or `None`."""
        return self._done.get(self.key(request))

    def add(self, request: dict[str, Any], image: PIL.Image.Image, seconds: float) -> dict[str, Any]:
        """
        Saves an image and its line.

        Args:
            request: All that the image follows from; `prompt` names its file.
            image: The result.
            seconds: It took.
        """
        partial = self.folder / f".{os.getpid()}.{uuid.uuid4().hex}.partial"
        try:
            image.save(partial, format="PNG")
            name = self._place(partial, slug(str(request.get("prompt", ""))))
        finally:
            partial.unlink(missing_ok=True)
        entry = {**request, "file": name, "seconds": round(seconds, 3), "key": self.key(request)}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._done[entry["key"]] = entry
        return entry

    def _place(self, partial: Path, stem: str) -> str:
        """Gives a file the first name that is free, also of what others write into the folder at this moment."""
        number = self._numbers.get(stem, 1)
        while True:
            name = f"{stem}-{number}.png" if number > 1 else f"{stem}.png"
            number += 1
            self._numbers[stem] = number
            path = self.folder / name
            if path.exists():
                continue
            try:
                os.link(partial, path)  # unlike a rename it replaces nothing
            except FileExistsError:
                continue
            except OSError:  # a filesystem without links
                os.replace(partial, path)
            return name
