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
from prepare_codes import read_codes

from transformers_llada_uni.loading.model_loading import load_model, load_processor


def readings(images: Dataset, model: Any, processor: Any) -> Iterator[tuple[list[int], list[int]]]:
    """Of each image the codes that are meant and those that the tokenizer reads."""
    for (meant,), read in zip(images["image_codes"], read_codes(images, model, processor), strict=True):
        yield meant["codes"], read


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="The pipeline folder.")
    parser.add_argument("data", type=Path)
    arguments = parser.parse_args()
    model, processor = load_model(str(arguments.model)), load_processor(str(arguments.model))
    pairs = list(readings(load_from_disk(arguments.data / "drawings")["once"], model, processor))
    (arguments.data / "readings.json").write_text(json.dumps(pairs), encoding="utf-8")


if __name__ == "__main__":
    main()
