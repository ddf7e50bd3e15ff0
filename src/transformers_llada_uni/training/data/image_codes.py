"""Images of a dataset to image codes, once, before training."""

from typing import Any

import torch
from datasets import Dataset, Features, Image, List, Value
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin
from trl.data_utils import get_dataset_column_names

from ...fingerprints import fingerprint
from ...processing_llada_uni import LLaDAUniProcessor
from .dataset_formats import (
    CODES_COLUMN,
    IMAGE_COLUMNS,
    format_of,
    images_of,
    refuse_row,
    rows_of,
    stored_image,
    with_caption,
)
from .dataset_loading import AnyDataset, only_dataset
from .image_files import versions_of_image_files


CODES_FEATURE = List({"grid": List(Value("int64")), "codes": List(Value("int32"))})


def encode_images(
    dataset: AnyDataset,
    model: PreTrainedModel,
    processor: ProcessorMixin | PreTrainedTokenizerBase,
    batch_size: int = 8,
    editing_max_pixels: int | None = None,
) -> AnyDataset:
    """
    Replaces the images of a dataset by the codes of the image tokenizer: a column `image_codes` that holds for each
    row a list of `{"grid": [H, W], "codes": [H * W numbers]}` in the order of the images' places. A result for the
    same data, processor and tokenizer weights is taken from the cache of `datasets`.

    Images that a user shows are sized as for understanding, images to be made as for editing (so an image of
    1024 x 1024 becomes 32 x 32 codes, what `generate_image_codes` makes for that size).

    Args:
        dataset: Rows of one of the `FORMATS`, with images as anything the image processor reads, or as the bytes of a
            file (also `{"bytes": ..., "path": ...}`).
        model ([`LLaDAUniForConditionalGeneration`]): Holds the image tokenizer.
        processor ([`LLaDAUniProcessor`]): Sizes the images.
        batch_size (`int`, defaults to 8): Rows read at a time.
        editing_max_pixels (`int`, *optional*): Largest area of an image to be made, for training that begins with
            small ones. Default: the processor's, 512 x 512, which the decoder draws as 1024 x 1024.

    Raises:
        ValueError, TypeError: for a model without image tokenizer or one sharded over processes, and for a row whose
            images cannot be read or do not fit its text; the row is named.
    """
    dataset = only_dataset("dataset", dataset)
    if CODES_COLUMN in get_dataset_column_names(dataset):
        return dataset
    if not hasattr(model, "get_image_codes"):
        raise TypeError(f"`model` must hold an image tokenizer to encode images, got a {type(model).__name__}.")
    if getattr(model, "is_distributed_loading_by_transformers", False):
        raise ValueError("`model` is sharded over processes; encode the images before the run, in one process.")
    if not isinstance(processor, LLaDAUniProcessor):
        raise TypeError(f"`processor` must be a LLaDAUniProcessor, got {type(processor).__name__}.")
    image_processor, _ = processor.image_processor.configured(editing_max_pixels=editing_max_pixels)
    dataset = with_caption(dataset)
    columns = get_dataset_column_names(dataset)
    format_name = format_of(columns)

    def encode(batch: dict[str, list], indices: list[int]) -> dict[str, list]:
        return {CODES_COLUMN: [_encode_row(*row) for row in zip(rows_of(batch), indices, strict=True)]}

    def _encode_row(row: dict[str, Any], index: int) -> list[dict[str, list[int]]]:
        images = images_of(row, format_name, index)
        try:
            return _encode_images([(stored_image(image), rule) for image, rule in images])
        except (ValueError, TypeError, OSError) as error:
            refuse_row(index, f"its images cannot be used: {error}")

    @torch.no_grad()
    def _encode_images(images: list[tuple[Any, str]]) -> list[dict[str, list[int]]]:
        # The rule of understanding allows smaller areas where there are several images.
        shown = [image for image, rule in images if rule == "understanding"]
        codes = iter(_codes([shown], "understanding") if shown else [])
        made = iter(code for image, rule in images if rule == "editing" for code in _codes([[image]], rule))
        return [next(codes if rule == "understanding" else made) for _, rule in images]

    def _codes(samples: list[list[Any]], rule: str) -> list[dict[str, list[int]]]:
        inputs = image_processor(samples, resize_mode=rule, return_tensors="pt").to(model.device)
        pixel_values = inputs["pixel_values"].to(model.dtype)
        grids = model.get_image_codes(pixel_values, inputs["image_grid_thw"])  # type: ignore[operator]  # checked
        return [{"grid": list(grid.shape), "codes": grid.flatten().tolist()} for grid in grids]

    features = None
    if dataset.features is not None:
        kept = {name: feature for name, feature in dataset.features.items() if name not in IMAGE_COLUMNS}
        features = Features({**kept, CODES_COLUMN: CODES_FEATURE})
    settings: dict[str, Any] = {
        "with_indices": True,
        "batched": True,
        "batch_size": batch_size,
        "remove_columns": [name for name in columns if name in IMAGE_COLUMNS],
        "features": features,
    }
    if isinstance(dataset, Dataset):
        # `datasets` would hash the closure, and with it all weights of the model.
        files = versions_of_image_files(dataset)
        identity = [dataset._fingerprint, files, image_processor, model.model.visual, model.model.vqmodel]
        settings |= {"desc": "Encoding images", "new_fingerprint": fingerprint(identity)}
    return dataset.map(encode, **settings)


def has_images(dataset: AnyDataset, model: PreTrainedModel | None = None) -> bool:
    """
    Whether rows have images that are not codes yet: in columns, or, if `model` can encode them, maybe inside
    messages. For these the schema is asked; a stream may have none, and its rows are looked at one by one.
    """
    columns = get_dataset_column_names(dataset)
    if CODES_COLUMN in columns:
        return False
    if any(name in columns for name in IMAGE_COLUMNS):
        return True
    if format_of(columns) == "text" or not hasattr(model, "get_image_codes"):
        return False
    return dataset.features is None or _holds_images(dict(dataset.features))


def _holds_images(feature: Any) -> bool:
    """Whether a schema has a place for images."""
    if isinstance(feature, dict):
        return "image" in feature or any(map(_holds_images, feature.values()))
    return isinstance(feature, Image) or (hasattr(feature, "feature") and _holds_images(feature.feature))
