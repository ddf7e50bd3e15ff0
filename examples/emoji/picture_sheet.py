"""
One image of what the emoji model does: prompts that people typed with what was drawn, scenes, riddles, edits before
and after, a story. Nothing is picked: all but the story is drawn at random by the seed, failures stay.

    python examples/emoji/picture_sheet.py packages sheet.png
"""

import argparse
import itertools
import random
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from emoji_table import load_emoji
from evaluate import typed_prompts
from grounds import CELL as PLACE
from PIL import Image, ImageDraw, ImageFont
from riddles import Riddles
from scenes import Scene, Scenes, drawn
from tasks import EmojiTasks

from diffusers_llada_uni import LLaDAUniPipeline, embedded_checkpoint


COLUMNS, WIDTH, HEIGHT, CAPTION = 8, 148, 132, 40
NUM_TYPED, NUM_SCENES, NUM_RIDDLES, NUM_EDITS, NUM_SCENE_EDITS = 24, 8, 8, 8, 8
STORY = "a story of 4 moon phases from the new moon"


def cell(images: list[Image.Image], words: str) -> Image.Image:
    """Images side by side above their words."""
    canvas = Image.new("RGB", (WIDTH, HEIGHT + CAPTION), "white")
    room = WIDTH // len(images)
    for number, image in enumerate(images):
        scale = min((room - 6) / image.width, (HEIGHT - 4) / image.height)
        scaled = image.resize((round(scale * image.width), round(scale * image.height)), Image.Resampling.LANCZOS)
        left, top = number * room + (room - scaled.width) // 2, (HEIGHT - scaled.height) // 2
        canvas.paste(scaled, (left, top))
    font = ImageFont.load_default(size=10)
    lines = textwrap.wrap(words, 27)[:3]
    ImageDraw.Draw(canvas).multiline_text(
        (WIDTH // 2, HEIGHT + 2), "\n".join(lines), fill="black", font=font, anchor="ma", align="center"
    )
    return canvas


class Sheet:
    """What is on it, all by one seed."""

    def __init__(self, pipe: LLaDAUniPipeline, packages: Path, seed: int):
        self.pipe: Any = pipe  # its images are of PIL
        self.seed, self.chosen = seed, random.Random(seed)
        self.table = load_emoji(packages)
        self.tasks, self.scenes = EmojiTasks(self.table), Scenes(self.table, self.chosen)

    def cells(self) -> Iterator[Image.Image]:
        yield from self.typed()
        yield from self.drawn_scenes()
        yield from self.riddles()
        yield from self.edits()
        yield from self.scene_edits()
        yield from self.story()

    def _images(self, words: str | list[str], **settings: Any) -> list[Image.Image]:
        return self.pipe(words, generator=torch.Generator().manual_seed(self.seed), **settings).images

    def typed(self) -> Iterator[Image.Image]:
        prompts = [words for words, _ in self.chosen.sample(typed_prompts(self.table), NUM_TYPED)]
        for words, image in zip(prompts, self._images(prompts), strict=True):
            yield cell([image], words)

    def _scene(self, words: str, scene: Scene, **settings: Any) -> Image.Image:
        rows, columns = scene.shape
        (image,) = self._images(words, height=rows * PLACE, width=columns * PLACE, **settings)
        return cell([image], words)

    def drawn_scenes(self) -> Iterator[Image.Image]:
        for scene in [self.scenes.any_scene() for _ in range(NUM_SCENES)]:
            yield self._scene(self.scenes.wish(scene), scene)

    def riddles(self) -> Iterator[Image.Image]:
        riddles = Riddles(self.table, self.scenes, self.chosen)
        for riddle in [riddles.any_riddle(held_out=True) for _ in range(NUM_RIDDLES)]:
            yield self._scene(riddle.wish, riddle.scene, thinking=True)

    def edits(self) -> Iterator[Image.Image]:
        by_kind: dict[str, list] = {}
        for edit in self.tasks.edits():
            by_kind.setdefault(edit.kind, []).append(edit)
        kinds = itertools.islice(itertools.cycle(sorted(by_kind)), NUM_EDITS)
        for edit in [self.chosen.choice(by_kind[kind]) for kind in kinds]:
            source, words = self.tasks.by_key[edit.source].picture, self.chosen.choice(edit.instructions)
            yield cell([source, *self._images(words, image=source)], words)

    def scene_edits(self) -> Iterator[Image.Image]:
        for scene, words, _ in itertools.islice(self.scenes.edits(), NUM_SCENE_EDITS):
            source = drawn(scene, self.tasks.by_key)
            yield cell([source, *self._images(words, image=source)], words)

    def story(self) -> Iterator[Image.Image]:
        words: list[str] = []
        generator = torch.Generator().manual_seed(self.seed)
        for part in self.pipe.interleave(STORY, max_images=4, generator=generator):
            if isinstance(part, Image.Image):
                yield cell([part], " ".join(words))
                words = []
            else:
                words.append(part.strip())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", type=Path, help="The folder of the npm packages, see packages.py.")
    parser.add_argument("output", type=Path)
    parser.add_argument("--model", type=Path, help="A pipeline folder; default: the shipped one.")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    pipe = LLaDAUniPipeline.from_pretrained(arguments.model or embedded_checkpoint(), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    cells = list(Sheet(pipe, arguments.packages, arguments.seed).cells())
    rows = -(-len(cells) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * WIDTH, rows * (HEIGHT + CAPTION)), "white")
    for number, image in enumerate(cells):
        sheet.paste(image, (number % COLUMNS * WIDTH, number // COLUMNS * (HEIGHT + CAPTION)))
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(arguments.output, optimize=True)
    print(f"{arguments.output}: {STORY!r} is the story at the end.")


if __name__ == "__main__":
    main()
