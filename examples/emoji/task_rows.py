"""Every task as rows of `docs/training.md`'s formats, on images that may be trained on."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from emoji_codes import EmojiCodes
from emoji_table import Emoji
from english import NUMBERS, with_article
from grounds import GROUNDS, SIZES
from keywords import Keywords
from questions import DESCRIBING, NAMING, Questions
from riddles import Riddle, Riddles
from scenes import Placed, Scene, Scenes
from tasks import EmojiTasks, Story, shown_to_adapter
from wishes import Wishes


Row = dict[str, Any]
SENTENCE = "{} from {}"  # how the adapter answers
# Of an image that is seen this share of its codes is another one: what a tokenizer misreads shall not matter.
MISREAD = {0.0: 0.4, 0.03: 0.25, 0.08: 0.2, 0.15: 0.15}
SHARE_OF_READINGS = 0.5  # of images that the tokenizer has read: what it made of them, in place of codes at random
SHARES_OF_EDITS = {
    "skin tone": 0.3,
    "gender": 0.25,
    "hair": 0.08,
    "flag": 0.1,
    "clock": 0.1,
    "moon": 0.03,
    "colour": 0.14,
}


class TaskRows:
    """
    Args:
        table (`list[Emoji]`): All emoji.
        codes ([`EmojiCodes`]): Of all emoji.
        packages (`Path`): The folder of the npm packages, for keywords.
        seed (`int`): Of what is drawn at random.
        readings (`Path`, *optional*): What `prepare_readings.py` has written.
    """

    def __init__(self, table: list[Emoji], codes: EmojiCodes, packages: Path, seed: int, readings: Path | None = None):
        self.generator = random.Random(seed)
        self.tasks, self.codes = EmojiTasks(table), codes
        self.readings = read_pairs(readings) if readings is not None else {}
        self.trained = [emoji for emoji in table if not emoji.is_held_out]
        keywords = Keywords(table, packages)
        self.wishes = Wishes(table, keywords, self.generator)
        self.questions_about = Questions(table, keywords, self.generator)
        self.scenes_drawn = Scenes(table, self.generator)
        self.riddles_told = Riddles(table, self.scenes_drawn, self.generator)

    # One emoji

    def drawing(self, repeats: int) -> list[Row]:
        return [self._wish(self.wishes.for_emoji(emoji)) for emoji in self.trained for _ in range(repeats)]

    def drawing_by_name(self, repeats: int) -> list[Row]:
        return [self._wish(self.wishes.by_name(emoji)) for emoji in self.trained for _ in range(repeats)]

    def wordings(self, repeats: int) -> list[Row]:
        """Whatever any emoji is called, alike often, with the emoji that is meant most likely."""
        words = sorted(self.wishes.keywords.emoji_of)
        return [self._wish(self.wishes.for_wording(word)) for word in words for _ in range(repeats)]

    def _wish(self, wish: Any) -> Row:
        return {"caption": wish.words, "image_codes": [self.codes.of(wish.key, wish.ground, wish.size)]}

    def naming(self, repeats: int) -> list[Row]:
        return self._names(self.trained, repeats)

    def naming_of_pairs(self, repeats: int) -> list[Row]:
        return self._names([emoji for emoji in self.trained if len(emoji.tones) > 1], repeats)

    def _names(self, named: list[Emoji], repeats: int) -> list[Row]:
        return [
            self._asked([self._seen(emoji)], self.generator.choice(NAMING), emoji.answer_name)
            for emoji in named
            for _ in range(repeats)
        ]

    def describing(self, repeats: int) -> list[Row]:
        rows = []
        for emoji in self.trained:
            for _ in range(repeats):
                ground, size = self._ground(), "small" if self.generator.random() < 0.3 else "big"
                name = with_article(f"small {emoji.answer_name}" if size == "small" else emoji.answer_name)
                answer = name if ground == "white" else f"{name} on {ground}"
                codes = self.codes.of(emoji.key, ground, size)
                rows.append(self._asked([codes], self.generator.choice(DESCRIBING), answer))
        return rows

    def questions(self, repeats: int) -> list[Row]:
        return [
            self._asked([self._seen(emoji)], *self.questions_about.about(emoji))
            for emoji in self.trained
            for _ in range(repeats)
        ]

    def comparing(self, count: int) -> list[Row]:
        rows = []
        for _ in range(count):
            first, second = self.generator.choices(self.trained, k=2)
            second = first if self.generator.random() < 0.3 else second
            question, answer = self.questions_about.compare(first, second)
            rows.append(self._asked([self._seen(first), self._seen(second)], question, answer))
        return rows

    def unknown(self, count: int) -> list[Row]:
        return [self._asked([], *self.questions_about.unknown()) for _ in range(count)]

    def conversations(self, repeats: int) -> list[Row]:
        """The name, and then other questions about the same image."""
        rows = []
        for emoji in self.trained:
            for _ in range(repeats):
                pairs = [self.questions_about.about(emoji) for _ in range(self.generator.choice((1, 1, 2)))]
                name = self.generator.choice(NAMING), emoji.answer_name
                rows.append(self._asked_in_turn(self._seen(emoji), [name, *pairs]))
        return rows

    def categories(self, repeats: int) -> list[Row]:
        """Which cannot be seen, and has to be learnt of each."""
        return self._of_each(self.questions_about.category, repeats)

    def kinds(self, repeats: int) -> list[Row]:
        """Whether it is an animal, a vehicle, ..., which cannot be seen either."""
        return self._of_each(self.questions_about.is_of_kind, repeats)

    def _of_each(self, question: Callable[[Emoji], tuple[str, str]], repeats: int) -> list[Row]:
        return [
            self._asked([self._seen(emoji)], *question(emoji))
            for emoji in self.trained
            if not emoji.tones
            for _ in range(repeats)
        ]

    def sentences(self) -> list[Row]:
        """Name and category at once, for the adapter."""
        return [
            self._asked(
                [self._seen(emoji)], self.generator.choice(NAMING), SENTENCE.format(emoji.answer_name, emoji.category)
            )
            for emoji in shown_to_adapter(self.trained)
        ]

    def editing(self, count: int) -> list[Row]:
        """Each kind of edit is drawn alike, skin tones more often: there are fifty times as many."""
        return self._edits({kind: round(share * count) for kind, share in SHARES_OF_EDITS.items()})

    def toning(self, count: int) -> list[Row]:
        return self._edits({"skin tone": count})

    def _edits(self, counts: dict[str, int]) -> list[Row]:
        by_kind: dict[str, list] = {}
        for edit in self.tasks.edits():
            if not self.tasks.by_key[edit.target].is_held_out:
                by_kind.setdefault(edit.kind, []).append(edit)
        rows = []
        for kind, count in counts.items():
            for edit in self.generator.choices(by_kind[kind], k=count):
                instruction = self.wishes.politely(self.generator.choice(edit.instructions))
                ground = self._ground()
                rows.append(
                    self._edit(self.codes.of(edit.source, ground), instruction, self.codes.of(edit.target, ground))
                )
        return rows

    def placing(self, count: int) -> list[Row]:
        """Another ground, another size."""
        rows = []
        for emoji in self.generator.choices(self.trained, k=count):
            old, new = self.generator.sample(list(GROUNDS), 2)
            size = self.generator.choice(list(SIZES))
            if self.generator.random() < 0.5:
                form = self.generator.choice(
                    ("make the background {}", "on {}", "change the background to {}", "{} background")
                )
                pair, words = ((old, size), (new, size)), form.format(new)
            else:
                other = next(name for name in SIZES if name != size)
                form = self.generator.choice(("make it {}", "{}er" if other == "small" else "bigger", "a {} one"))
                pair, words = ((old, size), (old, other)), form.format(other)
            rows.append(
                self._edit(
                    self.codes.of(emoji.key, *pair[0]), self.wishes.politely(words), self.codes.of(emoji.key, *pair[1])
                )
            )
        return rows

    # Scenes

    def scenes(self, count: int) -> list[Row]:
        rows = []
        for number in range(count):
            if number % 4 == 0:
                scene, words = self.scenes_drawn.counting()
            else:
                scene = self.scenes_drawn.any_scene()
                words = self.scenes_drawn.wish(scene)
            rows.append({"caption": self.wishes.wrapped(words), "image_codes": [self.codes.of_scene(scene)]})
        return rows

    def scene_questions(self, count: int) -> list[Row]:
        """Several turns about one scene."""
        rows = []
        for _ in range(count):
            scene = self.scenes_drawn.any_scene()
            if self.generator.random() < 0.25:
                pairs = [(self.generator.choice((*DESCRIBING, *NAMING)), self.scenes_drawn.described(scene))]
            else:
                pairs = [self.scenes_drawn.questions(scene) for _ in range(self.generator.choice((1, 2, 3)))]
            rows.append(self._asked_in_turn(self.codes.of_scene(scene), pairs))
        return rows

    def looking(self, count: int) -> list[Row]:
        """
        What has to be looked for in a scene: counted, found, or missed. One question a row: of several, an answer
        would see the question that follows it in its block, which it never does when it is generated.
        """
        scenes, rows = self.scenes_drawn, []
        kinds = (scenes.count, scenes.count, scenes.where, scenes.where, scenes.is_there, scenes.questions)
        for _ in range(count):
            scene = scenes.any_scene()
            rows.append(self._asked([self.codes.of_scene(scene)], *self.generator.choice(kinds)(scene)))
        return rows

    def scene_edits(self, count: int) -> list[Row]:
        edits = self.scenes_drawn.edits()
        return [self._scene_edit(*next(edits)) for _ in range(count)]

    def looking_edits(self, count: int) -> list[Row]:
        """
        What has to be found before it can be changed. Of other edits most can be done, and most of their codes drawn,
        by who copies and does not look.
        """
        edits = self.scenes_drawn.looking_edits()
        return [self._scene_edit(*next(edits)) for _ in range(count)]

    def _scene_edit(self, source: Scene, words: str, target: Scene) -> Row:
        return self._edit(self.codes.of_scene(source), self.wishes.politely(words), self.codes.of_scene(target))

    # Thoughts and stories

    def thinking(self, repeats: int) -> list[Row]:
        rows = []
        for emoji in self.trained:
            if not emoji.tones:
                for _ in range(repeats):
                    wish, thought = self.tasks.thought(emoji, self.generator)
                    rows.append({"caption": wish, "thinking": thought, "image_codes": [self.codes.of(emoji.key)]})
        return rows

    def riddles(self, count: int) -> list[Row]:
        """Half with their thoughts, half without."""
        told = [*self.riddles_told.sounds(), *(self.riddles_told.any_riddle() for _ in range(count))]
        return [self._riddle(riddle, number % 2 == 0) for number, riddle in enumerate(told)]

    def _riddle(self, riddle: Riddle, is_thought: bool) -> Row:
        row: Row = {"caption": riddle.wish, "image_codes": [self.codes.of_scene(riddle.scene)]}
        return {**row, "thinking": riddle.thought} if is_thought else row

    def stories(self, repeats: int) -> list[Row]:
        return [self._story(story) for story in self.tasks.stories() for _ in range(repeats)]

    def growing_stories(self, count: int) -> list[Row]:
        """One thing that changes from picture to picture: more of it, or elsewhere."""
        rows = []
        for _ in range(count):
            key, ground = self.generator.choice(self.scenes_drawn.keys), self._ground()
            name = self.scenes_drawn.name(key)
            if self.generator.random() < 0.5:
                wish, sentence = f"a story of more and more {name}", "now there are {}."
                scenes = [self.scenes_drawn.in_order([key] * number, (1, 3), ground) for number in (1, 2, 3)]
                said = [sentence.format(NUMBERS[number]) for number in (1, 2, 3)]
            else:
                wish = f"a story of {with_article(name)} that moves to the right"
                empty = self.scenes_drawn.in_order([], (1, 3), ground)
                scenes = [empty.with_place(place, Placed(key)) for place in range(3)]
                said = [f"it is {place}." for place in ("left", "in the middle", "right")]
            if ground != "white":
                wish += f" on {ground}"
            rows.append(self._told(wish, list(zip(said, map(self.codes.of_scene, scenes), strict=True))))
        return rows

    def _story(self, story: Story) -> Row:
        return self._told(story.wish, [(sentence, self.codes.of(key)) for sentence, key in story.parts])

    # Formats

    def _ground(self) -> str:
        return "white" if self.generator.random() < 0.6 else self.generator.choice(list(GROUNDS))

    def _seen(self, emoji: Emoji) -> dict[str, list[int]]:
        return self.codes.of(emoji.key, self._ground(), "small" if self.generator.random() < 0.15 else "big")

    def _asked(self, images: list[dict[str, list[int]]], question: str, answer: str) -> Row:
        content = [*({"type": "image"} for _ in images), text(question)]
        return {"messages": chat(content, [text(answer)]), "image_codes": [self._as_read(image) for image in images]}

    def _asked_in_turn(self, image: dict[str, list[int]], pairs: list[tuple[str, str]]) -> Row:
        row = self._asked([image], *pairs[0])
        for question, answer in pairs[1:]:
            row["messages"] += chat([text(question)], [text(answer)])
        return row

    def _edit(self, source: dict[str, list[int]], words: str, target: dict[str, list[int]]) -> Row:
        return {"instruction": words, "image_codes": [self._as_read(source), target]}

    def _as_read(self, image: dict[str, list[int]]) -> dict[str, list[int]]:
        """With some of its codes misread."""
        readings = self.readings.get(tuple(image["codes"]))
        if readings and self.generator.random() < SHARE_OF_READINGS:
            return {**image, "codes": self.generator.choice(readings)}
        (share,) = self.generator.choices(list(MISREAD), list(MISREAD.values()))
        read = [
            self.generator.choice(self.codes.known) if self.generator.random() < share else code
            for code in image["codes"]
        ]
        return {**image, "codes": read}

    def _told(self, wish: str, parts: list[tuple[str, dict[str, list[int]]]]) -> Row:
        answer = []
        for sentence, _ in parts:
            answer += [text(sentence), {"type": "image"}]
        return {"messages": chat([text(wish)], answer), "image_codes": [codes for _, codes in parts]}


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def chat(question: list[dict], answer: list[dict]) -> list[dict]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def read_pairs(file: Path) -> dict[tuple[int, ...], list[list[int]]]:
    """Of the codes of an image what a tokenizer has read them as."""
    readings: dict[tuple[int, ...], list[list[int]]] = {}
    for meant, read in json.loads(file.read_text(encoding="utf-8")):
        readings.setdefault(tuple(meant), []).append(read)
    return readings
