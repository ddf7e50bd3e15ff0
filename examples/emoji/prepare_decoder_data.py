"""
The emoji and scenes of them as codes and latents, for the decoder.

    python examples/emoji/prepare_decoder_data.py runs/emoji/model runs/emoji/data

Reads `data/views/` (see prepare_codes.py) and the trained autoencoder, writes `data/latents/` (columns codes, grid,
latents, length), as a whole and, in the split "alone", what is no scene. Held-out emoji are in it as little as in all
other data.
"""

import argparse
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, DatasetDict, Features, Value, load_from_disk
from diffusers import AutoencoderKL
from diffusers.image_processor import VaeImageProcessor
from emoji_codes import NUM_STYLES, SIDE

from diffusers_llada_uni.training.decoder_data import FEATURES


BATCH = 32
NUM_SCENES = 3_000
NUM_OF_CONTENT = 12


@torch.no_grad()
def rows_of(views: Dataset, vae: AutoencoderKL) -> Iterator[dict[str, Any]]:
    pixels_of = VaeImageProcessor(do_resize=False)
    for start in range(0, len(views), BATCH):
        batch = views[start : start + BATCH]
        images, codes = batch["image"], [codes for (codes,) in batch["image_codes"]]
        for size in dict.fromkeys(image.size for image in images):
            numbers = [number for number, image in enumerate(images) if image.size == size]
            target = torch.cat([pixels_of.preprocess(images[number]) for number in numbers])
            encoded = vae.encode(target).latent_dist.mode()
            encoded = (encoded - vae.config.shift_factor) * vae.config.scaling_factor
            for number, latents in zip(numbers, encoded, strict=True):
                own = codes[number]
                yield {**own, "latents": latents.flatten().numpy(), "length": len(own["codes"])}


def alone(codes: list[list[int]]) -> list[int]:
    """Rows that are no scenes, at most so many with the same content: people have thirty-six, for their skin tones."""
    of_content: dict[tuple[int, ...], list[int]] = {}
    for row, own in enumerate(codes):
        if len(own) == SIDE**2:
            of_content.setdefault(tuple(own[NUM_STYLES:]), []).append(row)
    generator = random.Random(0)
    return sorted(
        row for rows in of_content.values() for row in generator.sample(rows, min(NUM_OF_CONTENT, len(rows)))
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="The pipeline folder.")
    parser.add_argument("data", type=Path)
    arguments = parser.parse_args()
    vae = AutoencoderKL.from_pretrained(arguments.model / "vae")
    views = load_from_disk(arguments.data / "views")["train"]
    scenes = [number for number, (codes,) in enumerate(views["image_codes"]) if len(codes["codes"]) > SIDE**2]
    views = views.select(sorted(set(range(len(views))) - set(scenes[NUM_SCENES:])))
    # By their lengths images of one size are put together: in a batch all are padded to the largest.
    features = Features({**FEATURES, "length": Value("int64")})
    rows = Dataset.from_generator(rows_of, features=features, gen_kwargs={"views": views, "vae": vae})
    DatasetDict(train=rows, alone=rows.select(alone(rows["codes"]))).save_to_disk(arguments.data / "latents")


if __name__ == "__main__":
    main()
