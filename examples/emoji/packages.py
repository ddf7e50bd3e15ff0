"""
The npm packages that pictures and words come from, read where they lie.

    mkdir packages && cd packages
    npm pack emoji-datasource-twitter@16.0.0 emojibase-data@17.0.0 cldr-annotations-full@48.2.0
    npm pack gemoji@8.1.0 emojilib@4.0.3

Pictures are Twemoji's (CC-BY 4.0). Words are of emojibase-data and gemoji (MIT) and of CLDR (Unicode-3.0). Those of
emojilib (MIT) are never trained on as emojilib has them: they are the test of free wording. Three quarters of them
other sources have, too, often of other emoji.
"""

import json
import re
import tarfile
from pathlib import Path
from typing import Any


PICTURES = "emoji-datasource-twitter-16.0.0.tgz"
EMOJIBASE = "emojibase-data-17.0.0.tgz"
CLDR = "cldr-annotations-full-48.2.0.tgz"
GEMOJI = "gemoji-8.1.0.tgz"
EMOJILIB = "emojilib-4.0.3.tgz"
ALL = (PICTURES, EMOJIBASE, CLDR, GEMOJI, EMOJILIB)


def check(packages: Path) -> None:
    """Raises FileNotFoundError if one is missing."""
    if missing := [name for name in ALL if not (packages / name).is_file()]:
        raise FileNotFoundError(f"`packages`: {packages} has no {', '.join(missing)}; `npm pack` fetches them.")


def read_json(archive: Path, *members: str) -> list[Any]:
    """The contents of files of an archive, given below `package/`."""
    with tarfile.open(archive) as opened:
        return [json.loads(content_of(opened, f"package/{member}")) for member in members]


def content_of(archive: tarfile.TarFile, member: str | tarfile.TarInfo) -> bytes:
    """Raises KeyError if there is no such file in it."""
    file = archive.extractfile(member)
    if file is None:
        raise KeyError(f"{member!r} of `archive` is no file.")
    return file.read()


def read_gemoji(archive: Path) -> list[dict[str, Any]]:
    """Its list is JavaScript: quotes are single, names of fields have none."""
    with tarfile.open(archive) as opened:
        text = content_of(opened, "package/index.js").decode()
    text = text[text.index("gemoji = [") + len("gemoji = ") :].split("\n]\n")[0] + "\n]"
    strings = re.compile(r"'((?:[^'\\]|\\.)*)'|\"((?:[^\"\\]|\\.)*)\"")
    kept: list[str] = []

    def keep(match: re.Match[str]) -> str:
        kept.append(re.sub(r"\\(.)", r"\1", match[1] if match[1] is not None else match[2]))
        return f"\0{len(kept) - 1}\0"

    text = re.sub(r"(\w+):", r'"\1":', strings.sub(keep, text))
    return json.loads(re.sub("\0(\\d+)\0", lambda match: json.dumps(kept[int(match[1])]), text))


def code_points(emoji: str) -> str:
    """ "❤️" to "2764": without variation selectors, which the packages do not agree on."""
    return "-".join(f"{ord(character):04X}" for character in emoji if character != "\ufe0f")


def without_selectors(key: str) -> str:
    return key.upper().replace("-FE0F", "")
