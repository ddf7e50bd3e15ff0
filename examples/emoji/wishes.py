"""What people type to have one emoji drawn: wordings around keywords, colours, tones, grounds and sizes."""

import random
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeVar

from colours import CLEAR, OTHER, shares_of_colours
from emoji_table import Emoji
from english import misspelt, plural, with_article
from grounds import GROUNDS, SIZES
from keywords import Keywords


Choice = TypeVar("Choice")

BEFORE = (
    "draw {}",
    "draw me {}",
    "please draw {}",
    "can you draw {}",
    "could you draw me {}",
    "i want {}",
    "i'd like {}",
    "i would like to see {}",
    "show me {}",
    "show {}",
    "give me {}",
    "make {}",
    "make me {}",
    "create {}",
    "generate {}",
    "paint {}",
    "a picture of {}",
    "picture of {}",
    "an image of {}",
    "a drawing of {}",
    "draw a picture of {}",
    "make an image of {}",
    "show me a picture of {}",
    "an emoji of {}",
    "the emoji for {}",
    "emoji: {}",
    "{} please",
    "{}, please",
    "{} emoji",
    "the {} emoji",
    "an icon of {}",
    "i need {}",
    "let me see {}",
    "now {}",
    "just {}",
)
# Sentences that are never trained on: their words are known from others, they themselves are not.
HELD_OUT_BEFORE = ("please show me a drawing of {}", "i want a picture of {} please")
POLITELY = ("please {}", "{} please", "can you {}?", "now {}", "could you {}", "i want you to {}")
AFTER = ("{}!", "{}.", "{}?", "{} :)", "{}...")
# Words that say nothing of which emoji is meant.
VAIN = (
    "cute",
    "nice",
    "beautiful",
    "lovely",
    "pretty",
    "cool",
    "simple",
    "funny",
    "little",
    "sweet",
    "really nice",
    "perfect",
)
# Two keywords of one emoji in one wish
JOINED = (
    "{a} {b}",
    "{b} {a}",
    "{a} with {b}",
    "{b} with {a}",
    "{a} and {b}",
    "{a} in {b}",
    "{a} of {b}",
    "{a} for {b}",
    "{a} at {b}",
    "{a} from {b}",
    "{a} in the {b}",
    "a {a} for a {b}",
    "a {a} of {b}",
    "a {a} {b}",
)
TONED = ("{} with {} skin", "{}, {} skin tone", "{}: {} skin tone", "{} skin tone {}", "{}-skinned {}")
PLACED = ("{} on {ground}", "{} on a {ground} background", "{} on {ground} ground", "{} with a {ground} background")
SIZED = {"small": ("small", "tiny", "little"), "big": ("big", "large", "huge")}
# How often a wish for what may mean several emoji is answered by each of them: mostly by the likeliest, so that the
# most probable codes are all of one image.
RANKS = (0.75, 0.17, 0.08)


@dataclass(frozen=True)
class Wish:
    """A wording and what it asks for: an emoji by its key, a ground, a size."""

    words: str
    key: str
    ground: str = "white"
    size: str = "big"


class Wishes:
    """
    Args:
        table (`list[Emoji]`): All emoji.
        keywords ([`Keywords`]): Of all emoji; what it holds out is never used.
        generator (`random.Random`): Draws the wordings.
    """

    def __init__(self, table: list[Emoji], keywords: Keywords, generator: random.Random):
        self.keywords, self.generator = keywords, generator
        self.by_key = {emoji.key: emoji for emoji in table}
        self.variants: dict[str, list[Emoji]] = {}
        for emoji in table:
            self.variants.setdefault(emoji.base, []).append(emoji)
        self.colours = {key: shares_of_colours(self.by_key[key]) for key in keywords.of_emoji}
        self._words = {key: _by_weight(words.items()) for key, words in keywords.of_emoji.items()}

    # One wish

    def for_emoji(self, emoji: Emoji) -> Wish:
        """A wish which means this emoji, or whichever is likelier to be meant by the same words."""
        kind = self.generator.random()
        key = self._key_of_base(emoji)
        if kind < 0.35:
            words, means = emoji.base, emoji.base
        elif kind < 0.65 or emoji.tones:
            word = self._word(key)
            words = means = _other_form(word, self.generator) if self._by_chance(0.1) else word
            key = self._meant(word)
        elif kind < 0.85:
            words, key = self._two_words(key)
            means = words
        else:
            words, key = self._coloured(key)
            means = words
        target = self.by_key[key]
        if emoji.tones and key == self._key_of_base(emoji):
            target, words = emoji, self._toned(means, emoji.tones)
        return self.dressed(words, target)

    def by_name(self, emoji: Emoji) -> Wish:
        """Its own name, with the tone: no other is meant."""
        return self.dressed(self._toned(emoji.base, emoji.tones) if emoji.tones else emoji.base, emoji)

    def for_wording(self, word: str) -> Wish:
        """What an emoji is called, half of the time alone, now and then as others write it."""
        emoji = self.by_key[self.keywords.meant(word)[0][0]]
        if self._by_chance(0.2):
            word = _otherwise(word, self.generator)
        return self.dressed(word, emoji) if self._by_chance(0.5) else Wish(word, emoji.key)

    def dressed(self, words: str, emoji: Emoji) -> Wish:
        """With a ground or a size, an article, and a sentence around it."""
        ground = size = None
        if self._by_chance(0.12):
            size = self._one_of(SIZES)
            words = f"{self._one_of(SIZED[size])} {words}"
        elif self._by_chance(0.15):
            words = f"{self._one_of(VAIN)} {words}"
        if self._by_chance(0.12):
            words = plural(words)
        elif self._by_chance(0.5):
            words = with_article(words) if self._by_chance(0.8) else f"the {words}"
        if self._by_chance(0.12):
            ground = self._one_of(GROUNDS)
            words = self._one_of(PLACED).format(words, ground=ground)
        return Wish(self.wrapped(words), emoji.key, ground or "white", size or "big")

    def wrapped(self, words: str) -> str:
        """In a sentence, with a sign at the end, now and then misspelt."""
        if self._by_chance(0.03):
            words = misspelt(words, self.generator)
        if self._by_chance(0.45):
            words = self._one_of(BEFORE).format(words)
        if self._by_chance(0.1):
            words = self._one_of(AFTER).format(words)
        return words

    def politely(self, words: str) -> str:
        """What is to be done with an image, now and then misspelt or with some words around it."""
        if self._by_chance(0.03):
            words = misspelt(words, self.generator)
        if self._by_chance(0.2):
            words = self._one_of(POLITELY).format(words)
        return self._one_of(AFTER[:2]).format(words) if self._by_chance(0.08) else words

    # What it is about

    def _key_of_base(self, emoji: Emoji) -> str:
        return self.variants[emoji.base][0].key

    def _word(self, key: str) -> str:
        words, weights = self._words[key]
        return self.generator.choices(words, weights)[0]

    def _meant(self, *words: str) -> str:
        candidates = self.keywords.meant(*words)[: len(RANKS)]
        return self.generator.choices([key for key, _ in candidates], RANKS[: len(candidates)])[0]

    def _two_words(self, key: str) -> tuple[str, str]:
        words = [word for word in self._words[key][0] if " " not in word]
        if len(words) < 2:
            return self.by_key[key].base, key
        first, second = self.generator.sample(words, 2)
        return self._one_of(JOINED).format(a=first, b=second), self._meant(first, second)

    def _coloured(self, key: str) -> tuple[str, str]:
        """A colour it has, and a word: of all that are called so the one which has most of that colour."""
        colours = [colour for colour, share in self.colours[key].items() if share > OTHER]
        word = self._word(key)
        if not colours or word.startswith(tuple(self.colours[key])):
            return self.by_key[key].base, key
        colour = self._one_of(colours)
        fitting = [
            (likely * min(self.colours[other].get(colour, 0.0), CLEAR), other)
            for other, likely in self.keywords.meant(word)
        ]
        return f"{colour} {word}", max(fitting, key=lambda pair: (pair[0], -self.keywords.order[pair[1]]))[1]

    def _toned(self, words: str, tones: tuple[str, ...]) -> str:
        skins = " and ".join(tones)
        template = self._one_of(TONED)
        return (
            template.format(skins, words)
            if template.startswith("{}-") or template.endswith("{}")
            else template.format(words, skins)
        )

    # Chance

    def _by_chance(self, share: float) -> bool:
        return self.generator.random() < share

    def _one_of(self, choices: Iterable[Choice]) -> Choice:
        return self.generator.choice(list(choices))


def _by_weight(words: Iterable[tuple[str, float]]) -> tuple[list[str], list[float]]:
    ordered = sorted(words)
    return [word for word, _ in ordered], [weight**0.5 for _, weight in ordered]


def _otherwise(word: str, generator: random.Random) -> str:
    """Another form of it, its plural, without its apostrophe, in one word."""
    forms = [_other_form(word, generator), plural(word), word.replace("'", " "), word.replace(" ", "")]
    return generator.choice([form for form in forms if form != word] or [word])


def _other_form(word: str, generator: random.Random) -> str:
    """A word as other sentences have it: "smiling" of "smile", "rainy" of "rain"."""
    if " " in word or len(word) < 4 or not word.isalpha():
        return word
    for ending in ("ing", "ed", "ies", "es", "s", "er", "ly", "y", "e"):
        if word.endswith(ending) and len(word) - len(ending) >= 3:
            word = word.removesuffix(ending)
            break
    return word + generator.choice(("", "s", "ing", "ed", "y", "e", "er"))
