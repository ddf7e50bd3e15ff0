"""
What the decoder draws of the emoji's codes, for the image tokenizer to read it as these codes.

    python examples/emoji/prepare_drawings.py packages runs/emoji/model runs/emoji/data

Reads `data/codes.json` and writes `data/drawings/` (columns image, image_codes): drawings of all trained emoji and of
scenes, and the views of prepare_codes.py beside them, so that nothing is forgotten.
"""

import argparse
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, DatasetDict, concatenate_datasets, load_from_disk
from diffusers import DiffusionPipeline
from emoji_codes import Codes, EmojiCodes
from emoji_table import load_emoji
from grounds import GROUNDS, SIZES
from prepare_codes import FEATURES
from scenes import Scenes
from tqdm import tqdm

import diffusers_llada_uni  # noqa: F401  registers the pipeline


NUM_SCENES = 2_000
BATCH = 64
STEPS = 8  # what the few-step student takes


def drawings(pipe: DiffusionPipeline, rows: list[Codes], seed: int) -> Iterator[dict[str, Any]]:
    pipe.set_progress_bar_config(disable=True)
    for start in tqdm(range(0, len(rows), BATCH), unit="batch"):
        batch = rows[start : start + BATCH]
        codes = torch.tensor([row["codes"] for row in batch]).view(-1, *batch[0]["grid"])
        generator = torch.Generator().manual_seed(seed + start)
        for image, row in zip(
            pipe.decode_codes(codes, num_inference_steps=STEPS, generator=generator), batch, strict=True
        ):
            yield {"image": image, "image_codes": [row]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", type=Path, help="The folder of the npm packages.")
    parser.add_argument("model", type=Path, help="The pipeline folder.")
    parser.add_argument("data", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    table, generator = load_emoji(arguments.packages), random.Random(arguments.seed)
    codes = EmojiCodes.load(arguments.data / "codes.json", table)
    pipe = DiffusionPipeline.from_pretrained(arguments.model, model=None)
    rows = []
    for emoji in table:
        if not emoji.is_held_out:
            rows += [
                codes.of(emoji.key),
                codes.of(emoji.key, generator.choice(list(GROUNDS)), generator.choice(list(SIZES))),
            ]
    scenes = Scenes(table, generator)
    by_grid: dict[tuple[int, ...], list[Codes]] = {}
    for row in (*rows, *(codes.of_scene(scenes.any_scene()) for _ in range(NUM_SCENES))):
        by_grid.setdefault(tuple(row["grid"]), []).append(row)

    def drawn() -> Iterator[dict[str, Any]]:
        for of_grid in by_grid.values():
            yield from drawings(pipe, of_grid, arguments.seed)

    views = load_from_disk(arguments.data / "views")["train"]
    both = concatenate_datasets([Dataset.from_generator(drawn, features=FEATURES), views])
    DatasetDict(train=both).save_to_disk(arguments.data / "drawings")


if __name__ == "__main__":
    main()
