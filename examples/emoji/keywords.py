"""What people call the emoji: keywords of public sources, which emoji they mean, and those kept for the test."""

import re
from collections import defaultdict
from pathlib import Path

from demonyms import DEMONYMS
from emoji_table import Emoji
from everyday import EVERYDAY
from packages import CLDR, EMOJIBASE, EMOJILIB, GEMOJI, code_points, read_gemoji, read_json, without_selectors


SHORTCODES = ("cldr", "emojibase", "github", "iamcal", "joypixels")
LOCALES = ("en", "en-001", "en-AU", "en-CA", "en-GB", "en-IN")
REGIONAL_A = 0x1F1E6
# How much a source's word says of what an emoji is: its name, a short name, one of its tags.
NAME, SHORT_NAME, TAG = 6.0, 2.0, 1.0
EVERYDAY_WEIGHTS = (40.0, 20.0, 10.0)  # more than what all sources together say


def plain(words: str) -> str:
    """Lower case, no punctuation but what is inside of words."""
    words = re.sub(r"[_\u00a0\u202f-]+", " ", words.lower().replace("’", "'"))
    return " ".join(re.sub(r"[“”\"!?,:;()|]+", " ", words).split())


class Keywords:
    """
    Args:
        table (`list[Emoji]`): All emoji.
        packages (`Path`): The folder of the npm packages.

    Attributes:
        of_emoji: Of each emoji without tones, by its key, its words with how much they say.
        emoji_of: Of each wording the keys of all emoji it may mean, the likeliest first, with how much it says.
        held_out: The same of the source that is not trained on: wording to keys.
    """

    def __init__(self, table: list[Emoji], packages: Path):
        self.order = {emoji.key: number for number, emoji in enumerate(table)}
        self._bases = {without_selectors(emoji.key): emoji for emoji in table if not emoji.tones}
        self.of_emoji: dict[str, dict[str, float]] = defaultdict(dict)
        for emoji in self._bases.values():
            self._add(emoji.key, emoji.base, NAME)
            for word in emoji.keywords:
                self._add(emoji.key, word, SHORT_NAME)
        self._read_emojibase(packages / EMOJIBASE)
        self._read_cldr(packages / CLDR)
        self._read_gemoji(packages / GEMOJI)
        self._add_demonyms()
        self._add_everyday()
        self.emoji_of: dict[str, dict[str, float]] = defaultdict(dict)
        for key, words in self.of_emoji.items():
            for word, weight in words.items():
                self.emoji_of[word][key] = weight
        self.held_out = self._read_emojilib(packages / EMOJILIB)

    def _add(self, code: str, word: str, weight: float) -> None:
        emoji, word = self._bases.get(without_selectors(code)), plain(word)
        if emoji is not None and word:
            own = self.of_emoji[emoji.key]
            own[word] = own.get(word, 0.0) + weight

    def _read_emojibase(self, archive: Path) -> None:
        entries, *shortcodes = read_json(
            archive, "en/data.json", *(f"en/shortcodes/{name}.json" for name in SHORTCODES)
        )
        for entry in entries:
            self._add(entry["hexcode"], entry["label"], NAME)
            for tag in entry.get("tags") or []:
                self._add(entry["hexcode"], tag, TAG)
        for names in shortcodes:
            for code, values in names.items():
                for value in [values] if isinstance(values, str) else values:
                    self._add(code, value, SHORT_NAME / len(SHORTCODES))

    def _read_cldr(self, archive: Path) -> None:
        for locale, content in zip(
            LOCALES, read_json(archive, *(f"annotations/{locale}/annotations.json" for locale in LOCALES)), strict=True
        ):
            for character, entry in content["annotations"]["annotations"].items():
                for word in entry.get("tts", []):
                    self._add(code_points(character), word, SHORT_NAME if locale == "en" else TAG)
                for word in entry.get("default", []):
                    self._add(code_points(character), word, TAG)

    def _read_gemoji(self, archive: Path) -> None:
        for entry in read_gemoji(archive):
            for word in (*entry["names"], entry["description"]):
                self._add(code_points(entry["emoji"]), word, SHORT_NAME)
            for word in entry["tags"]:
                self._add(code_points(entry["emoji"]), word, TAG)

    def _add_demonyms(self) -> None:
        """ "the French flag"; a flag's name without the word for it, "France", and its people, "French"."""
        for code, names in DEMONYMS.items():
            key = "-".join(f"{REGIONAL_A + ord(letter) - ord('a'):04X}" for letter in code)
            for name in names:
                self._add(key, f"{name} flag", SHORT_NAME)
                self._add(key, name, TAG)
        for emoji in self._bases.values():
            if emoji.subcategory in ("country-flag", "subdivision-flag"):
                country = emoji.base.removeprefix("flag of ")
                for wording in (f"{country} flag", country):
                    self._add(emoji.key, wording, SHORT_NAME)

    def _add_everyday(self) -> None:
        by_name = {emoji.base: emoji for emoji in self._bases.values()}
        for word, names in EVERYDAY.items():
            for name, weight in zip(names, EVERYDAY_WEIGHTS, strict=False):
                self._add(by_name[name].key, word, weight)

    def _read_emojilib(self, archive: Path) -> dict[str, set[str]]:
        words: dict[str, set[str]] = defaultdict(set)
        for character, names in read_json(archive, "dist/emoji-en-US.json")[0].items():
            emoji = self._bases.get(code_points(character))
            if emoji is None:
                continue
            for name in map(plain, names):
                if re.search("[a-z]", name):
                    words[name].add(emoji.key)
        return dict(words)

    def meant(self, *words: str) -> list[tuple[str, float]]:
        """
        The emoji that all these wordings together may mean, the likeliest first, with how likely each is: where one is
        called so and others only have to do with it, it is that one.
        """
        candidates = set.intersection(*(set(self.emoji_of.get(word, {})) for word in words))
        weights = {key: self._weight(key, words) for key in candidates}
        ordered = sorted(weights, key=lambda key: (-weights[key], self.order[key]))
        total = sum(weights.values())
        return [(key, weights[key] / total) for key in ordered]

    def _weight(self, key: str, words: tuple[str, ...]) -> float:
        emoji = self._bases[without_selectors(key)]
        weight = 1 / (1 + 0.1 * emoji.version)
        if emoji.base.startswith(("man ", "woman ", "men ", "women ", "person ", "family")):
            weight *= 0.6  # who wants a fire truck does not mean the fireman
        own = self.of_emoji[key]
        named = max(own, key=lambda word: own[word]).split()
        for word in words:
            weight *= self.emoji_of[word][key]
            parts = word.split()
            if named[-len(parts) :] == parts:  # "heart" of "red heart"
                weight *= 2.0
        return weight / len(named) ** 0.5
