"""Processor of LLaDA2.0-Uni: words and pictures to all a generate call needs, and ids back to text and codes."""

import math
import os
import re
from typing import Any

import torch
from PIL import Image
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import ImageInput
from transformers.processing_utils import ProcessingKwargs, ProcessorMixin, Unpack
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from .image_processing_llada_uni import LLaDAUniImageProcessor
from .prompts import (
    ANSWER,
    CHAT_TEMPLATE,
    TASKS,
    UNCONDITION,
    build_prompt,
    codes_of_side,
    cut_answer,
    deal_out,
    flat_text,
    has_picture,
    left_pad,
    list_of_texts,
    refuse_grid,
    refuse_length,
    replace,
    replacements,
    split_pictures,
    to_lists,
)


IMAGE_START, IMAGE_END, BEGIN_OF_IMAGE = "<|image|>", "<|/image|>", "<boi>"
GRID_TOKEN = "<|reserved_token_{}|>"
UPSCALE = 2  # the decoder draws at twice the resolution of the image tokenizer

# An `<|image|>` that a number follows has its header already.
_HEADER_FOLLOWS = re.compile(re.escape(GRID_TOKEN).replace(r"\{\}", r"\d+"))

# Name under which the tokenizer's own chat template is saved: both would be `chat_template.jinja`.
_TEXT_CHAT = "text_chat"


class LLaDAUniProcessor(ProcessorMixin):
    r"""
    Wraps an image processor and a tokenizer. A call returns all that a generate call needs:

    ```python
    model.generate(**processor(images=picture, text="What is this?", task="understanding"))
    model.generate_image_codes(**processor(text="a cat", task="text_to_image", height=1024, width=1024))
    model.generate_image_codes(**processor(images=picture, text="make it night", task="editing"))
    ```

    In a sequence a picture of H x W codes reads `<|image|> <|reserved_token_H|> <|reserved_token_W|> <boi>`, H*W codes
    in raster order, `<|/image|>`; here `<|reserved_token_0|>` stands for each code of a picture given as pixels.

    Args:
        image_processor ([`LLaDAUniImageProcessor`]): For the pictures.
        tokenizer ([`PreTrainedTokenizerFast`]): Must know the tokens above; the ids are looked up in it.
        chat_template (`str`, *optional*): Jinja template of a chat with pictures, defaults to the released format.
            Chats without pictures use the tokenizer's own template where it has one.
        image_token_offset (`int`, *optional*): Image code `c` is token `image_token_offset + c`. Needed to tell codes
            from text in [`post_process`].
        codebook_size (`int`, *optional*): Number of image codes; `None` for all ids from `image_token_offset` on.
        max_position_embeddings (`int`, *optional*): What the model can read and write in one sequence; `None` if
            unknown, and nothing is refused for its length then.

    Raises:
        ValueError: if the tokenizer lacks one of the tokens.
    """

    def __init__(
        self,
        image_processor: LLaDAUniImageProcessor | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        chat_template: str | dict[str, str] | None = None,
        image_token_offset: int | None = None,
        codebook_size: int | None = None,
        max_position_embeddings: int | None = None,
    ) -> None:
        super().__init__(image_processor, tokenizer, chat_template=CHAT_TEMPLATE)
        self._separate_chat_templates(chat_template)
        self.image_token_offset = image_token_offset
        self.codebook_size = codebook_size
        self.max_position_embeddings = max_position_embeddings

        self.image_token = IMAGE_START  # what users and chat templates write for a picture
        self.image_start_token_id = self._token_id(IMAGE_START)
        self.image_end_token_id = self._token_id(IMAGE_END)
        self.begin_of_image_token_id = self._token_id(BEGIN_OF_IMAGE)
        self.grid_token_ids = [self._token_id(GRID_TOKEN.format(0))]
        while (token_id := self._token_id(GRID_TOKEN.format(len(self.grid_token_ids)), required=False)) is not None:
            self.grid_token_ids.append(token_id)
        self.image_token_id = self.grid_token_ids[0]  # stands for a code that the model fills in
        if len(self.grid_token_ids) < 2:
            raise ValueError(f"`tokenizer` has no token {GRID_TOKEN.format(1)}, so no picture could have a header.")
        self._grid_number = {token_id: number for number, token_id in enumerate(self.grid_token_ids)}

    @property
    def default_side(self) -> int:
        """Pixels along a picture to generate where none are named: twice the largest square that the rule of editing
        leaves, 1024 for the released model."""
        step = self.image_processor.size_multiple
        return UPSCALE * (math.isqrt(self.image_processor.editing_max_pixels) // step * step)

    def _token_id(self, token: str, required: bool = True) -> int | None:
        token_id = self.tokenizer.convert_tokens_to_ids(token)
        if token_id is None or self.tokenizer.convert_ids_to_tokens(token_id) != token:  # None, or the unknown token
            if required:
                raise ValueError(f"`tokenizer` has no token {token}; is it a tokenizer of LLaDA2.0-Uni?")
            return None
        return token_id

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", *self.image_processor.model_input_names]

    # Chat templates: the tokenizer's own and ours have the same file name, so ours is saved as the default and the
    # tokenizer's beside it; both get their own back when loaded.

    def _separate_chat_templates(self, chat_template: str | dict[str, str] | None) -> None:
        templates = self.tokenizer.chat_template
        if isinstance(templates, dict) and _TEXT_CHAT in templates:
            templates = dict(templates)
            templates["default"] = templates.pop(_TEXT_CHAT)
            self.tokenizer.chat_template = templates if len(templates) > 1 else templates["default"]
        if isinstance(chat_template, dict):
            chat_template = chat_template.get("default")
        self.chat_template = chat_template or CHAT_TEMPLATE

    def save_pretrained(
        self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any
    ) -> list[str]:
        """As any processor's; both chat templates are kept."""
        own, templates = self.chat_template, self.tokenizer.chat_template
        text_chat = templates.get("default") if isinstance(templates, dict) else templates
        if text_chat not in (None, own):
            self.chat_template = {"default": own, _TEXT_CHAT: text_chat}
        try:
            return super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)
        finally:
            self.chat_template = own

    def apply_chat_template(
        self, conversation: list[dict] | list[list[dict]], chat_template: str | None = None, **kwargs: Any
    ) -> Any:
        """
        As any processor's. Messages with a picture (`{"type": "image", "image" or "url" or "path" or "base64": ...}`)
        are written in the released format, the pictures of a message before its words; a chat without any picture
        is written by the tokenizer's own template where it has one.

        Raises:
            ValueError: if `conversation` is empty, or as in [`__call__`].
        """
        if not conversation or (isinstance(conversation[0], list | tuple) and not all(conversation)):
            raise ValueError("`conversation` is empty.")
        if chat_template is not None or self.tokenizer.chat_template in (None, self.chat_template):
            return super().apply_chat_template(conversation, chat_template=chat_template, **kwargs)
        conversations, is_batched = self._normalize_conversations(conversation)
        with_pictures = [any(has_picture(message) for message in chat) for chat in conversations]
        if all(with_pictures):
            return super().apply_chat_template(conversation, **kwargs)
        if not any(with_pictures):
            chats = [[flat_text(message) for message in chat] for chat in conversations]
            template = self.tokenizer.get_chat_template(tools=kwargs.get("tools"))
            return super().apply_chat_template(chats if is_batched else chats[0], chat_template=template, **kwargs)
        return self._apply_both_chat_templates(conversations, **kwargs)

    def _apply_both_chat_templates(
        self,
        conversations: list[list[dict]],
        tokenize: bool = False,
        return_dict: bool = False,
        return_tensors: str | None = "pt",
        processor_kwargs: dict | None = None,
        **kwargs: Any,
    ) -> Any:
        """A batch in which some chats have pictures and some have none reads as its rows would alone."""
        for name in ("return_assistant_tokens_mask", "sanitize_control_tokens"):
            if kwargs.get(name):
                raise ValueError(f"`{name}` needs a batch in which all chats have pictures, or none has.")
        prompts = [self.apply_chat_template(chat, **kwargs) for chat in conversations]
        if not tokenize:
            return prompts
        images, *_ = self._multimodal_inputs_from_conversations(conversations, {})
        return_tensors = "pt" if return_tensors == "auto" else return_tensors
        inputs = self(images=images, text=prompts, return_tensors=return_tensors, **(processor_kwargs or {}))
        return inputs if return_dict else inputs["input_ids"]

    # Words and pictures to ids

    def __call__(
        self,
        images: ImageInput | None = None,
        text: str | list[str] | None = None,
        task: str | None = None,
        height: int | None = None,
        width: int | None = None,
        thinking_text: str | list[str] | None = None,
        return_tensors: str | None = "pt",
        **kwargs: Unpack[ProcessingKwargs],
    ) -> BatchFeature:
        """
        Args:
            images: A picture, a list of pictures, or a list of lists with one list per text; anything
                [`LLaDAUniImageProcessor.fetch_images`] reads. A flat list belongs to a single text; with several texts
                it is dealt out in order: as many as each text has `<|image|>`, or with a `task` one to each.
            text (`str` or `list[str]`): Without `task`, finished prompts, in which each `<|image|>` without a header
                becomes the block of its picture. With `task`, the user's own words; pictures go in front of them.
            task (`str`, *optional*): `"understanding"`, `"text_to_image"`, `"thinking"`, `"editing"` (needs a picture;
                several are references) or `"interleaved"`.
            height (`int`, *optional*): Height in pixels of the picture to generate, a multiple of 32 (of two patches).
                Default [`default_side`], 1024; for editing twice the first picture's, after its preprocessing.
            width (`int`, *optional*): Its width.
            thinking_text (`str` or `list[str]`, *optional*): For `task="thinking"`: thoughts already written; then the
                header of the picture follows them. Without it, let the model write and call [`add_image_header`].
            return_tensors (`str`, *optional*, defaults to `"pt"`): `"pt"`, `"np"` or `None` for lists.
            **kwargs: Of the tokenizer and of the image processor (`resize_mode`, ...).

        Returns:
            [`BatchFeature`]: `input_ids` and `attention_mask` (batch, length), left padded; with pictures
            `pixel_values` (num_patches, 768) and `image_grid_thw` (num_images, 3). For text_to_image, editing, and
            thinking with `thinking_text`: `grid` (H, W) in codes, and the companions for guidance
            `negative_input_ids`, `negative_attention_mask` (no text) and for editing `negative_image_input_ids`,
            `negative_image_attention_mask` (no picture). For interleaved: `negative_input_ids` and
            `negative_attention_mask` (neither text nor picture), and `uncondition_ids` (1, n), the ids that stand for
            no text.

        Raises:
            TypeError: if an argument has the wrong type.
            ValueError: if an argument has a value that cannot be used; the message names it, and the nearest valid
                value where there is one. All but unreadable pictures are found before any picture is processed.
        """
        for name in ("videos", "audio"):
            if kwargs.pop(name, None) is not None:
                raise ValueError(f"`{name}`: LLaDA2.0-Uni reads text and pictures only.")
        if "right" in (kwargs.get("padding_side"), kwargs.get("text_kwargs", {}).get("padding_side")):
            raise ValueError("`padding_side` must be 'left': the model continues the end of each row.")
        if task is not None and task not in TASKS:
            raise ValueError(f"`task` must be one of {', '.join(TASKS)} or None, got {task!r}.")
        merged = self._merge_kwargs(tokenizer_init_kwargs=self.tokenizer.init_kwargs, **kwargs)
        text_kwargs, images_kwargs = merged["text_kwargs"], merged["images_kwargs"]
        return_tensors = text_kwargs.pop("return_tensors", return_tensors)
        images_kwargs.pop("return_tensors", None)
        image_processor, images_kwargs = self.image_processor.configured(**images_kwargs)
        images_kwargs.setdefault("resize_mode", "editing" if task == "editing" else image_processor.resize_mode)
        if text is None:
            if images is None or task is not None:
                raise ValueError("`text` is missing." if task else "At least one of `images` and `text` is needed.")
            return image_processor(images, return_tensors=return_tensors, **images_kwargs)

        # 1. Which pictures belong to which text, and how many codes they become.
        texts = list_of_texts(text, "text")
        if not all(entry.strip() for entry in texts):
            raise ValueError("`text` is empty; a prompt needs at least one word.")
        wanted = self._wanted_grid(task, height, width, thinking_text)
        spans = [self._lone_image_tokens(entry) for entry in texts]
        if task is not None and any(spans):
            raise ValueError(f"`text` must not contain {IMAGE_START}: with a `task`, pictures stand before the words.")
        if images is not None:
            images = image_processor.fetch_images(images, images_kwargs.get("input_data_format"))
        samples = deal_out(images, len(texts), [len(found) for found in spans] if task is None else None)
        if task in ("text_to_image", "thinking") and any(samples):
            raise ValueError(
                f"`images` cannot be given with task {task!r}; 'editing' and 'interleaved' take pictures."
            )
        if task == "editing" and not all(samples):
            raise ValueError("`images` is missing: the task 'editing' needs at least one picture for each text.")
        grids = [self._grids(image_processor, sample, images_kwargs["resize_mode"]) for sample in samples]
        blocks = [[self._block(*grid) for grid in sample] for sample in grids]

        # 2. The prompt and its companions, as text and as ids.
        extras: dict[str, Any] = {}
        if task is None:
            offsets = [replacements(*row) for row in zip(texts, spans, blocks, strict=True)]
            prompts = {"": [replace(entry, found) for entry, found in zip(texts, offsets, strict=True)]}
            if merged["return_text_replacement_offsets"]:
                extras["text_replacement_offsets"] = offsets
        else:
            if task == "editing" and wanted is None:
                wanted = self._source_grid(grids)
            prompts = self._task_prompts(task, texts, blocks, wanted, thinking_text)
        data: dict[str, Any] = {}
        for prefix, rows in prompts.items():
            data |= {prefix + name: value for name, value in self._encode(rows, wanted, text_kwargs).items()}
        if task == "interleaved":
            data["uncondition_ids"] = [self._ids(UNCONDITION)]
        if merged["return_mm_token_type_ids"]:
            data["mm_token_type_ids"] = self.create_mm_token_type_ids(data["input_ids"])
        if wanted is not None:
            extras["grid"] = wanted

        # 3. The pictures.
        if any(samples):
            data |= image_processor(samples, **images_kwargs)
        return BatchFeature({**data, **extras}, tensor_type=return_tensors, skip_tensor_conversion=list(extras))

    def _task_prompts(
        self,
        task: str,
        texts: list[str],
        blocks: list[list[str]],
        wanted: tuple[int, int] | None,
        thinking_text: str | list[str] | None,
    ) -> dict[str, list[str]]:
        """The prompts of a task and of its companions, by the prefix of their names in the output."""
        sources = ["".join(sample) for sample in blocks]
        prompts = {"": [build_prompt(task, *row) for row in zip(texts, sources, strict=True)]}
        if wanted is not None:
            prompts["negative_"] = [build_prompt(task, UNCONDITION, source) for source in sources]
        elif task == "interleaved":  # here also the start of the companion without picture
            prompts["negative_"] = [build_prompt(task, UNCONDITION)] * len(texts)
        if task == "editing":
            lone = [IMAGE_START * len(sample) for sample in blocks]
            prompts["negative_image_"] = [build_prompt(task, *row) for row in zip(texts, lone, strict=True)]
        if thinking_text is not None:
            thoughts = list_of_texts(thinking_text, "thinking_text")
            if len(thoughts) != len(texts):
                raise ValueError(f"`thinking_text` has {len(thoughts)} entries for {len(texts)} texts.")
            if any(IMAGE_START in entry for entry in thoughts):
                raise ValueError(f"`thinking_text` must not contain {IMAGE_START}; the header is put after it.")
            prompts[""] = [prompt + entry for prompt, entry in zip(prompts[""], thoughts, strict=True)]
        if wanted is not None:
            header = self._header(*wanted)
            prompts = {prefix: [row + header for row in rows] for prefix, rows in prompts.items()}
        return prompts

    def _encode(
        self, rows: list[str], wanted: tuple[int, int] | None, text_kwargs: dict[str, Any]
    ) -> dict[str, list[list[int]]]:
        if len(rows) > 1 and self.tokenizer.pad_token_id is None:
            raise ValueError("`tokenizer` has no pad token, so a batch of prompts cannot be padded.")
        settings = {"padding": self.tokenizer.pad_token_id is not None, "add_special_tokens": False, **text_kwargs}
        settings |= {"padding_side": "left", "return_attention_mask": True, "return_token_type_ids": False}
        for name in ("return_mm_token_type_ids", "return_text_replacement_offsets"):
            settings.pop(name, None)
        encoded = dict(self.tokenizer(rows, **settings))
        placeholder = GRID_TOKEN.format(0)
        for row, ids in zip(rows, encoded["input_ids"], strict=True):
            if settings.get("truncation") and ids.count(self.image_token_id) != row.count(placeholder):
                raise ValueError("`truncation` to `max_length` would cut into a picture.")
        self._check_length(max(sum(mask) for mask in encoded["attention_mask"]), wanted)
        return encoded

    def add_image_header(
        self,
        input_ids: torch.Tensor | list[list[int]],
        attention_mask: torch.Tensor | list[list[int]] | None = None,
        height: int | None = None,
        width: int | None = None,
        return_tensors: str | None = "pt",
    ) -> BatchFeature:
        """
        After `task="thinking"` and `generate`: puts the header of the wanted picture behind the model's thoughts.

        What the model wrote of a header itself is cut: all from the last `<|image|>` of its answer on, or from
        `<boi>` or an end token.

        Args:
            input_ids (`torch.LongTensor` (batch, prompt + new)): What `generate` returned.
            attention_mask (`torch.LongTensor` (batch, prompt) or longer, *optional*): That of the prompts. Without it,
                pad tokens in front are taken for padding.
            height (`int`, *optional*): Height in pixels of the picture, a multiple of 32. Default [`default_side`].
            width (`int`, *optional*): Its width.
            return_tensors (`str`, *optional*, defaults to `"pt"`): `"pt"`, `"np"` or `None` for lists.

        Returns:
            [`BatchFeature`]: `input_ids`, `attention_mask`, `negative_input_ids`, `negative_attention_mask`, `grid`,
            as [`__call__`] does for `task="text_to_image"`.

        Raises:
            TypeError, ValueError: as in [`__call__`]; also if a row of `input_ids` holds no `<role>ASSISTANT</role>`.
        """
        wanted = self._wanted_grid("text_to_image", height, width, None)
        header = self._ids(self._header(*wanted))
        answer = self._ids(ANSWER)
        special = [self.tokenizer.eos_token_id, self.tokenizer.pad_token_id, self.tokenizer.mask_token_id]
        ends = {*special, self.begin_of_image_token_id, self._token_id("<|role_end|>", required=False)}
        rows = []
        for number, row in enumerate(to_lists(input_ids)):
            if attention_mask is None:
                padding = next((i for i, token in enumerate(row) if token != self.tokenizer.pad_token_id), len(row))
            else:
                mask = to_lists(attention_mask)[number]
                padding = mask.index(1) if 1 in mask else len(mask)
            kept = cut_answer(row[padding:], answer, ends, self.image_start_token_id)
            if kept is None:
                raise ValueError(f"`input_ids`: row {number} holds no {ANSWER}, after which a model would think.")
            rows.append(kept + header)
        negative = [self._ids(build_prompt("thinking", UNCONDITION)) + header] * len(rows)
        self._check_length(max(map(len, rows)), wanted)
        data: dict[str, Any] = {"grid": wanted}
        for prefix, sequences in (("", rows), ("negative_", negative)):
            ids, mask = left_pad(sequences, self.tokenizer.pad_token_id)
            data |= {f"{prefix}input_ids": ids, f"{prefix}attention_mask": mask}
        return BatchFeature(data, tensor_type=return_tensors, skip_tensor_conversion=["grid"])

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    # Grids

    def _lone_image_tokens(self, text: str) -> list[tuple[int, int]]:
        """Where each `<|image|>` without a header is. Tokens marked as a user's own words do not count."""
        stand_ins = [self.image_token] * text.count(self.image_token)
        _, found = self.get_text_with_replacements([text], stand_ins)
        spans = [entry["span"] for entry in found[0]]
        return [span for span in spans if not _HEADER_FOLLOWS.match(text, span[1])]

    def _header(self, height: int, width: int) -> str:
        return IMAGE_START + GRID_TOKEN.format(height) + GRID_TOKEN.format(width) + BEGIN_OF_IMAGE

    def _block(self, height: int, width: int) -> str:
        return self._header(height, width) + GRID_TOKEN.format(0) * (height * width) + IMAGE_END

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs: Any) -> str:
        """The text that stands for a processed picture. Serving engines call it."""
        _, height, width = (int(side) for side in image_inputs["image_grid_thw"][image_idx])
        return self._block(height, width)

    def _grids(
        self, image_processor: LLaDAUniImageProcessor, sample: list[Image.Image], resize_mode: str | None
    ) -> list[tuple[int, int]]:
        """The grids of a sample's pictures; refuses those that no header could name."""
        largest = len(self.grid_token_ids) - 1

        def grid_of(height: int, width: int) -> tuple[int, int]:
            return image_processor.get_grid(height, width, resize_mode, len(sample))

        grids = [grid_of(picture.height, picture.width) for picture in sample]
        for picture, grid in zip(sample, grids, strict=True):
            if max(grid) > largest:
                step = image_processor.size_multiple if resize_mode is None else 1
                refuse_grid(picture.height, picture.width, grid_of, largest, step)
        return grids

    def _wanted_grid(
        self, task: str | None, height: int | None, width: int | None, thinking_text: str | list[str] | None
    ) -> tuple[int, int] | None:
        """The grid to generate, from pixels; None where the task, or the first picture, decides."""
        if thinking_text is not None and task != "thinking":
            raise ValueError(f"`thinking_text` belongs to the task 'thinking', got `task`={task!r}.")
        if task not in ("text_to_image", "thinking", "editing"):
            if height is not None or width is not None:
                raise ValueError(f"`height` and `width` are those of a picture to generate; `task`={task!r} has none.")
            return None
        if (height is None) != (width is None):
            raise ValueError("`height` and `width` must be given together.")
        if height is None and task == "editing":
            return None
        unit, largest = self.image_processor.patch_size * UPSCALE, len(self.grid_token_ids) - 1
        height, width = (self.default_side, self.default_side) if height is None else (height, width)
        sides = {"height": height, "width": width}
        grid = tuple(codes_of_side(name, side, unit, largest) for name, side in sides.items())
        return grid if task != "thinking" or thinking_text is not None else None

    def _source_grid(self, grids: list[list[tuple[int, int]]]) -> tuple[int, int]:
        """The grid of the first picture of each sample, which must be the same."""
        first = {sample[0] for sample in grids}
        if len(first) > 1:
            different = ", ".join(f"{height} x {width}" for height, width in sorted(first))
            raise ValueError(
                f"`images`: the pictures to edit have different grids ({different}), and a batch has one; give "
                "`height` and `width`, or edit them one by one."
            )
        return first.pop()

    def _check_length(self, length: int, wanted: tuple[int, int] | None) -> None:
        """Refuses what would overrun the model's positions."""
        limit = self.max_position_embeddings
        if limit is not None and length + math.prod(wanted or (0,)) > limit:
            refuse_length(length, limit, wanted, self.image_processor.patch_size * UPSCALE)

    # Ids to text and codes

    def post_process(
        self, ids: torch.Tensor | list, skip_special_tokens: bool = True, **kwargs: Any
    ) -> list[list[str | torch.Tensor]]:
        """
        Takes apart what a model wrote.

        Args:
            ids (`torch.LongTensor` (batch, length) or (length,), or lists): Token ids.
            skip_special_tokens (`bool`, defaults to `True`): Whether to leave special tokens, and codes outside of a
                picture, out of the text.
            **kwargs: For the tokenizer's `decode`.

        Returns:
            For each row its parts in order: `str`, or `torch.LongTensor` (H, W) with the codes of a picture. A picture
            given as pixels, whose codes are not in `ids`, is left out; so is one that is not complete.

        Raises:
            ValueError: if there is a picture and `image_token_offset` is None.
        """
        return [self._parts(row, skip_special_tokens, **kwargs) for row in to_lists(ids)]

    def _parts(self, row: list[int], skip_special_tokens: bool, **kwargs: Any) -> list[str | torch.Tensor]:
        parts: list[str | torch.Tensor] = []
        for grid, ids in split_pictures(row, self._grid_at, self.image_end_token_id):
            if grid is not None and all(token == self.image_token_id for token in ids):
                continue  # given as pixels
            if grid is not None and self.image_token_offset is None:
                raise ValueError("`image_token_offset` of the processor is None, so codes cannot be told from text.")
            if grid is not None and len(ids) == math.prod(grid) and all(map(self._is_code, ids)):
                parts.append(torch.tensor(ids).view(grid) - self.image_token_offset)
            elif grid is None:
                ids = [token for token in ids if not (skip_special_tokens and self._is_code(token))]
                text = self.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens, **kwargs) if ids else ""
                parts += [text] if text else []
        return parts

    def _is_code(self, token: int) -> bool:
        if self.image_token_offset is None or token < self.image_token_offset:
            return False
        return self.codebook_size is None or token < self.image_token_offset + self.codebook_size

    def _grid_at(self, row: list[int], position: int) -> tuple[int, int] | None:
        """The grid that the header at `position` names, if there is one."""
        head = row[position : position + 4]
        if len(head) < 4 or head[0] != self.image_start_token_id or head[3] != self.begin_of_image_token_id:
            return None
        height, width = self._grid_number.get(head[1], 0), self._grid_number.get(head[2], 0)
        return (height, width) if height and width else None

    def post_process_image_text_to_text(
        self, generated_outputs: torch.Tensor | list, skip_special_tokens: bool = True, **kwargs: Any
    ) -> list[str]:
        """The text of each row, without its pictures; arguments as in [`post_process`]."""
        rows = self.post_process(generated_outputs, skip_special_tokens=skip_special_tokens, **kwargs)
        return ["".join(part for part in row if isinstance(part, str)) for row in rows]


__all__ = ["LLaDAUniProcessor"]
