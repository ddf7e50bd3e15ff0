"""
What the decoder draws of the emoji's codes, for the image tokenizer to read as these codes.

    python examples/emoji/prepare_drawings.py packages runs/emoji/model runs/emoji/data

Reads `data/codes.json` and `data/views/`, and writes `data/drawings/` (columns image, image_codes): drawings of all
emoji of the training and of scenes, and views beside them, so that nothing is forgotten; in the split "train" what is
misread several times, in the split "once" everything once.
"""

import argparse
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, DatasetDict, concatenate_datasets, load_from_disk
from emoji_codes import Codes, EmojiCodes
from emoji_table import load_emoji
from grounds import GROUNDS, SIZES
from prepare_codes import FEATURES
from prepare_readings import readings
from scenes import Scenes
from tqdm import tqdm

from diffusers_llada_uni import LLaDAUniPipeline
from transformers_llada_uni.loading.model_loading import load_model, load_processor


NUM_SCENES = 400
NUM_VIEWS_OF_SCENES = 2_000
TIMES_MISREAD = 3
BATCH = 64


def drawings(pipe: LLaDAUniPipeline, rows: list[Codes], seed: int) -> Iterator[dict[str, Any]]:
    """What the few-step decoder draws of codes, grid by grid."""
    by_grid: dict[tuple[int, ...], list[Codes]] = {}
    for row in rows:
        by_grid.setdefault(tuple(row["grid"]), []).append(row)
    generator = torch.Generator().manual_seed(seed)
    with tqdm(total=len(rows), unit="image") as progress:
        for grid, same in by_grid.items():
            for start in range(0, len(same), BATCH):
                batch = same[start : start + BATCH]
                codes = torch.tensor([row["codes"] for row in batch]).view(-1, *grid)
                for image, row in zip(pipe.decode_codes(codes, generator=generator), batch, strict=True):
                    yield {"image": image, "image_codes": [row]}
                progress.update(len(batch))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", type=Path, help="The folder of the npm packages.")
    parser.add_argument("model", type=Path, help="The pipeline folder.")
    parser.add_argument("data", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    table, generator = load_emoji(arguments.packages), random.Random(arguments.seed)
    codes = EmojiCodes.load(arguments.data / "codes.json", table)
    pipe = LLaDAUniPipeline.from_pretrained(arguments.model, model=None)
    pipe.set_progress_bar_config(disable=True)

    rows = []
    for emoji in table:
        if not emoji.is_held_out:
            ground, size = generator.choice(list(GROUNDS)), generator.choice(list(SIZES))
            rows += [codes.of(emoji.key), codes.of(emoji.key, ground, size)]
    scenes = Scenes(table, generator)
    rows += [codes.of_scene(scenes.any_scene()) for _ in range(NUM_SCENES)]
    drawn = Dataset.from_generator(lambda: drawings(pipe, rows, arguments.seed), features=FEATURES)
    views = load_from_disk(arguments.data / "views")
    alone, scenes_seen = views["alone"], views["train"].skip(len(views["alone"])).take(NUM_VIEWS_OF_SCENES)
    once = concatenate_datasets([drawn, alone, scenes_seen])
    model, processor = load_model(str(arguments.model)), load_processor(str(arguments.model))
    misread = [index for index, (meant, read) in enumerate(readings(once, model, processor)) if meant != read]
    repeated = concatenate_datasets([once, *[once.select(misread)] * (TIMES_MISREAD - 1)])
    DatasetDict(train=repeated, once=once).save_to_disk(arguments.data / "drawings")


if __name__ == "__main__":
    main()
