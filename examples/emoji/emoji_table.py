"""The emoji: images, names, which of them are held out, and which of them make an edit or a story."""

import hashlib
import io
import json
import re
import tarfile
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from grounds import on_ground
from packages import EMOJIBASE, PICTURES, check, content_of, read_json, without_selectors
from PIL import Image


TONES = {
    "1F3FB": "light",
    "1F3FC": "medium-light",
    "1F3FD": "medium",
    "1F3FE": "medium-dark",
    "1F3FF": "dark",
}
HELD_OUT_SHARE = 0.1
HOURS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
MOON_PHASES = (
    "new moon",
    "waxing crescent moon",
    "first quarter moon",
    "waxing gibbous moon",
    "full moon",
    "waning gibbous moon",
    "last quarter moon",
    "waning crescent moon",
)
HAIR = ("red hair", "curly hair", "white hair", "bald", "blond hair")


@dataclass
class Emoji:
    """
    One image of the set.

    Args:
        key: Its code points, such as "1F44B-1F3FD".
        base: Its name without skin tones.
        tones: None, one or two skin tones, as words.
        category, subcategory: Of Unicode.
        keywords: Other names of the base.
        version: Of the emoji standard that has it: what came early is known best.
        drawn: 64 x 64, with transparency.
        picture: The same on white.
        is_held_out: Never shown in training, neither as an image nor by a caption.
        names: All names of this very picture: some emoji of the set are drawn alike.
    """

    key: str
    base: str
    tones: tuple[str, ...]
    category: str
    subcategory: str
    keywords: tuple[str, ...]
    version: float
    drawn: Image.Image
    is_held_out: bool = False
    names: set[str] = field(default_factory=set)
    picture: Image.Image = field(init=False)

    def __post_init__(self) -> None:
        self.picture = on_ground(self.drawn)

    @property
    def name(self) -> str:
        """Its full name: "waving hand: medium skin tone"."""
        return name_of(self.base, self.tones)

    @property
    def answer_name(self) -> str:
        """The one of its names that answers use: the shortest, then the first by alphabet."""
        return min(self.names, key=lambda name: (len(name), name))


def name_of(base: str, tones: tuple[str, ...]) -> str:
    return f"{base}: " + ", ".join(f"{tone} skin tone" for tone in tones) if tones else base


def hold_out(table: list[Emoji]) -> None:
    """The rule: of the images with a skin tone the tenth whose code points have the smallest SHA-256."""
    # What is held out under one name must not be trained on under another.
    candidates = [emoji for emoji in table if emoji.tones and len(emoji.names) == 1]
    candidates.sort(key=lambda emoji: hashlib.sha256(emoji.key.encode()).digest())
    for emoji in candidates[: round(HELD_OUT_SHARE * sum(bool(emoji.tones) for emoji in table))]:
        emoji.is_held_out = True


def load_emoji(packages: Path) -> list[Emoji]:
    """All 3,786 images of the npm packages in this folder, in the order of Unicode, by their names of today."""
    check(packages)
    (labels,) = read_json(packages / EMOJIBASE, "en/data.json")
    label_of = {entry["hexcode"]: entry["label"] for entry in labels}
    pictures: dict[str, bytes] = {}
    with tarfile.open(packages / PICTURES) as archive:
        for member in archive:
            path = Path(member.name)
            if path.parts[-3:-1] == ("twitter", "64") and path.suffix == ".png":
                pictures[path.name] = content_of(archive, member)
            elif path.name == "emoji.json":
                entries = json.loads(content_of(archive, member))
    table: list[Emoji] = []
    for entry in sorted(entries, key=lambda entry: entry["sort_order"]):
        base = _base_name(label_of.get(without_selectors(entry["unified"]), entry["name"]))
        short_names = (name.replace("_", " ").replace("-", " ") for name in entry["short_names"])
        keywords = tuple(dict.fromkeys(word for word in short_names if word != base and len(word) > 2))
        variants = [(None, entry), *entry.get("skin_variations", {}).items()]
        for tone_key, variant in variants:
            tones = tuple(TONES[part] for part in tone_key.split("-")) if tone_key else ()
            table.append(
                Emoji(
                    key=variant["unified"],
                    base=base,
                    tones=tones,
                    category=entry["category"].lower(),
                    subcategory=entry["subcategory"],
                    keywords=keywords,
                    version=float(entry["added_in"]),
                    drawn=Image.open(io.BytesIO(pictures[variant["image"]])).convert("RGBA"),
                )
            )
    _name_twins(table)
    hold_out(table)
    return table


def _base_name(label: str) -> str:
    """Without what nobody would type: quotes, exclamation marks, "flag: " for "flag of "."""
    name = re.sub(r"^flag: ", "flag of ", label.replace("’", "'"), flags=re.IGNORECASE).lower()
    name = re.sub(r"^keycap: ", "keycap ", name)
    return " ".join(re.sub("[“”!?()]+", "", name.replace("&", "and")).split())


def _name_twins(table: list[Emoji]) -> None:
    """Some images are equal pixel by pixel, such as the flags of Norway and Svalbard: each has both names."""
    twins: dict[bytes, list[Emoji]] = defaultdict(list)
    for emoji in table:
        twins[emoji.picture.tobytes()].append(emoji)
    for same in twins.values():
        names = {emoji.name for emoji in same}
        for emoji in same:
            emoji.names = names
