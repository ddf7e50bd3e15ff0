"""Wishes that need a thought before they can be drawn: sums, and riddles whose answer must be known first."""

import hashlib
import random
from dataclasses import dataclass

from emoji_table import Emoji
from english import NUMBERS, counted
from scenes import Scene, Scenes


MOST = 9
SHAPE = (3, 3)  # of all sums: what is wished does not show in the size
HELD_OUT_SHARE = 0.2
# How many of them there are
FACTS = {
    "a triangle has sides": 3,
    "a square has corners": 4,
    "a pentagon has sides": 5,
    "a hexagon has sides": 6,
    "an octagon has sides": 8,
    "a dog has legs": 4,
    "a bird has legs": 2,
    "a spider has legs": 8,
    "an insect has legs": 6,
    "an octopus has arms": 8,
    "a starfish has arms": 5,
    "a car has wheels": 4,
    "a bicycle has wheels": 2,
    "a tricycle has wheels": 3,
    "a unicycle has wheels": 1,
    "a week has days": 7,
    "a weekend has days": 2,
    "a year has seasons": 4,
    "a hand has fingers": 5,
    "a face has eyes": 2,
    "a face has noses": 1,
    "a die has sides": 6,
    "a guitar has strings": 6,
    "a violin has strings": 4,
    "the rainbow has colours": 7,
    "a baseball team has players": 9,
    "the sun has planets": 8,
    "a cat has lives": 9,
    "a traffic light has lights": 3,
    "a coin has sides": 2,
}
SOUNDS = {
    "moo": "cow",
    "woof": "dog",
    "meow": "cat",
    "baa": "ewe",
    "oink": "pig",
    "quack": "duck",
    "cock-a-doodle-doo": "rooster",
    "roar": "lion",
    "hiss": "snake",
    "ribbit": "frog",
    "neigh": "horse",
    "hoot": "owl",
    "howl": "wolf",
    "squeak": "mouse",
    "tweet": "bird",
    "gobble": "turkey",
    "cheep": "baby chick",
    "buzz": "honeybee",
    "trumpet": "elephant",
    "ook": "monkey",
    "hee-haw": "donkey",
    "growl": "bear",
}
SOUND_WISHES = ("the animal that says {}", "an animal that says {}", "which animal says {}? draw it", "what says {}")


@dataclass(frozen=True)
class Riddle:
    """A wish, the thought that leads to what it asks for, and that: a scene, in which nothing else would be right."""

    wish: str
    thought: str
    scene: Scene


def is_held_out(words: str) -> bool:
    """The rule: a fifth of the sums, by the SHA-256 of their words without what is counted, is never trained on."""
    return hashlib.sha256(words.encode()).digest()[0] < HELD_OUT_SHARE * 256


class Riddles:
    """
    Args:
        table (`list[Emoji]`): All emoji.
        scenes ([`Scenes`]): What may be counted.
        generator (`random.Random`): Draws them.
    """

    def __init__(self, table: list[Emoji], scenes: Scenes, generator: random.Random):
        self.scenes, self.generator = scenes, generator
        self.key_of = {emoji.base: emoji.key for emoji in table if not emoji.tones}

    def any_riddle(self, held_out: bool = False) -> Riddle:
        while True:
            kind = self.generator.choice((self._sum, self._sum, self._fact_sum, self._fact_sum))
            words, thought, result = kind()
            if is_held_out(words) == held_out:
                key = self.generator.choice(self.scenes.keys)
                name = self.scenes.name(key)
                things = counted(2, name).removeprefix("two ")
                scene = self.scenes.in_order([key] * result, SHAPE)
                return Riddle(words.format(things), f"{thought} so {counted(result, name)}.", scene)

    def sounds(self) -> list[Riddle]:
        """Who says what: all of them, each in a wording."""
        return [self.sound(sound, form) for sound in SOUNDS for form in SOUND_WISHES]

    def sound(self, sound: str, form: str) -> Riddle:
        animal = SOUNDS[sound]
        name = animal if animal in self.key_of else f"{animal} face"
        scene = self.scenes.in_order([self.key_of[name]], (1, 1))
        return Riddle(form.format(sound), f"the {animal} says {sound}. so {name}.", scene)

    def _sum(self) -> tuple[str, str, int]:
        """Three numbers, plus and minus: "two plus three minus one {}"."""
        total = self.generator.randint(1, MOST)
        words, thoughts = NUMBERS[total], []
        for _ in range(2):
            change = self.generator.choice([n for n in range(-total + 1, MOST - total + 1) if n != 0])
            sign = "plus" if change > 0 else "minus"
            words += f" {sign} {NUMBERS[abs(change)]}"
            thoughts.append(f"{NUMBERS[total]} {sign} {NUMBERS[abs(change)]} is {NUMBERS[total + change]}.")
            total += change
        return words + " {}", " ".join(thoughts), total

    def _fact_sum(self) -> tuple[str, str, int]:
        """ "as many {} as a triangle has sides and one more"."""
        fact, number = self.generator.choice(list(FACTS.items()))
        change = self.generator.choice([n for n in range(1 - number, MOST - number + 1) if abs(n) <= 3])
        thought = f"{fact.replace(' has ', f' has {NUMBERS[number]} ')}."
        if change == 0:
            return f"as many {{}} as {fact}", thought, number
        sign, comparative = ("plus", "more") if change > 0 else ("minus", "fewer")
        thought += f" {NUMBERS[number]} {sign} {NUMBERS[abs(change)]} is {NUMBERS[number + change]}."
        return f"{NUMBERS[abs(change)]} {comparative} {{}} than {fact}", thought, number + change
