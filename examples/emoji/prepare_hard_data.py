"""
The decoder's data once more, each row as often as the trained decoder is likely to draw another one in its place.

    python examples/emoji/prepare_hard_data.py runs/emoji/model runs/emoji/data

Reads `data/latents/` (see prepare_decoder_data.py) and `data/codes.json`, writes `data/hard_latents/`. What differs in
little, as the hands of clocks do, has little weight in the loss, and is learnt last.
"""

import argparse
import json
from pathlib import Path

import torch
from datasets import Dataset, DatasetDict, concatenate_datasets, load_from_disk
from diffusers.models import ZImageTransformer2DModel
from emoji_codes import NUM_STYLES
from tqdm import tqdm

from diffusers_llada_uni import LLaDAUniSemanticEmbedder
from diffusers_llada_uni.training.decoder_model import DecoderModule


BATCH = 128
MOST = 8  # times that a row is there, by its doubts
# Of these, whatever a single step draws, most is drawn wrong in the end: dark emoji on black, and all small ones.
MORE_OF = {"black": 2.0, "small": 1.5}


@torch.no_grad()
def drawn_at_once(
    decoder: DecoderModule, codes: torch.Tensor, channels: int, generator: torch.Generator
) -> torch.Tensor:
    """What a single step makes of noise, `(batch, channels, 4 * H, 4 * W)`, from codes `(batch, H, W)`."""
    batch, height, width = codes.shape
    noise = torch.randn(batch, channels, 4 * height, 4 * width, generator=generator)
    is_conditional = torch.ones(batch, dtype=torch.bool)
    return noise + torch.stack(decoder(list(noise), torch.zeros(batch), list(codes), is_conditional))


def doubts_of(drawn: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    """
    The distance of each drawing from what it should be, as a share of that from the nearest other one: above 1 it is
    another one.
    """
    drawn, latents = drawn.flatten(1), latents.flatten(1)
    distances = torch.cdist(drawn, latents)
    own = distances.diagonal().clone()
    is_alike = torch.cdist(latents, latents, compute_mode="donot_use_mm_for_euclid_dist") < 0.5
    return own / distances.masked_fill(is_alike, torch.inf).min(dim=1).values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="The pipeline folder.")
    parser.add_argument("data", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    decoder = DecoderModule(
        ZImageTransformer2DModel.from_pretrained(arguments.model / "transformer"),
        LLaDAUniSemanticEmbedder.from_pretrained(arguments.model / "semantic_embedder"),
    ).eval()
    data = load_from_disk(arguments.data / "latents")["train"]
    styles = json.loads((arguments.data / "codes.json").read_text(encoding="utf-8"))["styles"][2:]
    generator = torch.Generator().manual_seed(arguments.seed)
    of_style: dict[tuple[int, ...], list[int]] = {}  # ground and size
    for row, codes in enumerate(data["codes"]):
        of_style.setdefault(tuple(codes[2:NUM_STYLES]), []).append(row)
    times = torch.ones(len(data), dtype=torch.long)
    channels = decoder.transformer.config["in_channels"]
    for rows in tqdm(of_style.values(), unit="style"):
        own = data.select(rows).with_format("torch")
        grid = own[0]["grid"].tolist()
        codes = torch.stack(list(own["codes"])).view(-1, *grid)
        drawn = torch.cat([drawn_at_once(decoder, part, channels, generator) for part in codes.split(BATCH)])
        latents = torch.stack(list(own["latents"])).view_as(drawn)
        times[rows] = (4 * doubts_of(drawn, latents).square()).round().clamp(1, MOST).long()
    named = [{code: name for name, code in names.items()} for names in styles]
    for style, rows in of_style.items():
        for name in (names[code] for names, code in zip(named, style, strict=True)):
            times[rows] = (times[rows] * MORE_OF.get(name, 1.0)).round().long()
    most = int(times.max())
    repeated: list[Dataset] = [data.select((times > number).nonzero().flatten().tolist()) for number in range(most)]
    hard = concatenate_datasets([part for part in repeated if len(part)])
    DatasetDict(train=hard).save_to_disk(arguments.data / "hard_latents")
    print(f"{len(hard)} rows of {len(data)}, at most {most} times each.")


if __name__ == "__main__":
    main()
