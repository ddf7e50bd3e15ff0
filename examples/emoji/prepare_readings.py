"""
What the image tokenizer reads of drawings and of pictures, for a language model that is to understand its own.

    python examples/emoji/prepare_readings.py runs/emoji/model runs/emoji/data

Reads `data/drawings/`, and writes `data/readings.json`: of each image the codes that are meant and that are read.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset, load_from_disk
from tqdm import tqdm

from transformers_llada_uni.loading.model_loading import load_model, load_processor


BATCH = 64


def readings(model: Any, processor: Any, images: Dataset) -> Iterator[tuple[list[int], list[int]]]:
    """Of each image the codes that are meant and those that the tokenizer reads."""
    for start in tqdm(range(0, len(images), BATCH), desc="reading"):
        batch = images[start : start + BATCH]
        inputs = processor.image_processor([[image] for image in batch["image"]], return_tensors="pt")
        grids = model.get_image_codes(inputs["pixel_values"], inputs["image_grid_thw"])
        for (meant,), grid in zip(batch["image_codes"], grids, strict=True):
            yield meant["codes"], grid.flatten().tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="The pipeline folder.")
    parser.add_argument("data", type=Path)
    arguments = parser.parse_args()
    model, processor = load_model(str(arguments.model)), load_processor(str(arguments.model))
    pairs = list(readings(model, processor, load_from_disk(arguments.data / "drawings")["once"]))
    (arguments.data / "readings.json").write_text(json.dumps(pairs), encoding="utf-8")


if __name__ == "__main__":
    main()
