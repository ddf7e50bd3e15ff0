"""A folder of results that knows what is in it: an interrupted run goes on, and nothing is made twice."""

import hashlib
import json
import os
import re
import unicodedata
from pathlib import Path
from typing import Any

import PIL.Image


FILE = "manifest.jsonl"


def slug(text: str, length: int = 60) -> str:
    """A file's name from a prompt: letters and digits of any script, the rest as hyphens."""
    words = re.sub(r"[^\w]+", "-", unicodedata.normalize("NFKC", text).casefold()).strip("-_")
    return words[:length].strip("-_") or "image"


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
        self.folder.mkdir(parents=True, exist_ok=True)
        self.path = self.folder / FILE
        self._done: dict[str, dict[str, Any]] = {}
        self._names = {path.name for path in self.folder.iterdir()}
        for leftover in self.folder.glob(".*.partial"):
            if not _is_running(leftover.name.split(".")[1]):
                leftover.unlink(missing_ok=True)
        if self.path.exists():
            text = self.path.read_text(encoding="utf-8")
            if text and not text.endswith("\n"):  # of a run that was killed
                with self.path.open("a", encoding="utf-8") as file:
                    file.write("\n")
            for line in text.splitlines():
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
        stem, number = slug(str(request.get("prompt", ""))), 1
        while (name := f"{stem}-{number}.png" if number > 1 else f"{stem}.png") in self._names:
            number += 1
        self._names.add(name)
        partial = self.folder / f".{os.getpid()}.{name}.partial"
        try:
            image.save(partial, format="PNG")
            os.replace(partial, self.folder / name)
        finally:
            partial.unlink(missing_ok=True)
        entry = {**request, "file": name, "seconds": round(seconds, 3), "key": self.key(request)}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._done[entry["key"]] = entry
        return entry
