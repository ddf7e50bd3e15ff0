"""Datasets of every format to the ids that the trainers take."""

import logging
import random
from collections.abc import Callable
from typing import Any

from datasets import Dataset, IterableDataset, concatenate_datasets, interleave_datasets
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin
from trl.data_utils import get_dataset_column_names

from ...input_checks import check_integer, check_number
from .dataset_formats import CODES_COLUMN, check_format, rows_of, with_caption
from .dataset_loading import AnyDataset, only_dataset
from .example_tokens import ExampleTokenizer, Segment
from .image_codes import encode_images, has_images


logger = logging.getLogger(__name__)

LEARNABLE = ("messages", "prompt_completion", "text_to_image", "editing", "text")


def prepare_dataset(
    dataset: AnyDataset,
    processor: ProcessorMixin | PreTrainedTokenizerBase,
    *,
    block_length: int,
    max_length: int | None = None,
    caption_dropout: float = 0.1,
    image_dropout: float = 0.1,
    seed: int = 0,
    model: PreTrainedModel | None = None,
    editing_max_pixels: int | None = None,
) -> AnyDataset:
    """
    Rows to `input_ids` and `labels` for supervised training.

    The formats, by their columns (`FORMATS` in `dataset_formats.py`):

    - `messages`, a chat in trl's conversational format; every answer is learnt;
    - `prompt` and `completion`, texts or messages; the completion is learnt;
    - `image` and `caption` (or `text`), for text-to-image; optionally `thinking`, thoughts before the image;
    - `source_image`, `instruction` and `target_image`, for editing;
    - `text`, all of it learnt; longer texts are cut into pieces of `max_length`.

    What reads like a control token in a text of a row (`<|image|>`, `<role>`) is encoded as ordinary tokens: words are
    words. Rows of `input_ids` and `labels`, which the trainers take as they are, may hold any token.

    Chats may have images in a column `images` or inside their messages; those of an answer are learnt as codes, with
    header and end token, under the system message of the task "interleaved" unless the chat has one.
    Labels are -100 on prompts. A row ends with an end token and is filled with end tokens to whole blocks, and these
    carry labels: `generate` fills whole blocks, and has to know what comes after the end. (`generate_image_codes`
    allows only codes, as the release does, also after the image, and throws those away.)

    Args:
        dataset: The rows, or a `DatasetDict` of one split; a streaming dataset is prepared while it is read.
        processor ([`LLaDAUniProcessor`], or a tokenizer for text-only models): Writes the prompts.
        block_length (`int`): Tokens of a block.
        max_length (`int`, *optional*): Longest row in tokens, a multiple of `block_length`. Longer rows are left out
            and counted in a warning (not in a stream): cutting them would cut answers or images.
        caption_dropout (`float`, defaults to 0.1): Share of text-to-image and editing rows whose words become
            `<uncondition>`, for classifier-free guidance.
        image_dropout (`float`, defaults to 0.1): Share of editing rows without source image, for the same.
        seed (`int`, defaults to 0): Decides with a row's number what is left out of it; for several epochs, prepare
            the data with several seeds and concatenate them.
        model ([`LLaDAUniForConditionalGeneration`], *optional*): Encodes images that are not codes yet.
        editing_max_pixels (`int`, *optional*): As in [`encode_images`].

    Raises:
        ValueError: for columns that make no format, a row that does not fit its format (named by its number), data of
            which nothing fits into `max_length`, or an argument out of range.
    """
    check_integer("block_length", block_length, 1)
    if max_length is not None:
        check_integer("max_length", max_length, block_length)
    check_number("caption_dropout", caption_dropout, 0, 1)
    check_number("image_dropout", image_dropout, 0, 1)
    tokenizer = ExampleTokenizer(processor)
    dataset, format_name = _recognise(dataset, processor, model, LEARNABLE, editing_max_pixels)

    def tokenize(batch: dict[str, list], indices: list[int]) -> dict[str, list[list[int]]]:
        examples: dict[str, list[list[int]]] = {"input_ids": [], "labels": []}
        for row, index in zip(rows_of(batch), indices, strict=True):
            segments = _segments(row, index)
            for piece in _pieces(segments):
                input_ids, labels = _join(piece, tokenizer.end, block_length)
                examples["input_ids"].append(input_ids)
                examples["labels"].append(labels)
        return examples

    def _segments(row: dict[str, Any], index: int) -> list[Segment]:
        # Strings seed `Random` by their content: neighbours draw independently.
        generator = random.Random(f"{seed}/{index}")
        drops_text, drops_image = generator.random() < caption_dropout, generator.random() < image_dropout
        if format_name == "text_to_image":
            return tokenizer.text_to_image(row, index, drop_text=drops_text)
        if format_name == "editing":
            return tokenizer.editing(row, index, drop_text=drops_text, drop_image=drops_image)
        return getattr(tokenizer, format_name)(row, index)

    def _pieces(segments: list[Segment]) -> list[list[Segment]]:
        if format_name != "text" or max_length is None:
            return [segments]
        ids = [*segments[0][0], tokenizer.end]
        length = max_length - max_length % block_length
        return [[(ids[start : start + length], True)] for start in range(0, len(ids), length)]

    def _join(segments: list[Segment], end: int, block_length: int) -> tuple[list[int], list[int]]:
        input_ids = [token for ids, _ in segments for token in ids]
        labels = [token if is_learnt else -100 for ids, is_learnt in segments for token in ids]
        closing = 0 if format_name == "text" and max_length is not None else 1
        closing += -(len(input_ids) + closing) % block_length
        return input_ids + [end] * closing, labels + [end] * closing

    return rows_that_fit(_map(dataset, tokenize, "Tokenizing"), max_length)


def prepare_preference_dataset(
    dataset: AnyDataset,
    processor: ProcessorMixin | PreTrainedTokenizerBase,
    *,
    block_length: int,
    max_length: int | None = None,
    model: PreTrainedModel | None = None,
) -> AnyDataset:
    """
    Rows with `prompt`, `chosen` and `rejected` (texts or messages, images as in [`prepare_dataset`]; in a column
    `images` those of the prompt come first, then those of `chosen`, then those of `rejected`) to `prompt_ids`,
    `chosen_ids` and `rejected_ids`, the columns of trl's DPO. Prompt and answer together fill whole blocks.

    Args and errors: as [`prepare_dataset`].
    """
    check_integer("block_length", block_length, 1)
    tokenizer = ExampleTokenizer(processor)
    dataset, _ = _recognise(dataset, processor, model, ("preference",))

    def tokenize(batch: dict[str, list], indices: list[int]) -> dict[str, list[list[int]]]:
        examples: dict[str, list[list[int]]] = {"prompt_ids": [], "chosen_ids": [], "rejected_ids": []}
        for row, index in zip(rows_of(batch), indices, strict=True):
            prompt, *answers = tokenizer.preference(row, index)
            for name, answer in zip(("chosen_ids", "rejected_ids"), answers, strict=True):
                closing = 1 + -(len(prompt) + len(answer) + 1) % block_length
                examples[name].append(answer + [tokenizer.end] * closing)
            examples["prompt_ids"].append(prompt)
        return examples

    return preferences_that_fit(_map(dataset, tokenize, "Tokenizing"), max_length)


def prepare_prompts(
    dataset: AnyDataset,
    processor: ProcessorMixin | PreTrainedTokenizerBase,
    *,
    model: PreTrainedModel | None = None,
) -> AnyDataset:
    """
    Adds to rows with a `prompt` (text or messages) the column `prompt_ids`; all other columns stay, for the rewards. A
    stream of image objects needs `features`, which `datasets` cannot guess.

    Args and errors: as [`prepare_dataset`].
    """
    tokenizer = ExampleTokenizer(processor)
    dataset = only_dataset("dataset", dataset)
    # The columns of rewards must not be taken for those of another format.
    of_prompts = ("prompt", "image", "images", CODES_COLUMN)
    rows = dataset.select_columns([name for name in get_dataset_column_names(dataset) if name in of_prompts])
    if model is not None and has_images(rows, model):
        rows = encode_images(rows, model, processor)

    def tokenize(row: dict[str, Any], index: int) -> dict[str, list[int]]:
        return {"prompt_ids": tokenizer.prompt(row, index)[0][0]}

    settings: dict[str, Any] = {"desc": "Tokenizing prompts"} if isinstance(rows, Dataset) else {}
    settings["remove_columns"] = get_dataset_column_names(rows)
    return concatenate_datasets([dataset, rows.map(tokenize, with_indices=True, **settings)], axis=1)


def mix_datasets(parts: dict[str, AnyDataset], mix: dict[str, float], seed: int = 0) -> AnyDataset:
    """
    One dataset whose next row is drawn from the parts with the probabilities `mix` (scaled to a sum of one), until
    every row of each part was seen once; rows of the smaller parts repeat.

    Raises:
        ValueError: for a share that is not positive, if the names of `parts` and `mix` differ, or for a part of
            several splits.
    """
    if not parts or set(parts) != set(mix):
        raise ValueError(f"`mix` must give a share for each of {sorted(parts)}, got {sorted(mix)}.")
    datasets = [only_dataset(f"parts[{name!r}]", part) for name, part in parts.items()]
    for name, share in mix.items():
        check_number(f"mix[{name!r}]", share, 0, exclude_minimum=True)
    total = sum(mix.values())
    shares = [mix[name] / total for name in parts]
    return interleave_datasets(datasets, probabilities=shares, seed=seed, stopping_strategy="all_exhausted")


# Steps that the functions share


def _recognise(
    dataset: AnyDataset,
    processor: Any,
    model: PreTrainedModel | None,
    expected: tuple[str, ...],
    editing_max_pixels: int | None = None,
) -> tuple[AnyDataset, str]:
    """The dataset with images as codes, and its format."""
    dataset = with_caption(only_dataset("dataset", dataset))
    format_name = check_format("dataset", dataset, expected)
    if has_images(dataset, model):
        if model is None:
            raise ValueError("`model` is needed to encode the images of `dataset`, or encode them before.")
        # A tokenizer is refused there.
        dataset = encode_images(dataset, model, processor, editing_max_pixels=editing_max_pixels)
    return dataset, format_name


def _map(dataset: AnyDataset, function: Callable[..., dict[str, Any]], description: str) -> AnyDataset:
    settings = {"desc": description} if isinstance(dataset, Dataset) else {}
    columns = get_dataset_column_names(dataset)
    return dataset.map(function, batched=True, with_indices=True, remove_columns=columns, **settings)


def preferences_that_fit(dataset: AnyDataset, max_length: int | None) -> AnyDataset:
    """The prepared preferences of which each answer, with its prompt, has at most `max_length` tokens."""
    dataset = rows_that_fit(dataset, max_length, ("prompt_ids", "chosen_ids"))
    return rows_that_fit(dataset, max_length, ("prompt_ids", "rejected_ids"))


def rows_that_fit(dataset: AnyDataset, max_length: int | None, names: tuple[str, ...] = ("input_ids",)) -> AnyDataset:
    """
    The prepared rows whose columns `names` have together at most `max_length` tokens; all, if that is `None`.

    Raises:
        ValueError: if there is none.
    """
    if max_length is None:
        return dataset

    def fits(row: dict[str, list[int]]) -> bool:
        return sum(len(row[name]) for name in names) <= max_length

    if isinstance(dataset, IterableDataset):
        return dataset.filter(fits)
    fitting = dataset.filter(fits, desc="Leaving out long rows")
    num_left_out = len(dataset) - len(fitting)
    if num_left_out and not len(fitting):
        raise ValueError(f"None of the {len(dataset)} rows fits into `max_length` ({max_length}).")
    if num_left_out:
        logger.warning(
            "%d of %d rows are longer than `max_length` (%d) and left out.", num_left_out, len(dataset), max_length
        )
    return fitting
