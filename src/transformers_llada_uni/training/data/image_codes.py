"""Pictures of a dataset to image codes, once, before training."""

import hashlib
from typing import Any

import torch
from datasets import Dataset, Features, Image, IterableDataset, List, Value
from datasets.fingerprint import Hasher
from transformers import PreTrainedModel, ProcessorMixin
from trl.data_utils import get_dataset_column_names

from .dataset_formats import CODES_COLUMN, PICTURE_COLUMNS, format_of, pictures_of, refuse_row, with_caption


CODES_FEATURE = List({"grid": List(Value("int64")), "codes": List(Value("int32"))})


def encode_images(
    dataset: Dataset | IterableDataset, model: PreTrainedModel, processor: ProcessorMixin, batch_size: int = 8
) -> Dataset | IterableDataset:
    """
    Replaces the pictures of a dataset by the codes of the image tokenizer: a column `image_codes` that holds for each
    row a list of `{"grid": [H, W], "codes": [H * W numbers]}` in the order of the pictures' places. A result for the
    same data, processor and tokenizer weights is taken from the cache of `datasets`.

    Pictures that a user shows are sized as for understanding, pictures to be made as for editing (so a picture of
    1024 x 1024 becomes 32 x 32 codes, what `generate_image_codes` makes for that size).

    Args:
        dataset: Rows of one of the `FORMATS`, with pictures as anything the image processor reads.
        model ([`LLaDAUniForConditionalGeneration`]): Holds the image tokenizer.
        processor ([`LLaDAUniProcessor`]): Sizes the pictures.
        batch_size (`int`, defaults to 8): Rows read at a time.

    Raises:
        ValueError, TypeError: for a model without image tokenizer or one sharded over processes, and for a row whose
            pictures cannot be read or do not fit its text; the row is named.
    """
    if CODES_COLUMN in get_dataset_column_names(dataset):
        return dataset
    if not hasattr(model, "get_image_codes"):
        raise TypeError(f"`model` must hold an image tokenizer to encode pictures, got a {type(model).__name__}.")
    if getattr(model, "is_distributed_loading_by_transformers", False):
        raise ValueError("`model` is sharded over processes; encode the pictures before the run, in one process.")
    if not hasattr(processor, "image_processor"):
        raise TypeError(f"`processor` must be a LLaDAUniProcessor, got {type(processor).__name__}.")
    dataset = with_caption(dataset)
    columns = get_dataset_column_names(dataset)
    format_name = format_of(columns)

    def encode(batch: dict[str, list], indices: list[int]) -> dict[str, list]:
        names = list(batch)
        rows = [dict(zip(names, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        return {CODES_COLUMN: [_encode_row(*row) for row in zip(rows, indices, strict=True)]}

    def _encode_row(row: dict[str, Any], index: int) -> list[dict[str, list[int]]]:
        pictures = pictures_of(row, format_name, index)
        if not pictures:
            return []
        try:
            return _encode_pictures(pictures)
        except (ValueError, TypeError, OSError) as error:
            refuse_row(index, f"its pictures cannot be used: {error}")

    @torch.no_grad()
    def _encode_pictures(pictures: list[tuple[Any, str]]) -> list[dict[str, list[int]]]:
        # The rule of understanding allows smaller areas where there are several pictures.
        shown = [picture for picture, rule in pictures if rule == "understanding"]
        codes = iter(_codes([shown], "understanding") if shown else [])
        made = iter(code for picture, rule in pictures if rule == "editing" for code in _codes([[picture]], rule))
        return [next(codes if rule == "understanding" else made) for _, rule in pictures]

    def _codes(samples: list[list[Any]], rule: str) -> list[dict[str, list[int]]]:
        inputs = processor.image_processor(samples, resize_mode=rule, return_tensors="pt").to(model.device)
        pixel_values = inputs["pixel_values"].to(model.dtype)
        grids = model.get_image_codes(pixel_values, inputs["image_grid_thw"])
        return [{"grid": list(grid.shape), "codes": grid.flatten().tolist()} for grid in grids]

    features = None
    if dataset.features is not None:
        kept = {name: feature for name, feature in dataset.features.items() if name not in PICTURE_COLUMNS}
        features = Features({**kept, CODES_COLUMN: CODES_FEATURE})
    settings: dict[str, Any] = {
        "with_indices": True,
        "batched": True,
        "batch_size": batch_size,
        "remove_columns": [name for name in columns if name in PICTURE_COLUMNS],
        "features": features,
    }
    if isinstance(dataset, Dataset):
        # `datasets` would hash the closure, and with it all weights of the model.
        identity = [dataset._fingerprint, processor.image_processor.to_json_string(), _tokenizer_digest(model)]
        settings |= {"desc": "Encoding pictures", "new_fingerprint": Hasher.hash(identity)}
    return dataset.map(encode, **settings)


def _tokenizer_digest(model: PreTrainedModel) -> str:
    """A hash of the weights that make the codes."""
    digest = hashlib.sha256()
    for part in (model.model.visual, model.model.vqmodel):
        for tensor in part.state_dict().values():
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def has_pictures(dataset: Dataset | IterableDataset, model: PreTrainedModel | None = None) -> bool:
    """
    Whether rows have pictures that are not codes yet: in columns, or, if `model` can encode them, maybe inside
    messages. For these the schema is asked; a stream may have none, and its rows are looked at one by one.
    """
    columns = get_dataset_column_names(dataset)
    if CODES_COLUMN in columns:
        return False
    if any(name in columns for name in PICTURE_COLUMNS):
        return True
    if format_of(columns) == "text" or not hasattr(model, "get_image_codes"):
        return False
    return dataset.features is None or _holds_pictures(dict(dataset.features))


def _holds_pictures(feature: Any) -> bool:
    """Whether a schema has a place for pictures."""
    if isinstance(feature, dict):
        return "image" in feature or any(map(_holds_pictures, feature.values()))
    return isinstance(feature, Image) or (hasattr(feature, "feature") and _holds_pictures(feature.feature))


__all__ = ["encode_images"]
