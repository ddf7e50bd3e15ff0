"""
One image of what the emoji model does: prompts with what was drawn, edits before and after, a story. Nothing is
picked: the prompts stand below, the seed is 0, failures stay.

    python examples/emoji/picture_sheet.py emoji-datasource-twitter-16.0.0.tgz sheet.png
"""

import argparse
import random
import textwrap
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from emoji_table import load_emoji
from PIL import Image, ImageDraw, ImageFont
from tasks import EmojiTasks
from wordings import DRAWING

from diffusers_llada_uni import embedded_checkpoint


COLUMNS, CELL, SCALE, CAPTION = 8, 148, 2, 40
STORY = "a story of 4 moon phases from the new moon"


def cell(pictures: list[Image.Image], words: str) -> Image.Image:
    """Images side by side above their words."""
    size = 64 * SCALE if len(pictures) == 1 else 68
    canvas = Image.new("RGB", (CELL, 64 * SCALE + CAPTION), "white")
    left = (CELL - size * len(pictures)) // 2
    for number, picture in enumerate(pictures):
        scaled = picture.resize((size, size), Image.Resampling.LANCZOS)
        canvas.paste(scaled, (left + number * size, (64 * SCALE - size) // 2))
    font = ImageFont.load_default(size=10)
    lines = textwrap.wrap(words, 27)[:3]
    ImageDraw.Draw(canvas).multiline_text(
        (CELL // 2, 64 * SCALE + 2), "\n".join(lines), fill="black", font=font, anchor="ma", align="center"
    )
    return canvas


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", type=Path, help="emoji-datasource-twitter-16.0.0.tgz")
    parser.add_argument("output", type=Path)
    parser.add_argument("--model", type=Path)
    arguments = parser.parse_args()
    pipe = DiffusionPipeline.from_pretrained(arguments.model or embedded_checkpoint(), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    table, chosen = load_emoji(arguments.package), random.Random(0)
    tasks = EmojiTasks(table)

    def generator() -> torch.Generator:
        return torch.Generator().manual_seed(0)

    drawn = chosen.sample([emoji for emoji in table if not emoji.is_held_out], 24)
    drawn += chosen.sample([emoji for emoji in table if emoji.is_held_out], 8)
    prompts = [chosen.choice(DRAWING).format(emoji.name) for emoji in drawn]
    cells = []
    for prompt, emoji, picture in zip(prompts, drawn, pipe(prompts, generator=generator()).images, strict=True):
        cells.append(cell([picture], prompt + (" (held out)" if emoji.is_held_out else "")))

    by_kind: dict[str, list] = {}
    for edit in tasks.edits():
        by_kind.setdefault(edit.kind, []).append(edit)
    edits = [edit for kind in sorted(by_kind) for edit in chosen.sample(by_kind[kind], 2)]
    edits += chosen.sample([edit for edit in tasks.edits() if tasks.by_key[edit.target].is_held_out], 4)
    sources = [tasks.by_key[edit.source].picture for edit in edits]
    instructions = [chosen.choice(edit.instructions) for edit in edits]
    edited = pipe(instructions, image=[[source] for source in sources], generator=generator()).images
    for edit, source, result, words in zip(edits, sources, edited, instructions, strict=True):
        is_new = tasks.by_key[edit.target].is_held_out
        cells.append(cell([source, result], words + (" (held out)" if is_new else "")))

    words = []
    for part in pipe.interleave(STORY, max_images=4, generator=generator()):
        if isinstance(part, Image.Image):
            cells.append(cell([part], " ".join(words)))
            words = []
        else:
            words.append(part.strip())

    rows = -(-len(cells) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * CELL, rows * (64 * SCALE + CAPTION)), "white")
    for number, picture in enumerate(cells):
        sheet.paste(picture, (number % COLUMNS * CELL, number // COLUMNS * (64 * SCALE + CAPTION)))
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(arguments.output, optimize=True)
    print(f"{arguments.output}: {STORY!r} is the story at the end.")


if __name__ == "__main__":
    main()
