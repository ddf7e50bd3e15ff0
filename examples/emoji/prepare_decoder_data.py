"""
The emoji, each alone, as codes and latents, for the decoder: it draws the places of a scene one by one.

    python examples/emoji/prepare_decoder_data.py runs/emoji/model runs/emoji/data

Reads what is alone of `data/views/` (see prepare_codes.py) and the trained autoencoder, writes `data/latents/`
(columns codes, grid, latents). Held-out emoji are in it as little as in all other data.
"""

import argparse
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, DatasetDict, load_from_disk
from diffusers.image_processor import VaeImageProcessor
from diffusers.models import AutoencoderKL
from emoji_codes import NUM_STYLES

from diffusers_llada_uni.training.decoder_data import FEATURES


BATCH = 32
NUM_OF_CONTENT = 12


@torch.no_grad()
def rows_of(views: Dataset, vae: AutoencoderKL) -> Iterator[dict[str, Any]]:
    pixels_of = VaeImageProcessor(do_resize=False)
    for start in range(0, len(views), BATCH):
        batch = views[start : start + BATCH]
        encoded = vae.encode(pixels_of.preprocess(batch["image"])).latent_dist.mode()
        encoded = (encoded - vae.config["shift_factor"]) * vae.config["scaling_factor"]
        for (own,), latents in zip(batch["image_codes"], encoded, strict=True):
            yield {**own, "latents": latents.flatten().numpy()}


def some_of_each_content(codes: list[list[int]]) -> list[int]:
    """At most so many rows with the same content: people have thirty-six, for their skin tones."""
    of_content: dict[tuple[int, ...], list[int]] = {}
    for row, own in enumerate(codes):
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
    views = load_from_disk(arguments.data / "views")["alone"]
    views = views.select(some_of_each_content([own["codes"] for (own,) in views["image_codes"]]))
    rows = Dataset.from_generator(rows_of, features=FEATURES, gen_kwargs={"views": views, "vae": vae})
    DatasetDict(train=rows).save_to_disk(arguments.data / "latents")


if __name__ == "__main__":
    main()
