"""Pictures of several emoji in their places, and what may be said and asked about them."""

import hashlib
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

from emoji_table import Emoji
from english import NUMBERS, counted, listed, with_article
from grounds import CELL, GROUNDS, on_ground
from PIL import Image


SHAPES = ((1, 2), (2, 1), (1, 3), (2, 2), (3, 3))
PLACES = {
    (1, 2): ("left", "right"),
    (2, 1): ("top", "bottom"),
    (1, 3): ("left", "middle", "right"),
    (2, 2): ("top left", "top right", "bottom left", "bottom right"),
    (3, 3): (
        "top left",
        "top middle",
        "top right",
        "middle left",
        "middle",
        "middle right",
        "bottom left",
        "bottom middle",
        "bottom right",
    ),
}
HELD_OUT_SHARE = 0.1
# What is easily named and told apart
CATEGORIES = ("animals & nature", "food & drink", "travel & places", "activities", "objects", "smileys & emotion")
MOST_WORDS = 3


@dataclass(frozen=True)
class Placed:
    """An emoji, by its key, as large as it stands in its place."""

    key: str
    size: str = "big"


@dataclass(frozen=True)
class Scene:
    """Places row by row, `None` where nothing is, and the ground of all."""

    shape: tuple[int, int]
    places: tuple[Placed | None, ...]
    ground: str = "white"

    @property
    def keys(self) -> list[str]:
        return [placed.key for placed in self.places if placed is not None]

    def placed_at(self, index: int) -> Placed:
        """Raises ValueError if nothing stands there."""
        placed = self.places[index]
        if placed is None:
            raise ValueError(f"`index`: nothing stands at {index}.")
        return placed

    def with_place(self, index: int, placed: Placed | None) -> "Scene":
        return replace(self, places=(*self.places[:index], placed, *self.places[index + 1 :]))


def drawn(scene: Scene, by_key: dict[str, Emoji]) -> Image.Image:
    rows, columns = scene.shape
    image = Image.new("RGB", (columns * CELL, rows * CELL), GROUNDS[scene.ground])
    for index, placed in enumerate(scene.places):
        if placed is not None:
            corner = index % columns * CELL, index // columns * CELL
            image.paste(on_ground(by_key[placed.key].drawn, scene.ground, placed.size), corner)
    return image


def may_stand_in_scenes(emoji: Emoji) -> bool:
    is_plain = not emoji.tones and emoji.category in CATEGORIES and len(emoji.base.split()) <= MOST_WORDS
    return is_plain and len(emoji.names) == 1 and ":" not in emoji.base and emoji.subcategory != "time"


def is_held_out(keys: list[str]) -> bool:
    """The rule: a tenth of all pairs, by the SHA-256 of their keys, never stand in one scene in training."""
    different = sorted(set(keys))
    pairs = [f"{one} {other}" for one in different for other in different if one < other]
    most = HELD_OUT_SHARE * 256
    return any(hashlib.sha256(pair.encode()).digest()[0] < most for pair in pairs)


class Scenes:
    """
    Args:
        table (`list[Emoji]`): All emoji.
        generator (`random.Random`): Draws what stands where.
    """

    def __init__(self, table: list[Emoji], generator: random.Random):
        self.by_key = {emoji.key: emoji for emoji in table}
        self.keys = [emoji.key for emoji in table if may_stand_in_scenes(emoji)]
        self.generator = generator

    def name(self, key: str) -> str:
        return self.by_key[key].base

    # Scenes

    def any_scene(self, held_out: bool = False, shape: tuple[int, int] | None = None) -> Scene:
        """Of a kind drawn at random, with a held-out pair or with none."""
        while True:
            scene = self._draw(shape or self.generator.choice(SHAPES))
            if is_held_out(scene.keys) == held_out:
                return scene

    def _draw(self, shape: tuple[int, int]) -> Scene:
        generator = self.generator
        number = shape[0] * shape[1]
        filled = number if number <= 3 else generator.choice((2, 3, 4, 4) if number == 4 else (1, 2, 3, 3, 4, 5))
        different = generator.sample(self.keys, min(filled, generator.choice((1, 2, 2, 3, 4))))
        keys = [*different, *generator.choices(different, k=filled - len(different))]
        places: list[Placed | None] = [None] * number
        for index, key in zip(generator.sample(range(number), filled), keys, strict=True):
            places[index] = Placed(key, "small" if generator.random() < 0.12 else "big")
        return Scene(shape, tuple(places), self._ground())

    def _ground(self) -> str:
        return "white" if self.generator.random() < 0.5 else self.generator.choice(list(GROUNDS))

    def in_order(self, keys: list[str], shape: tuple[int, int], ground: str = "white") -> Scene:
        """From the top left on, row by row."""
        empty = shape[0] * shape[1] - len(keys)
        return Scene(shape, (*(Placed(key) for key in keys), *[None] * empty), ground)

    def counting(self, held_out: bool = False) -> tuple[Scene, str]:
        """So many of one kind, or of two, in order; with its wish."""
        while True:
            shape = self.generator.choice(((1, 2), (1, 3), (2, 2), (3, 3)))
            most = shape[0] * shape[1]
            first, second = self.generator.sample(self.keys, 2)
            number = self.generator.randint(1 if most == 9 else 2, most)
            other = self.generator.randint(0, most - number) if self.generator.random() < 0.4 else 0
            scene = self.in_order([first] * number + [second] * other, shape, self._ground())
            if is_held_out(scene.keys) == held_out or (held_out and not other):
                break
        parts = [counted(number, self.name(first)), *([counted(other, self.name(second))] if other else [])]
        return scene, self._on(listed(parts), scene.ground)

    # What is said about them

    def _called(self, placed: Placed) -> str:
        name = self.name(placed.key)
        return with_article(f"small {name}" if placed.size == "small" else name)

    def _on(self, words: str, ground: str, is_plain: bool = False) -> str:
        if ground == "white" and (is_plain or self.generator.random() < 0.9):
            return words
        forms = ("{} on {}", "{} on a {} background", "{} on {} ground", "{} with a {} background")
        return (forms[0] if is_plain else self.generator.choice(forms)).format(words, ground)

    def described(self, scene: Scene) -> str:
        """The one description that answers use: "a cat left and a small dog right on blue"."""
        parts = [
            f"{self._called(placed)} {place}"
            for placed, place in zip(scene.places, PLACES[scene.shape], strict=True)
            if placed is not None
        ]
        return self._on(listed(parts), scene.ground, is_plain=True)

    def wish(self, scene: Scene) -> str:
        """Words from which the whole scene follows."""
        filled = [(placed, place) for placed, place in zip(scene.places, PLACES[scene.shape], strict=True) if placed]
        if scene.shape in ((1, 2), (2, 1)) and self.generator.random() < 0.8:
            return self._on(self._relation(scene), scene.ground)
        if scene.shape == (1, 3) and self.generator.random() < 0.5:
            names = [self._called(placed) for placed, _ in filled]
            return self._on(self.generator.choice((listed(names), f"{listed(names)} in a row")), scene.ground)
        if self.generator.random() < 0.3:
            self.generator.shuffle(filled)
        form = self.generator.choice(("{} {}", "{} in the {}", "{} on the {}", "{} at the {}"))
        if self.generator.random() < 0.3:
            parts = [f"{place} {self._called(placed)}" for placed, place in filled]
        else:
            parts = [form.format(self._called(placed), place) for placed, place in filled]
        return self._on(listed(parts), scene.ground)

    def _relation(self, scene: Scene) -> str:
        first, second = (self._called(placed) for placed in scene.places if placed is not None)
        forward: tuple[str, ...]
        backward: tuple[str, ...]
        if scene.shape == (1, 2):
            forward = ("{} left of {}", "{} to the left of {}", "{} and {}", "{} next to {}", "{} beside {}", "{}, {}")
            backward = ("{} right of {}", "{} to the right of {}")
        else:
            forward = ("{} above {}", "{} over {}", "{} on top of {}")
            backward = ("{} below {}", "{} under {}", "{} beneath {}")
        if self.generator.random() < 0.35:
            return self.generator.choice(backward).format(second, first)
        return self.generator.choice(forward).format(first, second)

    # Questions

    def questions(self, scene: Scene) -> tuple[str, str]:
        """A question and its answer."""
        kinds = [self.count, self._count_all, self.is_there, self.where, self._what_is_where, self._ground_of]
        return self.generator.choice(kinds)(scene)

    def count(self, scene: Scene) -> tuple[str, str]:
        counts = Counter(scene.keys)
        key = self._one_there_or_not(scene)
        name = counted(2, self.name(key)).removeprefix("two ")
        form = self.generator.choice(("how many {} are there?", "how many {} do you see?", "count the {}."))
        return form.format(name), NUMBERS[counts[key]] if counts[key] else "none"

    def _count_all(self, scene: Scene) -> tuple[str, str]:
        form = self.generator.choice(("how many emoji are there?", "how many things do you see?", "count the emoji."))
        return form, NUMBERS[len(scene.keys)]

    def is_there(self, scene: Scene) -> tuple[str, str]:
        key = self._one_there_or_not(scene)
        form = self.generator.choice(("is there {}?", "do you see {}?", "is there {} in the picture?"))
        return form.format(with_article(self.name(key))), "yes" if key in scene.keys else "no"

    def where(self, scene: Scene) -> tuple[str, str]:
        key = self._one_there_or_not(scene)
        places = [
            place
            for placed, place in zip(scene.places, PLACES[scene.shape], strict=True)
            if placed and placed.key == key
        ]
        return f"where is the {self.name(key)}?", listed(places) if places else "nowhere"

    def _what_is_where(self, scene: Scene) -> tuple[str, str]:
        index = self.generator.randrange(len(scene.places))
        placed, place = scene.places[index], PLACES[scene.shape][index]
        form = self.generator.choice(("what is {}?", "what is in the {}?", "what do you see {}?"))
        return form.format(place), "nothing" if placed is None else self._called(placed)

    def _ground_of(self, scene: Scene) -> tuple[str, str]:
        form = self.generator.choice(("what colour is the background?", "what color is the ground?"))
        return form, scene.ground

    def _one_there_or_not(self, scene: Scene) -> str:
        return self.generator.choice(scene.keys if self.generator.random() < 0.6 else self.keys)

    # Edits

    def edit(self, scene: Scene) -> tuple[str, Scene]:
        """An instruction and what becomes of the scene."""
        while True:
            made = self.generator.choice(
                (self._add, self._remove, self._move, self._replace, self._recolour, self._swap)
            )(scene)
            if made is not None:
                return made

    def looking_edits(self) -> Iterator[tuple[Scene, str, Scene]]:
        """Without end: a scene, an instruction for which something has to be found in it, and what becomes of it."""
        while True:
            made = self.generator.choice((self._replace, self._move, self._remove, self._swap))
            # Where there are few places more scenes fit into a row; nothing can move where none is free.
            source = self.any_scene(shape=self.generator.choice(SHAPES[-2:] if made == self._move else SHAPES[:-1]))
            edited = made(source)
            if edited is not None and not is_held_out(edited[1].keys):
                yield source, *edited

    def edits(self, held_out: bool = False) -> Iterator[tuple[Scene, str, Scene]]:
        """Without end: a scene, an instruction, and what becomes of it."""
        while True:
            source = self.any_scene()
            instruction, target = self.edit(source)
            if is_held_out(target.keys) == held_out:
                yield source, instruction, target

    def _only(self, scene: Scene) -> list[int]:
        """Where emoji stand that are there once: "the cat" is one."""
        counts = Counter(scene.keys)
        return [index for index, placed in enumerate(scene.places) if placed is not None and counts[placed.key] == 1]

    def _free(self, scene: Scene) -> list[int]:
        return [index for index, placed in enumerate(scene.places) if placed is None]

    def _add(self, scene: Scene) -> tuple[str, Scene] | None:
        if not (free := self._free(scene)):
            return None
        index, key = self.generator.choice(free), self.generator.choice(self.keys)
        form = self.generator.choice(("add {} {}", "put {} in the {}", "add {} in the {}", "draw {} {}"))
        words = form.format(with_article(self.name(key)), PLACES[scene.shape][index])
        return words, scene.with_place(index, Placed(key))

    def _remove(self, scene: Scene) -> tuple[str, Scene] | None:
        if len(scene.keys) < 2 or not (only := self._only(scene)):
            return None
        index = self.generator.choice(only)
        name, place = self.name(scene.placed_at(index).key), PLACES[scene.shape][index]
        forms = (f"remove the {name}", f"take away the {name}", f"delete the {name}", f"remove what is {place}")
        return self.generator.choice(forms), scene.with_place(index, None)

    def _move(self, scene: Scene) -> tuple[str, Scene] | None:
        only, free = self._only(scene), self._free(scene)
        if not only or not free:
            return None
        start, end = self.generator.choice(only), self.generator.choice(free)
        form = self.generator.choice(("move the {} to the {}", "put the {} {}", "the {} goes to the {}"))
        words = form.format(self.name(scene.placed_at(start).key), PLACES[scene.shape][end])
        return words, scene.with_place(end, scene.places[start]).with_place(start, None)

    def _replace(self, scene: Scene) -> tuple[str, Scene] | None:
        if not (only := self._only(scene)):
            return None
        index, key = self.generator.choice(only), self.generator.choice(self.keys)
        form = self.generator.choice(
            ("replace the {} with {}", "change the {} into {}", "turn the {} into {}", "make the {} {}")
        )
        words = form.format(self.name(scene.placed_at(index).key), with_article(self.name(key)))
        return words, scene.with_place(index, replace(scene.placed_at(index), key=key))

    def _recolour(self, scene: Scene) -> tuple[str, Scene] | None:
        ground = self.generator.choice([ground for ground in GROUNDS if ground != scene.ground])
        form = self.generator.choice(
            ("make the background {}", "on {}", "change the background to {}", "{} background")
        )
        return form.format(ground), replace(scene, ground=ground)

    def _swap(self, scene: Scene) -> tuple[str, Scene] | None:
        only = self._only(scene)
        if len(only) < 2:
            return None
        one, other = self.generator.sample(only, 2)
        first, second = scene.placed_at(one), scene.placed_at(other)
        words = f"swap the {self.name(first.key)} and the {self.name(second.key)}"
        return words, scene.with_place(one, second).with_place(other, first)
