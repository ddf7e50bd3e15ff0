"""
What the image tokenizer reads of drawings and of pictures, for a language model that is to understand its own.

    python examples/emoji/prepare_readings.py runs/emoji/model runs/emoji/data

Reads `data/drawings/`, and writes `data/readings.json`: of each image the codes that are meant and that are read.
"""

import argparse
import json
from pathlib import Path

from datasets import load_from_disk
from tqdm import tqdm

from diffusers_llada_uni import LLaDAUniPipeline


BATCH = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="The pipeline folder.")
    parser.add_argument("data", type=Path)
    arguments = parser.parse_args()
    pipe = LLaDAUniPipeline.from_pretrained(arguments.model, transformer=None, vae=None)
    drawings = load_from_disk(arguments.data / "drawings")["train"]
    pairs = []
    for start in tqdm(range(0, len(drawings), BATCH)):
        batch = drawings[start : start + BATCH]
        images = pipe.processor.image_processor([[image] for image in batch["image"]], return_tensors="pt")
        grids = pipe.model.get_image_codes(images["pixel_values"], images["image_grid_thw"])
        meant = [codes["codes"] for (codes,) in batch["image_codes"]]
        pairs += [(codes, grid.flatten().tolist()) for codes, grid in zip(meant, grids, strict=True)]
    (arguments.data / "readings.json").write_text(json.dumps(pairs), encoding="utf-8")


if __name__ == "__main__":
    main()
