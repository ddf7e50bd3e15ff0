"""Questions about one emoji, about two, and about nothing that it knows; each with its answer."""

import random

from colours import clear_colour, shares_of_colours
from emoji_table import Emoji
from english import with_article
from grounds import GROUNDS
from keywords import Keywords


NAMING = (
    "what is this?",
    "what do you see?",
    "name this emoji.",
    "which emoji is this?",
    "what is in the picture?",
    "what's this?",
    "what is it?",
    "what does this show?",
    "what is shown here?",
    "can you name it?",
    "tell me what this is.",
    "what am i looking at?",
)
DESCRIBING = (
    "describe the picture.",
    "describe this.",
    "describe the image.",
    "caption this.",
    "what is in the image?",
    "describe what you see.",
)
CATEGORY = (
    "which category is it?",
    "what kind of emoji is this?",
    "what category is this?",
    "what kind of thing is it?",
)
COLOUR = ("what colour is it?", "which colour is it?", "what color is this?", "what is its colour?")
IS_IT = (
    "is it {}?",
    "is this {}?",
    "is that {}?",
    "do you see {}?",
    "is there {}?",
    "is there {} in the picture?",
    "does it show {}?",
)
SAME = ("are they the same?", "are these the same?", "do both show the same?", "is it the same in both?")
WHICH = ("which one is {}?", "which of them is {}?", "which picture shows {}?")
# What a set of emoji is
KINDS = {
    "an animal": (
        "animal-mammal",
        "animal-bird",
        "animal-amphibian",
        "animal-reptile",
        "animal-marine",
        "animal-bug",
        "cat-face",
        "monkey-face",
    ),
    "a bird": ("animal-bird",),
    "an insect": ("animal-bug",),
    "a plant": ("plant-flower", "plant-other"),
    "a flower": ("plant-flower",),
    "food": ("food-fruit", "food-vegetable", "food-prepared", "food-asian", "food-sweet"),
    "a fruit": ("food-fruit",),
    "a vegetable": ("food-vegetable",),
    "a drink": ("drink",),
    "a flag": ("flag", "country-flag", "subdivision-flag"),
    "a heart": ("heart",),
    "a face": (
        "face-smiling",
        "face-affection",
        "face-tongue",
        "face-hand",
        "face-neutral-skeptical",
        "face-sleepy",
        "face-unwell",
        "face-hat",
        "face-glasses",
        "face-concerned",
        "face-negative",
        "face-costume",
        "cat-face",
        "monkey-face",
    ),
    "a hand": (
        "hand-fingers-open",
        "hand-fingers-partial",
        "hand-single-finger",
        "hand-fingers-closed",
        "hands",
        "hand-prop",
    ),
    "a person": (
        "person",
        "person-gesture",
        "person-role",
        "person-fantasy",
        "person-activity",
        "person-sport",
        "person-resting",
    ),
    "a family": ("family",),
    "a vehicle": ("transport-ground", "transport-water", "transport-air"),
    "a building": ("place-building", "place-religious"),
    "a clock": ("time",),
    "clothing": ("clothing",),
    "a musical instrument": ("musical-instrument",),
    "a tool": ("tool",),
    "an arrow": ("arrow",),
    "a zodiac sign": ("zodiac",),
    "sport": ("sport", "person-sport"),
    "a sign": ("transport-sign", "warning", "av-symbol", "alphanum", "keycap", "geometric"),
}
UNKNOWN_ANSWER = "i only know emoji."
UNKNOWN_ABOUT_IMAGE = (
    "who painted this?",
    "where was this taken?",
    "when was this drawn?",
    "how much does it cost?",
    "who is this?",
    "what is the meaning of it all?",
    "what happens next?",
    "how old is it?",
    "what does it think?",
    "is it art?",
)
UNKNOWN = (
    "who are you?",
    "what is your name?",
    "what is the capital of france?",
    "tell me a joke.",
    "how are you?",
    "write a poem.",
    "what time is it?",
    "what is two plus two?",
    "who is the president?",
    "what is the weather like?",
    "translate this into french.",
    "write some code.",
    "what is love?",
    "can you help me?",
    "why is the sky blue?",
    "how does it work?",
    "what can you do?",
    "hello",
    "hi",
    "good morning",
    "thank you",
    "sing a song.",
    "how far is the moon?",
    "who wrote hamlet?",
)


class Questions:
    """
    Args:
        table (`list[Emoji]`): All emoji.
        keywords ([`Keywords`]): Of all emoji: what one is not called is not said of it.
        generator (`random.Random`): Draws questions.
    """

    def __init__(self, table: list[Emoji], keywords: Keywords, generator: random.Random):
        self.table, self.keywords, self.generator = table, keywords, generator
        self.colours = {emoji.key: clear_colour(emoji) for emoji in table}
        self.shares = {emoji.key: shares_of_colours(emoji) for emoji in table if not emoji.tones}
        self.key_of_base = {emoji.base: emoji.key for emoji in table if not emoji.tones}
        self.words = {key: {word for word in words if len(word) > 2} for key, words in keywords.of_emoji.items()}

    def about(self, emoji: Emoji) -> tuple[str, str]:
        """Any question about an emoji but its name."""
        kinds = [self.category, self.is_of_kind, self.is_called, self.is_coloured, self.unknown]
        if self.colours[emoji.key] is not None:
            kinds.append(self.colour)
        return self.generator.choice(kinds)(emoji)

    def category(self, emoji: Emoji) -> tuple[str, str]:
        return self.generator.choice(CATEGORY), emoji.category

    def colour(self, emoji: Emoji) -> tuple[str, str]:
        """Of an emoji that has a clear one; raises ValueError if it has none."""
        colour = self.colours[emoji.key]
        if colour is None:
            raise ValueError(f"`emoji`: {emoji.name} has no clear colour.")
        return self.generator.choice(COLOUR), colour

    def is_of_kind(self, emoji: Emoji) -> tuple[str, str]:
        own = [kind for kind, members in KINDS.items() if emoji.subcategory in members]
        kind = self.generator.choice(own if own and self.generator.random() < 0.5 else list(KINDS))
        return self._is_it(kind, emoji.subcategory in KINDS[kind])

    def is_called(self, emoji: Emoji) -> tuple[str, str]:
        """Its name, or that of another, which none of its own words is."""
        own = {emoji.base, *self.words[self.key_of_base[emoji.base]]}
        if self.generator.random() < 0.5:
            return self._is_it(with_article(emoji.base), True)
        while True:
            other = self.generator.choice(self.table)
            if other.base not in own and not (other.names & emoji.names):
                return self._is_it(with_article(other.base), False)

    def is_coloured(self, emoji: Emoji) -> tuple[str, str]:
        """Only colours that it clearly has, or has not at all, are asked for."""
        shares = self.shares[self.key_of_base[emoji.base]]
        colour = self.colours[emoji.key]
        if colour is not None and self.generator.random() < 0.5:
            return self._is_it(colour, True)
        absent = [name for name in GROUNDS if shares.get(name, 0.0) < 0.02 and name != colour and not emoji.tones]
        return self._is_it(self.generator.choice(absent), False) if absent else self.category(emoji)

    def unknown(self, emoji: Emoji | None = None) -> tuple[str, str]:
        return self.generator.choice(UNKNOWN if emoji is None else UNKNOWN_ABOUT_IMAGE), UNKNOWN_ANSWER

    def compare(self, first: Emoji, second: Emoji) -> tuple[str, str]:
        """About two images."""
        is_same = first.key == second.key or bool(first.names & second.names)
        kinds = [
            kind
            for kind, members in KINDS.items()
            if (first.subcategory in members) != (second.subcategory in members)
        ]
        if is_same or not kinds or self.generator.random() < 0.5:
            return self.generator.choice(SAME), "yes" if is_same else "no"
        kind = self.generator.choice(kinds)
        answer = "the first" if first.subcategory in KINDS[kind] else "the second"
        return self.generator.choice(WHICH).format(kind), answer

    def _is_it(self, thing: str, is_so: bool) -> tuple[str, str]:
        return self.generator.choice(IS_IT if thing.split()[0] not in GROUNDS else IS_IT[:3]).format(
            thing
        ), "yes" if is_so else "no"
