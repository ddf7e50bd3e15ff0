"""Processor of LLaDA2.0-Uni: words and images to all a generate call needs, and ids back to text and codes."""

import math
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import ImageInput
from transformers.processing_utils import ProcessingKwargs, ProcessorMixin, TextKwargs, Unpack
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from .chat_messages import check_conversation, cut_chat, mark_message
from .chat_templates import CHAT_TEMPLATE, TEXT_CHAT, by_name, give_back_text_chat, text_chat_of, without_text_chat
from .checkpoint_stub import SavedWithStub
from .id_rows import encode_rows, left_pad, to_lists
from .image_codes import fetch_codes, fill_places
from .image_places import (
    HEADER_LENGTH,
    IMAGE_START,
    LONE_IMAGE,
    OPEN_PLACE,
    ImageTokens,
    deal_out,
    image_block,
    image_header,
    place_images,
)
from .image_processing_llada_uni import LLaDAUniImageProcessor, LLaDAUniImageProcessorKwargs
from .image_reading import check_rescaling
from .image_sizes import check_length, default_side, grid_of_sources, grid_to_generate, grids_of
from .model_answers import cut_thoughts, parts_of
from .prompts import (
    TASKS,
    UNCONDITION,
    build_prompt,
    flat_text,
    has_image,
    list_of_texts,
    write_task_prompts,
)
from .user_words import MARK_END, MARK_START, check_settings, encode_prompt, encode_prompts, mark_words


# What a call takes beside images and texts.
_ARGUMENTS = {"text_kwargs", "images_kwargs", "common_kwargs", *TextKwargs.__annotations__}
_ARGUMENTS |= set(LLaDAUniImageProcessorKwargs.__annotations__)
_ARGUMENTS -= {"return_tensors"}  # an argument of chats, too


class LLaDAUniProcessor(SavedWithStub, ProcessorMixin):
    r"""
    Wraps an image processor and a tokenizer. A call returns all that a generate call needs:

    ```python
    model.generate(**processor(images=image, text="What is this?", task="understanding"))
    model.generate_image_codes(**processor(text="a cat", task="text_to_image", height=1024, width=1024))
    model.generate_image_codes(**processor(images=image, text="make it night", task="editing"))
    ```

    In a sequence an image of H x W codes reads `<|image|> <|reserved_token_H|> <|reserved_token_W|> <boi>`, H*W codes
    in raster order, `<|/image|>`; here `<|reserved_token_0|>` stands for each code of an image given as pixels.

    Users' words are words, in a task and in a chat: a control token that somebody types is encoded as text. Prompts
    that are to speak control tokens, such as `<|mask|>` for what the model fills in, are given as `text` without a
    `task`. Outputs are torch tensors, left padded; `return_tensors` and `padding` say otherwise.

    Args:
        image_processor ([`LLaDAUniImageProcessor`]): For the images.
        tokenizer ([`PreTrainedTokenizerFast`]): Must know the tokens above; the ids are looked up in it.
        chat_template (`str` or `dict[str, str]`, *optional*): Jinja template of a chat with images, or several by
            name; defaults to the released format. Chats without images use the tokenizer's own template where it has
            one.
        image_token_offset (`int`, *optional*): Image code `c` is token `image_token_offset + c`. Needed to tell codes
            from text in [`post_process`].
        codebook_size (`int`, *optional*): Number of image codes; `None` for all ids from `image_token_offset` on.
        max_position_embeddings (`int`, *optional*): What the model can read and write in one sequence; `None` if
            unknown, and nothing is refused for its length then.

    Raises:
        ValueError: if the tokenizer lacks one of the tokens.
    """

    # Defaults of a call; upstream's place for them.
    text_kwargs: TextKwargs = {
        "add_special_tokens": False,
        "padding": True,
        "return_tensors": "pt",
        "return_token_type_ids": False,
    }

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
        give_back_text_chat(self.tokenizer)
        self.chat_template = without_text_chat(chat_template)
        self.image_token_offset = image_token_offset
        self.codebook_size = codebook_size
        self.max_position_embeddings = max_position_embeddings

        self.image_token = IMAGE_START  # what finished prompts and chat templates write for an image
        self._image_tokens = ImageTokens(self.tokenizer)
        self.image_start_token_id = self._image_tokens.start
        self.image_end_token_id = self._image_tokens.end
        self.begin_of_image_token_id = self._image_tokens.begin
        self.grid_token_ids = self._image_tokens.grid
        self.image_token_id = self.grid_token_ids[0]  # stands for a code that the model fills in

    @property
    def default_side(self) -> int:
        """Pixels along an image to generate where none are named: 1024 for the released model."""
        return default_side(self.image_processor)

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", *self.image_processor.model_input_names]

    # Chats

    def save_pretrained(
        self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any
    ) -> list[str]:
        """As any processor's; both chat templates are kept."""
        own = self.chat_template
        text_chat = text_chat_of(self.tokenizer, own)
        if text_chat is not None:
            self.chat_template = {**by_name(own), TEXT_CHAT: text_chat}
        try:
            return super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)
        finally:
            self.chat_template = own

    def apply_chat_template(  # type: ignore[override]  # what is not named here is passed on
        self,
        conversation: list[dict] | list[list[dict]],
        chat_template: str | None = None,
        *,
        tokenize: bool = False,
        sanitize_control_tokens: bool = True,
        processor_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """
        As any processor's. Messages with an image (`{"type": "image", "image" or "url" or "path" or "base64": ...}`)
        are written in the released format, the images of a message before its words; a chat without any image is
        written by the tokenizer's own template where it has one.

        Args:
            conversation (`list[dict]` or a list of these): The chat, or several.
            chat_template (`str`, *optional*): Another template, or the name of one.
            tokenize (`bool`, defaults to `False`): Return ids, and not the prompt as a string.
            sanitize_control_tokens (`bool`, defaults to `True`): Encode control tokens in the messages as the text
                they are. Only ids can tell them apart: a string (`tokenize=False`) holds them as they were written.
            processor_kwargs (`dict`, *optional*): For [`__call__`]. `truncation` to `max_length` cuts the words of the
                last user message, and no more.

        Raises:
            TypeError, ValueError: if `conversation` is empty or no chat, or as in [`__call__`].
        """
        check_conversation(conversation)
        conversations, is_batched = self._normalize_conversations(conversation)
        # Given beside them, as upstream takes them: to the processor, and not to the template.
        own: dict[str, Any] = {name: kwargs.pop(name) for name in list(kwargs) if name in _ARGUMENTS}
        processor_kwargs = {**(processor_kwargs or {}), **own}
        if tokenize:
            mark: Callable[[dict], dict] = partial(mark_message, self.tokenizer) if sanitize_control_tokens else dict
            if sanitize_control_tokens:
                given = {name: kwargs[name] for name in ("tools", "documents") if name in kwargs}
                kwargs |= mark_words(self.tokenizer, given)
            merged = self._merge_kwargs(**processor_kwargs)
            max_length = self._max_length(merged["text_kwargs"])
            if max_length is not None:

                def num_tokens(num_image_tokens: int, chat: list[dict]) -> int:
                    prompt = self.apply_chat_template(list(map(mark, chat)), chat_template, **kwargs)
                    return len(encode_prompt(self.tokenizer, prompt)[0]) + num_image_tokens

                for number, chat in enumerate(conversations):
                    num_image_tokens = self._num_image_tokens(chat, merged["images_kwargs"])
                    conversations[number] = cut_chat(chat, partial(num_tokens, num_image_tokens), max_length)
            conversations = [list(map(mark, chat)) for chat in conversations]
            processor_kwargs["sanitize_control_tokens"] = sanitize_control_tokens
        write: Callable[..., Any] = partial(super().apply_chat_template, processor_kwargs=processor_kwargs, **kwargs)

        templates = [chat_template or self._text_template(chat, kwargs.get("tools")) for chat in conversations]
        if chat_template is None:
            conversations = [
                chat if template is None else [flat_text(message) for message in chat]
                for chat, template in zip(conversations, templates, strict=True)
            ]
        if len(set(templates)) == 1:
            chats = conversations if is_batched else conversations[0]
            return write(chats, chat_template=templates[0], tokenize=tokenize)
        # A batch in which some chats have images and some have none reads as its rows would alone.
        if kwargs.get("return_assistant_tokens_mask"):
            raise ValueError(
                "`return_assistant_tokens_mask` needs a batch in which all chats have images, or none has."
            )
        prompts = [write(*row) for row in zip(conversations, templates, strict=True)]
        if not tokenize:
            return prompts
        images, *_ = self._multimodal_inputs_from_conversations(conversations, {})
        if kwargs.get("return_tensors", "auto") != "auto":
            processor_kwargs["return_tensors"] = kwargs["return_tensors"]
        inputs = self(images=images, text=prompts, **processor_kwargs)
        return inputs if kwargs.get("return_dict") else inputs["input_ids"]

    def _text_template(self, chat: list[dict], tools: list | None) -> str | None:
        """The tokenizer's own template, for a chat without images; None for what ours writes."""
        if text_chat_of(self.tokenizer, self.chat_template) is None or any(map(has_image, chat)):
            return None
        return self.tokenizer.get_chat_template(tools=tools)

    def _max_length(self, text_kwargs: dict[str, Any]) -> int | None:
        """The tokens that prompts are to be cut to; None where they are not."""
        if text_kwargs.get("truncation") in (None, False, "do_not_truncate"):
            return None
        max_length = text_kwargs.get("max_length")
        return self.tokenizer.model_max_length if max_length is None else max_length

    def _num_image_tokens(self, chat: list[dict], images_kwargs: dict[str, Any]) -> int:
        """The tokens of a chat's images, beside the `<|image|>` of each."""
        images, *_ = self._multimodal_inputs_from_conversations([chat], {})
        image_processor, images_kwargs = self._image_settings(images_kwargs)
        sample, mode = image_processor.fetch_images(images[0]), images_kwargs["resize_mode"]
        grids = grids_of(image_processor, sample, mode, self._image_tokens.largest_side)
        return sum(HEADER_LENGTH + math.prod(grid) for grid in grids)  # with `<|/image|>`, without `<|image|>`

    def _image_settings(
        self, images_kwargs: dict[str, Any], task: str | None = None
    ) -> tuple[LLaDAUniImageProcessor, dict[str, Any]]:
        """The image processor with a call's settings, and the rest of them, with the size rule of the task."""
        image_processor, images_kwargs = self.image_processor.configured(**images_kwargs)
        images_kwargs.pop("return_tensors", None)
        resize_mode = "editing" if task == "editing" else image_processor.resize_mode
        return image_processor, {"resize_mode": resize_mode, **images_kwargs}

    # Words and images to ids

    def __call__(
        self,
        images: ImageInput | list[list[Any]] | None = None,
        text: str | list[str] | None = None,
        task: str | None = None,
        height: int | None = None,
        width: int | None = None,
        thinking_text: str | list[str] | None = None,
        image_codes: torch.Tensor | list | None = None,
        **kwargs: Unpack[ProcessingKwargs],
    ) -> BatchFeature:
        """
        Args:
            images: An image, a list of images, or a list of lists with one list per text; anything
                [`LLaDAUniImageProcessor.fetch_images`] reads. A flat list belongs to a single text; with several texts
                it is dealt out in order: as many as each text has `<|image|>`, or with a `task` one to each.
            text (`str` or `list[str]`): With `task`, the user's own words; images go in front of them. Without,
                finished prompts, which may hold control tokens, and in which each `<|image|>` without a header becomes
                the block of its image.
            task (`str`, *optional*): `"understanding"`, `"text_to_image"`, `"thinking"`, `"editing"` (needs an image;
                several are references) or `"interleaved"`.
            height (`int`, *optional*): Height in pixels of the image to generate, a multiple of 32 (of two patches).
                Default [`default_side`], 1024; for editing twice the first image's, after its preprocessing.
            width (`int`, *optional*): Its width.
            thinking_text (`str` or `list[str]`, *optional*): For `task="thinking"`: thoughts already written; then the
                header of the image follows them. Without it, let the model write and call [`add_image_header`].
            image_codes (`torch.LongTensor` (H, W), *optional*): In place of `images`: the codes of an image, such as
                `generate_image_codes` writes and `get_image_codes` reads; lists as those of images. Their tokens stand
                in the ids, and nothing is left for the vision tower.
            **kwargs: Of the tokenizer and of the image processor (`resize_mode`, ...). `return_tensors` is `"pt"`
                (also `"np"`, or `None` for lists). `truncation` to `max_length` cuts the user's words with a `task`,
                and finished prompts as the tokenizer does. `sanitize_control_tokens`, `True` with a `task`, says that
                control tokens in the words are text; of finished prompts, which are `False`, that such are marked as
                [`apply_chat_template`] does it.

        Returns:
            [`BatchFeature`]: `input_ids` and `attention_mask` (batch, length), left padded; with `images`
            `pixel_values` (num_patches, 768) and `image_grid_thw` (num_images, 3). For text_to_image, editing, and
            thinking with `thinking_text`: `grid` (H, W) in codes, and the negative prompts for guidance
            `negative_input_ids`, `negative_attention_mask` (no text) and for editing `negative_image_input_ids`,
            `negative_image_attention_mask` (no image). For interleaved: `negative_input_ids` and
            `negative_attention_mask` (neither text nor image), and `uncondition_ids` (1, n), the ids that stand for
            no text.

        Raises:
            TypeError: if an argument has the wrong type.
            ValueError: if an argument has a value that cannot be used; the message names it, and the nearest valid
                value where there is one. All but unreadable images are found before any image is processed.
        """
        settings: dict[str, Any] = dict(kwargs)
        for name in ("videos", "audio"):
            if settings.pop(name, None) is not None:
                raise ValueError(f"`{name}`: LLaDA2.0-Uni reads text and images only.")
        if "right" in (kwargs.get("padding_side"), kwargs.get("text_kwargs", {}).get("padding_side")):
            raise ValueError("`padding_side` must be 'left': the model continues the end of each row.")
        if task is not None and task not in TASKS:
            raise ValueError(f"`task` must be one of {', '.join(TASKS)} or None, got {task!r}.")
        merged = self._merge_kwargs(tokenizer_init_kwargs=self.tokenizer.init_kwargs, **settings)
        text_kwargs = merged["text_kwargs"]
        return_tensors = text_kwargs.pop("return_tensors")
        is_marked = text_kwargs.pop("sanitize_control_tokens", task is not None)
        image_processor, images_kwargs = self._image_settings(merged["images_kwargs"], task)
        if text is None:
            if image_codes is not None or images is None or task is not None:
                missing = task is not None or image_codes is not None
                raise ValueError("`text` is missing." if missing else "At least one of `images` and `text` is needed.")
            given: Any = images  # of which transformers' ImageInput leaves out lists of lists
            return image_processor(given, return_tensors=return_tensors, **images_kwargs)

        # 1. Which images belong to which text, and how many codes they become.
        texts = list_of_texts(text, "text")
        if not all(entry.strip() for entry in texts):
            raise ValueError("`text` is empty; a prompt needs at least one word.")
        wanted = self._wanted_grid(task, height, width, thinking_text)
        counts = [len(LONE_IMAGE.findall(entry)) for entry in texts] if task is None else None
        mode, largest = images_kwargs["resize_mode"], self._image_tokens.largest_side
        has_codes, name = image_codes is not None, "images" if image_codes is None else "image_codes"
        if has_codes:
            if images is not None:
                raise ValueError("`images` and `image_codes` are two ways to give the same images: give one of them.")
            images = self.fetch_codes(image_codes)
        elif images is not None:
            check_rescaling(images, images_kwargs.get("do_rescale", image_processor.do_rescale))
            images = image_processor.fetch_images(images, images_kwargs.get("input_data_format"))
        samples = deal_out(images, len(texts), counts, name)
        if task in ("text_to_image", "thinking") and any(samples):
            raise ValueError(f"`{name}` cannot be given with task {task!r}; 'editing' and 'interleaved' take images.")
        if task == "editing" and not all(samples):
            raise ValueError(f"`{name}` is missing: the task 'editing' needs at least one image for each text.")
        if has_codes:
            grids = [[tuple(codes.shape) for codes in sample] for sample in samples]
        else:
            grids = [grids_of(image_processor, sample, mode, largest) for sample in samples]
        blocks = [[image_block(*grid) for grid in sample] for sample in grids]

        # 2. The prompt and its negative prompts, as text and as ids.
        extras: dict[str, Any] = {}
        if task is None:
            placed = [place_images(*row) for row in zip(texts, blocks, strict=True)]
            prompts = {"": [entry for entry, _ in placed]}
            if merged["return_text_replacement_offsets"]:
                extras["text_replacement_offsets"] = [found for _, found in placed]
        else:
            if task == "editing" and wanted is None:
                wanted = grid_of_sources(grids)
            mark = partial(mark_words, self.tokenizer) if is_marked else str
            max_length = self._max_length(text_kwargs)
            text_kwargs.pop("truncation", None)
            if text_kwargs.get("padding") != "max_length":
                text_kwargs.pop("max_length", None)
            header = "" if wanted is None else image_header(*wanted)
            prompts = write_task_prompts(task, texts, blocks, header, thinking_text, mark, self.tokenizer, max_length)
        data: dict[str, Any] = {}
        for prefix, rows in prompts.items():
            encoded = self._encode(rows, wanted, is_marked, text_kwargs)
            data |= {prefix + name: value for name, value in encoded.items()}
        if task == "interleaved":
            data["uncondition_ids"] = [self._ids(UNCONDITION)]
        if merged["return_mm_token_type_ids"]:
            data["mm_token_type_ids"] = self.create_mm_token_type_ids(data["input_ids"])
        if wanted is not None:
            extras["grid"] = wanted

        # 3. The images.
        if has_codes:
            offset = self.image_token_offset
            assert offset is not None  # `fetch_codes` has asked
            for name in (f"{prefix}input_ids" for prefix in prompts):
                data[name] = fill_places(data[name], samples, self.image_token_id, offset)
        elif any(samples):
            # transformers' ImageInput leaves out the lists of lists that its processors take.
            data |= image_processor(samples, **images_kwargs)  # type: ignore[arg-type]
        return BatchFeature({**data, **extras}, tensor_type=return_tensors, skip_tensor_conversion=list(extras))

    def _encode(
        self, rows: list[str], wanted: tuple[int, int] | None, is_marked: bool, text_kwargs: dict[str, Any]
    ) -> dict[str, list[list[int]]]:
        settings = {**text_kwargs, "padding_side": "left", "return_attention_mask": True}
        if len(rows) == 1 and self.tokenizer.pad_token_id is None:
            settings["padding"] = False
        for name in ("return_mm_token_type_ids", "return_text_replacement_offsets"):
            settings.pop(name, None)
        if is_marked:
            check_settings(settings)
        if is_marked and any(MARK_START in row or MARK_END in row for row in rows):
            encoded = encode_prompts(self.tokenizer, rows, self._max_length(settings), settings)
        else:
            encoded = encode_rows(self.tokenizer, rows, settings)
        for row, ids in zip(rows, encoded["input_ids"], strict=True):
            if settings.get("truncation") and ids.count(self.image_token_id) != len(OPEN_PLACE.findall(row)):
                raise ValueError("`truncation` to `max_length` would cut into an image.")
        length = max(sum(mask) for mask in encoded["attention_mask"])
        check_length(length, self.max_position_embeddings, wanted, self.image_processor)
        return encoded

    def fetch_codes(self, image_codes: Any) -> Any:
        """
        Checks images that are given as codes.

        Args:
            image_codes: A `torch.LongTensor` (H, W), a list of these, or a list of lists.

        Returns:
            The same, on the CPU.

        Raises:
            TypeError, ValueError: naming `image_codes`, for what are no codes of the model.
        """
        if self.image_token_offset is None:
            raise ValueError("`image_codes` need the processor's `image_token_offset`, which is None.")
        return fetch_codes(image_codes, self.codebook_size, self._image_tokens.largest_side)

    def add_image_header(
        self,
        input_ids: torch.Tensor | list[list[int]],
        attention_mask: torch.Tensor | list[list[int]] | None = None,
        height: int | None = None,
        width: int | None = None,
        return_tensors: str | None = "pt",
    ) -> BatchFeature:
        """
        After `task="thinking"` and `generate`: puts the header of the wanted image behind the model's thoughts.

        What the model wrote of a header itself is cut: all from the last `<|image|>` of its answer on, or from
        `<boi>` or an end token.

        Args:
            input_ids (`torch.LongTensor` (batch, prompt + new)): What `generate` returned.
            attention_mask (`torch.LongTensor` (batch, prompt) or longer, *optional*): That of the prompts. Without it,
                pad tokens in front are taken for padding.
            height (`int`, *optional*): Height in pixels of the image, a multiple of 32. Default [`default_side`].
            width (`int`, *optional*): Its width.
            return_tensors (`str`, *optional*, defaults to `"pt"`): `"pt"`, `"np"` or `None` for lists.

        Returns:
            [`BatchFeature`]: `input_ids`, `attention_mask`, `negative_input_ids`, `negative_attention_mask`, `grid`,
            as [`__call__`] does for `task="text_to_image"`.

        Raises:
            TypeError, ValueError: as in [`__call__`]; also if a row of `input_ids` holds no `<role>ASSISTANT</role>`.
        """
        wanted = grid_to_generate(self.image_processor, height, width, self._image_tokens.largest_side)
        header, masks = self._ids(image_header(*wanted)), None if attention_mask is None else to_lists(attention_mask)
        thoughts = cut_thoughts(to_lists(input_ids), masks, self.tokenizer, self._image_tokens)
        rows = [kept + header for kept in thoughts]
        negative = [self._ids(build_prompt("thinking", UNCONDITION)) + header] * len(rows)
        check_length(max(map(len, rows)), self.max_position_embeddings, wanted, self.image_processor)
        data: dict[str, Any] = {"grid": wanted}
        for prefix, sequences in (("", rows), ("negative_", negative)):
            padded, masks = left_pad(sequences, self.tokenizer.pad_token_id)
            data |= {f"{prefix}input_ids": padded, f"{prefix}attention_mask": masks}
        return BatchFeature(data, tensor_type=return_tensors, skip_tensor_conversion=["grid"])

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _wanted_grid(
        self, task: str | None, height: int | None, width: int | None, thinking_text: str | list[str] | None
    ) -> tuple[int, int] | None:
        """The grid to generate, from pixels; None where the task, or the first image, decides."""
        if thinking_text is not None and task != "thinking":
            raise ValueError(f"`thinking_text` belongs to the task 'thinking', got `task`={task!r}.")
        if task not in ("text_to_image", "thinking", "editing"):
            if height is not None or width is not None:
                raise ValueError(f"`height` and `width` are those of an image to generate; `task`={task!r} has none.")
            return None
        if height is None and width is None and task == "editing":
            return None
        grid = grid_to_generate(self.image_processor, height, width, self._image_tokens.largest_side)
        return grid if task != "thinking" or thinking_text is not None else None

    # Ids to text and codes

    def post_process(
        self, ids: torch.Tensor | list, skip_special_tokens: bool = True, **kwargs: Any
    ) -> list[list[str | torch.Tensor]]:
        """
        Takes apart what a model wrote.

        Args:
            ids (`torch.LongTensor` (batch, length) or (length,), or lists): Token ids.
            skip_special_tokens (`bool`, defaults to `True`): Whether to leave special tokens, and codes outside of an
                image, out of the text.
            **kwargs: For the tokenizer's `decode`.

        Returns:
            For each row its parts in order: `str`, or `torch.LongTensor` (H, W) with the codes of an image. An image
            given as pixels, whose codes are not in `ids`, is left out; so is one that is not complete.

        Raises:
            ValueError: if there is an image and `image_token_offset` is None.
        """
        known = (self.tokenizer, self._image_tokens, self.image_token_offset, self.codebook_size)
        return [parts_of(row, *known, skip_special_tokens, **kwargs) for row in to_lists(ids)]

    def post_process_image_text_to_text(
        self, generated_outputs: torch.Tensor | list, skip_special_tokens: bool = True, **kwargs: Any
    ) -> list[str]:
        """The text of each row, without its images; arguments as in [`post_process`]."""
        rows = self.post_process(generated_outputs, skip_special_tokens=skip_special_tokens, **kwargs)
        return ["".join(part for part in row if isinstance(part, str)) for row in rows]
