"""
The image codes of the emoji: 12 of what is drawn, which all its variants share, and one each of two skin tones, of the
ground and of the size. A scene is those of its places, side by side.
"""

import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from emoji_table import TONES, Emoji
from grounds import GROUNDS, SIZES
from scenes import Placed, Scene


SIDE = 4  # codes of a place, down and across
NUM_STYLES = 4
NOTHING = "nothing"
Codes = dict[str, list[int]]


def styles_of(tones: tuple[str, ...], ground: str, size: str) -> list[str]:
    return [*(*tones, "none", "none")[:2], ground, size]


class EmojiCodes:
    """
    Args:
        contents: Of each base name, and of `NOTHING`, its codes.
        styles: Of each style code the code of each of its values.
        table (`list[Emoji]`): All emoji.
    """

    def __init__(self, contents: dict[str, list[int]], styles: list[dict[str, int]], table: list[Emoji]):
        self.contents, self.styles = contents, styles
        self.by_key = {emoji.key: emoji for emoji in table}
        of_styles = (code for codes in styles for code in codes.values())
        self.known = sorted({*of_styles, *(code for codes in contents.values() for code in codes)})

    def of(self, key: str, ground: str = "white", size: str = "big") -> Codes:
        """The `grid` and `codes` of an emoji alone."""
        return {"grid": [SIDE, SIDE], "codes": self._place(Placed(key, size), ground)}

    def of_nothing(self, ground: str) -> Codes:
        return {"grid": [SIDE, SIDE], "codes": self._place(None, ground)}

    def of_scene(self, scene: Scene) -> Codes:
        rows, columns = scene.shape
        places = torch.tensor([self._place(placed, scene.ground) for placed in scene.places])
        by_line = places.view(rows, columns, SIDE, SIDE).transpose(1, 2)
        return {"grid": [rows * SIDE, columns * SIDE], "codes": by_line.flatten().tolist()}

    def _place(self, placed: Placed | None, ground: str) -> list[int]:
        tones: tuple[str, ...] = ()
        content, size = NOTHING, "big"
        if placed is not None:
            emoji, size = self.by_key[placed.key], placed.size
            tones, content = emoji.tones, emoji.base
        names = styles_of(tones, ground, size)
        return [codes[name] for codes, name in zip(self.styles, names, strict=True)] + self.contents[content]

    def save(self, file: Path) -> None:
        file.write_text(json.dumps({"contents": self.contents, "styles": self.styles}), encoding="utf-8")

    @classmethod
    def without_codes(cls, table: list[Emoji]) -> "EmojiCodes":
        """All zero: for rows of which only words are wanted."""
        names = [{emoji.base for emoji in table}, {"none", *TONES.values()}, {"none", *TONES.values()}, GROUNDS, SIZES]
        contents, *styles = (dict.fromkeys(of, 0) for of in names)
        nothing = [0] * (SIDE**2 - NUM_STYLES)
        return cls(dict.fromkeys([*contents, NOTHING], nothing), styles, table)

    @classmethod
    def load(cls, file: Path, table: list[Emoji]) -> "EmojiCodes":
        return cls(**json.loads(file.read_text(encoding="utf-8")), table=table)

    @classmethod
    def settle(cls, rows: list[dict[str, Any]], codebook: torch.Tensor, table: list[Emoji]) -> "EmojiCodes":
        """
        What a trained tokenizer gives to most variants, where two would have the same codes with the nearest other
        code in a place.

        Args:
            rows: The `content`, `style` and `codes` of images.
            codebook: `(codes, width)`.
            table: All emoji.
        """
        votes: dict[Any, list[Counter[int]]] = defaultdict(lambda: [Counter() for _ in range(SIDE**2 - NUM_STYLES)])
        style_votes: list[dict[str, Counter[int]]] = [defaultdict(Counter) for _ in range(NUM_STYLES)]
        for row in rows:
            for number, (name, code) in enumerate(zip(row["style"], row["codes"], strict=False)):
                style_votes[number][name][code] += 1
            for of_place, code in zip(votes[row["content"]], row["codes"][NUM_STYLES:], strict=True):
                of_place[code] += 1
        directions = F.normalize(codebook.float(), dim=-1)
        neighbours = (directions @ directions.T).argsort(dim=-1, descending=True).tolist()
        styles = [
            _distinct({name: count.most_common(1)[0][0] for name, count in of.items()}, neighbours)
            for of in style_votes
        ]
        twins = {emoji.base: min(emoji.names) for emoji in table if not emoji.tones}
        contents: dict[str, list[int]] = {}
        taken: dict[tuple[int, ...], str] = {}
        for content, counts in votes.items():
            codes = [count.most_common(1)[0][0] for count in counts]
            who = twins.get(content, content)
            attempt = 0
            while taken.get(tuple(codes), who) != who:  # another one's
                place, rank = attempt % len(codes), 1 + attempt // len(codes)
                codes = [count.most_common(1)[0][0] for count in counts]
                codes[place] = neighbours[codes[place]][rank]
                attempt += 1
            taken[tuple(codes)], contents[content] = who, codes
        return cls(contents, styles, table)


def _distinct(codes: dict[str, int], neighbours: list[list[int]]) -> dict[str, int]:
    """Each name with a code of its own: where two have the same, the later gets the nearest that is free."""
    free: dict[str, int] = {}
    for name, code in codes.items():
        free[name] = next(other for other in neighbours[code] if other not in free.values())
    return free
