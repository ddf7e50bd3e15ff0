"""
Settles the codes of all emoji, and draws images that shall have them.

    python examples/emoji/prepare_codes.py packages runs/emoji/model runs/emoji/data

Reads `data/pictures/`, encodes it with the trained tokenizer, and writes `data/codes.json` ([`EmojiCodes`]) and
`data/views/` (columns image, image_codes): every picture with the codes that are its own from now on, and scenes; in
the split "alone" no scenes. The tokenizer learns them by `llada-uni train image_tokenizer_alignment`.
"""

import argparse
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, DatasetDict, Features, Image, List, Value, load_from_disk
from emoji_codes import EmojiCodes
from emoji_table import load_emoji
from scenes import Scenes, drawn
from tqdm import tqdm

from transformers_llada_uni.loading.model_loading import load_model, load_processor


CODES = {"grid": List(Value("int64")), "codes": List(Value("int32"))}
FEATURES = Features({"image": Image(), "image_codes": List(CODES)})
NUM_SCENES = 12_000
BATCH = 128


@torch.no_grad()
def read_codes(images: Dataset, model: Any, processor: Any) -> Iterator[list[int]]:
    """What the image tokenizer reads of each image."""
    for start in tqdm(range(0, len(images), BATCH), desc="reading"):
        pictures = [[image] for image in images[start : start + BATCH]["image"]]
        inputs = processor.image_processor(pictures, return_tensors="pt")
        for grid in model.get_image_codes(inputs["pixel_values"], inputs["image_grid_thw"]):
            yield grid.flatten().tolist()


def scene_views(scenes: Scenes, codes: EmojiCodes, number: int) -> Iterator[dict[str, Any]]:
    for count in range(number):
        scene = scenes.counting()[0] if count % 5 == 0 else scenes.any_scene()
        yield {"image": drawn(scene, codes.by_key), "image_codes": [codes.of_scene(scene)]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", type=Path, help="The folder of the npm packages.")
    parser.add_argument("model", type=Path, help="The pipeline folder.")
    parser.add_argument("data", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    table = load_emoji(arguments.packages)
    model, processor = load_model(str(arguments.model)), load_processor(str(arguments.model))
    pictures = load_from_disk(arguments.data / "pictures")["train"]
    known = pictures.select_columns(["content", "style"])
    rows = [{**row, "codes": read} for row, read in zip(known, read_codes(pictures, model, processor), strict=True)]
    codes = EmojiCodes.settle(rows, model.model.vqmodel.quantize.embedding.weight, table)
    codes.save(arguments.data / "codes.json")

    def views() -> Iterator[dict[str, Any]]:
        for picture in pictures:
            _, _, ground, size = picture["style"]
            own = codes.of(picture["key"], ground, size) if picture["key"] else codes.of_nothing(ground)
            yield {"image": picture["image"], "image_codes": [own]}
        yield from scene_views(Scenes(table, random.Random(arguments.seed)), codes, NUM_SCENES)

    agreed = sum(row["codes"] == view["image_codes"][0]["codes"] for row, view in zip(rows, views(), strict=False))
    print(f"{agreed} of {len(rows)} pictures have their settled codes already.")
    both = Dataset.from_generator(views, features=FEATURES)
    DatasetDict(train=both, alone=both.select(range(len(rows)))).save_to_disk(arguments.data / "views")


if __name__ == "__main__":
    main()
