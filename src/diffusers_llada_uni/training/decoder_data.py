"""Images to pairs of image codes and latents, once, before the decoder's training."""

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset, Features, IterableDataset, List, Value
from diffusers.image_processor import VaeImageProcessor
from diffusers.models import AutoencoderKL
from trl.data_utils import get_dataset_column_names

from transformers_llada_uni import LLaDAUniForConditionalGeneration, LLaDAUniImageProcessor
from transformers_llada_uni.fingerprints import fingerprint
from transformers_llada_uni.training.data.dataset_formats import stored_image
from transformers_llada_uni.training.data.image_files import versions_of_image_files


COLUMNS = ("codes", "grid", "latents")
ROWS_CHECKED = 10_000  # at a time
FEATURES = Features({"codes": List(Value("int32")), "grid": List(Value("int64")), "latents": List(Value("float32"))})


def is_prepared(argument: str, dataset: Dataset | IterableDataset) -> bool:
    """
    Whether it is of [`prepare_decoder_dataset`], and not images for it. Raises ValueError, naming the argument, if it
    is neither.
    """
    columns = get_dataset_column_names(dataset)
    if not set(COLUMNS) <= set(columns) and "image" not in columns:
        raise ValueError(f"`{argument}` must have a column `image`, it has {sorted(columns)}.")
    return set(COLUMNS) <= set(columns)


def check_codes(argument: str, dataset: Dataset | IterableDataset, num_codes: int) -> None:
    """
    Raises ValueError, naming the argument and the row, for codes that the decoder does not know. All of a dataset are
    read; those of a stream, or that a transform makes, are not.
    """
    if not isinstance(dataset, Dataset) or dataset.format["type"] == "custom":
        return
    codes_alone, last = dataset.select_columns("codes"), num_codes - 1
    for number, batch in enumerate(codes_alone.with_format("arrow").iter(ROWS_CHECKED)):
        codes = batch["codes"]
        while pa.types.is_nested(codes.type):  # lists, or grids of lists
            codes = pc.list_flatten(codes)
        if not pa.types.is_integer(codes.type):
            return  # nothing but nothing, or what `collate` refuses
        low, high = pc.min_max(codes).as_py().values()
        if low is None or 0 <= low <= high <= last:
            continue
        for row, own in enumerate(batch["codes"].to_pylist(), number * ROWS_CHECKED):
            foreign = [code for code in np.ravel(own or []).tolist() if not 0 <= code <= last]
            if foreign:
                raise ValueError(f"Row {row} of `{argument}`: `codes` must lie in 0..{last}, got {foreign[0]}.")


def prepare_decoder_dataset(
    dataset: Dataset | IterableDataset,
    model: LLaDAUniForConditionalGeneration,
    image_processor: LLaDAUniImageProcessor,
    vae: AutoencoderKL,
    batch_size: int = 8,
) -> Dataset | IterableDataset:
    """
    Rows with an `image` to `codes` (H * W), `grid` (H, W) and `latents` (channels * 4H * 4W), all flat: what the image
    tokenizer sees of an image, and what the decoder shall make of it. Sizes follow the rule of editing. A result for
    the same data, weights and settings is taken from the cache of `datasets`.

    Args:
        dataset: Rows with a column `image`; other columns are dropped.
        model ([`LLaDAUniForConditionalGeneration`]): Holds the image tokenizer.
        image_processor ([`LLaDAUniImageProcessor`]): Sizes the images.
        vae ([`~diffusers.AutoencoderKL`]): Makes the latents; the mean of its posterior is taken.
        batch_size (`int`, defaults to 8): Rows read at a time.

    Raises:
        ValueError: if there is no column `image`, or an image cannot be read; the row is named.
        TypeError: if `model` has no image tokenizer.
    """
    if is_prepared("dataset", dataset):
        return dataset
    columns = get_dataset_column_names(dataset)
    if not hasattr(model, "get_image_codes"):
        raise TypeError(f"`model` must hold an image tokenizer, got a {type(model).__name__}.")
    pixels_of = VaeImageProcessor(do_resize=False)

    @torch.no_grad()
    def encode(batch: dict[str, list], indices: list[int]) -> dict[str, list]:
        rows: dict[str, list] = {name: [] for name in COLUMNS}
        for image, index in zip(batch["image"], indices, strict=True):
            try:
                image = image_processor.fetch_images(stored_image(image))
                inputs = image_processor.preprocess([image], resize_mode="editing", return_tensors="pt")
            except (ValueError, TypeError, OSError) as error:
                raise ValueError(f"Row {index}: `image` cannot be used: {error}") from error
            patches = inputs["pixel_values"].to(model.device, model.dtype)
            (codes,) = model.get_image_codes(patches, inputs["image_grid_thw"].to(model.device))
            target = pixels_of.preprocess(image_processor.as_drawn(image)).to(vae.device, vae.dtype)
            latents = vae.encode(target, return_dict=False)[0].mode()
            # Some autoencoders have no shift.
            latents = (latents - (vae.config["shift_factor"] or 0.0)) * vae.config["scaling_factor"]
            rows["codes"].append(codes.flatten().tolist())
            rows["grid"].append(list(codes.shape))
            rows["latents"].append(latents.flatten().float().cpu().numpy())
        return rows

    settings: dict[str, Any] = {"batched": True, "batch_size": batch_size, "with_indices": True, "features": FEATURES}
    if isinstance(dataset, Dataset):
        files = versions_of_image_files(dataset)
        identity = (dataset._fingerprint, files, image_processor, model.model.visual, model.model.vqmodel, vae)
        settings |= {"desc": "Encoding images", "new_fingerprint": fingerprint(identity)}
    return dataset.map(encode, remove_columns=columns, **settings)


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
