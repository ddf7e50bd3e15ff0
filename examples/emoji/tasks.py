"""Edits from one emoji to another, stories of several, and thoughts about one."""

import random
from collections.abc import Iterator
from dataclasses import dataclass

from emoji_table import HAIR, HOURS, MOON_PHASES, Emoji


TONING = ("change the skin tone to {}", "make the skin {}", "{} skin tone", "give it {} skin", "with {} skin")
UNTONING = ("remove the skin tone", "make the skin yellow", "no skin tone")
CHANGING = ("make it a {}", "change it to a {}", "turn it into a {}", "a {} instead")
SETTING_CLOCK = ("set the clock to {}", "make it {}", "change the time to {}", "{} instead")
SETTING_MOON = ("make it a {}", "change it to the {}", "show the {}")
CHANGING_FLAG = ("change it to the {}", "make it the {}", "turn it into the {}", "the {} instead")
COLOURING = (
    "make it {}",
    "change the colour to {}",
    "paint it {}",
    "in {}",
    "a {} one",
    "change it to {}",
    "{} please",
)
COLOURS = (
    "red",
    "orange",
    "yellow",
    "green",
    "blue",
    "purple",
    "brown",
    "black",
    "white",
    "pink",
    "grey",
    "light blue",
)


@dataclass(frozen=True)
class Edit:
    """A pair of images, by their keys, and what may be said to get from one to the other."""

    source: str
    target: str
    instructions: tuple[str, ...]
    kind: str


@dataclass(frozen=True)
class Story:
    """A wish, and the sentences and images that answer it, in order: each sentence stands before its image."""

    wish: str
    parts: tuple[tuple[str, str], ...]


def shown_to_adapter(trained: list[Emoji]) -> list[Emoji]:
    """Every third: what the adapter learns from them it shall do for the others."""
    return trained[::3]


def filled(templates: tuple[str, ...], *words: str) -> tuple[str, ...]:
    return tuple(template.format(*words) for template in templates)


class EmojiTasks:
    """
    All tasks on a set of emoji; what touches a held-out one is there for evaluation only.

    Args:
        table (`list[Emoji]`): All emoji.
    """

    def __init__(self, table: list[Emoji]):
        self.table = table
        self.by_key = {emoji.key: emoji for emoji in table}
        self.by_base: dict[str, dict[tuple[str, ...], Emoji]] = {}
        for emoji in table:
            self.by_base.setdefault(emoji.base, {})[emoji.tones] = emoji

    # Edits

    def edits(self) -> list[Edit]:
        """Every pair, those whose source is held out left out: an image nobody has seen is hard enough as target."""
        pairs = [*self._tones(), *self._people(), *self._clocks(), *self._moons(), *self._flags(), *self._colours()]
        return [edit for edit in pairs if not self.by_key[edit.source].is_held_out]

    def _tones(self) -> Iterator[Edit]:
        for variants in self.by_base.values():
            for source in variants.values():
                for target in variants.values():
                    if source is target or len(target.tones) > 1:
                        continue
                    templates = TONING if target.tones else UNTONING
                    yield Edit(source.key, target.key, filled(templates, *target.tones), "skin tone")

    def _people(self) -> Iterator[Edit]:
        """Gender and hair, the tone kept."""
        for base, variants in self.by_base.items():
            others: list[tuple[str, tuple[str, ...], str, str]] = []
            for old, new in (("woman", "man"), ("man", "woman"), ("person", "woman"), ("person", "man")):
                words = base.split(" ")
                if words[0].rstrip(":") == old:
                    other = " ".join([words[0].replace(old, new), *words[1:]])
                    others.append((other, CHANGING, new, "gender"))
            for hair in HAIR:
                person, _, own_hair = base.partition(": ")
                if person in ("man", "woman", "person") and own_hair in ("", *HAIR) and own_hair != hair:
                    others.append((f"{person}: {hair}", ("give it {}", "change it to {}"), hair, "hair"))
            for other, templates, word, kind in others:
                for tones, source in variants.items():
                    target = self.by_base.get(other, {}).get(tones)
                    if target is not None and target.key != source.key:
                        yield Edit(source.key, target.key, filled(templates, word), kind)

    def _clocks(self) -> Iterator[Edit]:
        times = [f"{hour} o'clock" for hour in HOURS] + [f"{hour}-thirty" for hour in HOURS]
        yield from self._among(times, SETTING_CLOCK, "clock")

    def _moons(self) -> Iterator[Edit]:
        yield from self._among(MOON_PHASES, SETTING_MOON, "moon")

    def _flags(self) -> Iterator[Edit]:
        flags = [emoji.base for emoji in self.table if emoji.subcategory == "country-flag"]
        # Each flag with a few others: all pairs would drown the rest.
        for number, flag in enumerate(flags):
            for step in (1, 7, 31, 97):
                other = flags[(number + step) % len(flags)]
                yield from self._among([flag, other], CHANGING_FLAG, "flag", only_first=True)

    def _colours(self) -> Iterator[Edit]:
        """Hearts, circles, books: emoji that differ in the name of a colour alone."""
        for base, variants in self.by_base.items():
            for old in COLOURS:
                for new in COLOURS:
                    words = f" {base} "
                    other = words.replace(f" {old} ", f" {new} ").strip()
                    if old != new and other != base and other in self.by_base:
                        target = self.by_base[other][()].key
                        yield Edit(variants[()].key, target, filled(COLOURING, new), "colour")

    def _among(
        self, bases: list[str] | tuple[str, ...], templates: tuple[str, ...], kind: str, only_first: bool = False
    ) -> Iterator[Edit]:
        for source in bases[:1] if only_first else bases:
            for target in bases:
                if source != target:
                    first, second = self.by_base[source][()], self.by_base[target][()]
                    yield Edit(first.key, second.key, filled(templates, target), kind)

    # Stories

    def stories(self) -> list[Story]:
        return [*self._moon_stories(), *self._clock_stories(), *self._group_stories()]

    def _story(self, wish: str, sentence: str, bases: list[str]) -> Story:
        return Story(wish, tuple((sentence.format(base), self.by_base[base][()].key) for base in bases))

    def _moon_stories(self) -> Iterator[Story]:
        for first in range(len(MOON_PHASES)):
            for count in (2, 3, 4):
                phases = [MOON_PHASES[(first + step) % len(MOON_PHASES)] for step in range(count)]
                wish = f"a story of {count} moon phases from the {phases[0]}"
                yield self._story(wish, "then comes the {}.", phases)

    def _clock_stories(self) -> Iterator[Story]:
        for first in range(len(HOURS)):
            for count in (2, 3, 4):
                hours = [f"{HOURS[(first + step) % len(HOURS)]} o'clock" for step in range(count)]
                yield self._story(f"a story of {count} hours from {hours[0]}", "it is {}.", hours)

    def _group_stories(self) -> Iterator[Story]:
        """Neighbours in Unicode's order: animals, fruit, vehicles."""
        groups = {
            "animal-mammal": "mammals",
            "animal-bird": "birds",
            "animal-marine": "sea animals",
            "food-fruit": "fruits",
            "transport-ground": "vehicles",
        }
        for subcategory, plural in groups.items():
            bases = [emoji.base for emoji in self.table if emoji.subcategory == subcategory]
            for first in range(len(bases) - 2):
                wish = f"a story of 3 {plural} from {bases[first]}"
                yield self._story(wish, "here is {}.", bases[first : first + 3])

    # Thoughts

    def thought(self, emoji: Emoji, generator: random.Random) -> tuple[str, str]:
        """A wish that needs a thought before it can be drawn, and the thought, which ends in the subject."""
        if emoji.keywords and generator.random() < 0.5:
            keyword = generator.choice(emoji.keywords)
            return f"what people call {keyword}", f"{keyword} is another word for {emoji.name}."
        neighbours = [other for other in self.table if other.subcategory == emoji.subcategory and not other.tones]
        place = next((n for n, other in enumerate(neighbours) if other.base == emoji.base), 0)
        before = neighbours[place - 1]
        return f"the emoji after {before.base}", f"after {before.base} comes {emoji.base}."
