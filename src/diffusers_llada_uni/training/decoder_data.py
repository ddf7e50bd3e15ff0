"""Pictures to pairs of image codes and latents, once, before the decoder's training."""

import hashlib
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Features, IterableDataset, List, Value
from datasets.fingerprint import Hasher
from diffusers import AutoencoderKL
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from transformers import PreTrainedModel
from trl.data_utils import get_dataset_column_names

from transformers_llada_uni import LLaDAUniImageProcessor


# The decoder draws at twice the resolution of the image tokenizer.
UPSCALE = 2
COLUMNS = ("codes", "grid", "latents")
FEATURES = Features({"codes": List(Value("int32")), "grid": List(Value("int64")), "latents": List(Value("float32"))})


def prepare_decoder_dataset(
    dataset: Dataset | IterableDataset,
    model: PreTrainedModel,
    image_processor: LLaDAUniImageProcessor,
    vae: AutoencoderKL,
    batch_size: int = 8,
) -> Dataset | IterableDataset:
    """
    Rows with an `image` to `codes` (H * W), `grid` (H, W) and `latents` (channels * 4H * 4W), all flat: what the image
    tokenizer sees of a picture, and what the decoder shall make of it. Sizes follow the rule of editing. A result for
    the same data and weights is taken from the cache of `datasets`.

    Args:
        dataset: Rows with a column `image`; other columns are dropped.
        model ([`LLaDAUniForConditionalGeneration`]): Holds the image tokenizer.
        image_processor ([`LLaDAUniImageProcessor`]): Sizes the pictures.
        vae ([`~diffusers.AutoencoderKL`]): Makes the latents; the mean of its posterior is taken.
        batch_size (`int`, defaults to 8): Rows read at a time.

    Raises:
        ValueError: if there is no column `image`, or a picture cannot be read; the row is named.
        TypeError: if `model` has no image tokenizer.
    """
    columns = get_dataset_column_names(dataset)
    if set(COLUMNS) <= set(columns):
        return dataset
    if "image" not in columns:
        raise ValueError(f"`dataset` must have a column `image`, it has {sorted(columns)}.")
    if not hasattr(model, "get_image_codes"):
        raise TypeError(f"`model` must hold an image tokenizer, got a {type(model).__name__}.")
    pixels_of = VaeImageProcessor(do_resize=False)

    @torch.no_grad()
    def encode(batch: dict[str, list], indices: list[int]) -> dict[str, list]:
        rows: dict[str, list] = {name: [] for name in COLUMNS}
        for picture, index in zip(batch["image"], indices, strict=True):
            try:
                picture = image_processor.fetch_images(picture)
                inputs = image_processor([[picture]], resize_mode="editing", return_tensors="pt").to(model.device)
            except (ValueError, TypeError, OSError) as error:
                raise ValueError(f"Row {index}: `image` cannot be used: {error}") from error
            (codes,) = model.get_image_codes(inputs["pixel_values"].to(model.dtype), inputs["image_grid_thw"])
            target = pixels_of.preprocess(enlarged(picture, image_processor)).to(vae.device, vae.dtype)
            latents = vae.encode(target).latent_dist.mode()
            latents = (latents - vae.config.shift_factor) * vae.config.scaling_factor
            rows["codes"].append(codes.flatten().tolist())
            rows["grid"].append(list(codes.shape))
            rows["latents"].append(latents.flatten().float().cpu().numpy())
        return rows

    settings: dict[str, Any] = {"batched": True, "batch_size": batch_size, "with_indices": True, "features": FEATURES}
    if isinstance(dataset, Dataset):
        identity = [dataset._fingerprint, image_processor.to_json_string(), _digest(model.model.visual)]
        identity += [_digest(model.model.vqmodel), _digest(vae)]
        settings |= {"desc": "Encoding pictures", "new_fingerprint": Hasher.hash(identity)}
    return dataset.map(encode, remove_columns=columns, **settings)


def enlarged(picture: Image.Image, image_processor: LLaDAUniImageProcessor) -> Image.Image:
    """The part of the picture that the image tokenizer sees, at the decoder's resolution."""
    sizes = image_processor.get_resize_and_crop(picture.height, picture.width, "editing")
    (height, width), (crop_height, crop_width) = ([UPSCALE * side for side in size] for size in sizes)
    scaled = picture.resize((width, height), Image.Resampling.LANCZOS)
    left, top = (width - crop_width) // 2, (height - crop_height) // 2
    return scaled.crop((left, top, left + crop_width, top + crop_height))


def _digest(module: torch.nn.Module) -> str:
    digest = hashlib.sha256()
    for tensor in module.state_dict().values():
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def collate(rows: list[dict[str, Any]]) -> dict[str, list[torch.Tensor]]:
    """Lists of `codes` (H, W) and, where there are, of `latents` (channels, h, w); sizes may differ."""
    grids = [tuple(row["grid"]) for row in rows]
    batch = {"codes": [torch.tensor(row["codes"]).view(grid) for row, grid in zip(rows, grids, strict=True)]}
    if "latents" in rows[0]:
        batch["latents"] = [
            torch.from_numpy(np.asarray(row["latents"], dtype=np.float32)).view(-1, 4 * height, 4 * width)
            for row, (height, width) in zip(rows, grids, strict=True)
        ]
    return batch


__all__ = ["prepare_decoder_dataset"]
