"""Processor of LLaDA2.0-Uni: words and images to all a generate call needs, and ids back to text and codes."""

import math
import os
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from PIL import Image
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import ImageInput
from transformers.processing_utils import ProcessingKwargs, ProcessorMixin, TextKwargs, Unpack
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from .chat_messages import check_conversation, cut_chat, mark_message
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
    has_image,
    left_pad,
    list_of_texts,
    refuse_grid,
    refuse_length,
    replace,
    replacements,
    split_images,
    to_lists,
)
from .user_words import MARK_END, MARK_START, cut_words, encode_prompt, mark_words


IMAGE_START, IMAGE_END, BEGIN_OF_IMAGE = "<|image|>", "<|/image|>", "<boi>"
GRID_TOKEN = "<|reserved_token_{}|>"
UPSCALE = 2  # the decoder draws at twice the resolution of the image tokenizer

# An `<|image|>` that stands for an image: no words of a user, and without a header yet, which begins with a number.
_NUMBER = re.escape(GRID_TOKEN).replace(r"\{\}", r"\d+")
_LONE_IMAGE = re.compile(f"(?<!{MARK_START}){re.escape(IMAGE_START)}(?!{_NUMBER})")
_PLACEHOLDER = re.compile(f"(?<!{MARK_START}){re.escape(GRID_TOKEN.format(0))}")

# Name under which the tokenizer's own chat template is saved: both would be `chat_template.jinja`.
_TEXT_CHAT = "text_chat"


def _named(templates: str | dict[str, str] | None) -> dict[str, str]:
    """Chat templates by name; one without a name is the default."""
    return templates if isinstance(templates, dict) else {"default": templates} if templates else {}


def _without_text_chat(templates: dict[str, str]) -> str | dict[str, str]:
    """Named templates without that of text-only chats; the default on its own needs no name."""
    rest = {name: template for name, template in templates.items() if name != _TEXT_CHAT}
    return rest["default"] if list(rest) == ["default"] else rest


class LLaDAUniProcessor(ProcessorMixin):
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
        self._separate_chat_templates(chat_template)
        self.image_token_offset = image_token_offset
        self.codebook_size = codebook_size
        self.max_position_embeddings = max_position_embeddings

        self.image_token = IMAGE_START  # what finished prompts and chat templates write for an image
        self.image_start_token_id = self._token_id(IMAGE_START)
        self.image_end_token_id = self._token_id(IMAGE_END)
        self.begin_of_image_token_id = self._token_id(BEGIN_OF_IMAGE)
        self.grid_token_ids = [self._token_id(GRID_TOKEN.format(0))]
        while (token_id := self._find_token_id(GRID_TOKEN.format(len(self.grid_token_ids)))) is not None:
            self.grid_token_ids.append(token_id)
        self.image_token_id = self.grid_token_ids[0]  # stands for a code that the model fills in
        if len(self.grid_token_ids) < 2:
            raise ValueError(f"`tokenizer` has no token {GRID_TOKEN.format(1)}, so no image could have a header.")
        self._grid_number = {token_id: number for number, token_id in enumerate(self.grid_token_ids)}

    @property
    def default_side(self) -> int:
        """Pixels along an image to generate where none are named: twice the largest square that the rule of editing
        leaves, 1024 for the released model."""
        step = self.image_processor.size_multiple
        return UPSCALE * (math.isqrt(self.image_processor.editing_max_pixels) // step * step)

    def _token_id(self, token: str) -> int:
        token_id = self._find_token_id(token)
        if token_id is None:
            raise ValueError(f"`tokenizer` has no token {token}; is it a tokenizer of LLaDA2.0-Uni?")
        return token_id

    def _find_token_id(self, token: str) -> int | None:
        token_id = self.tokenizer.convert_tokens_to_ids(token)
        is_known = token_id is not None and self.tokenizer.convert_ids_to_tokens(token_id) == token
        return token_id if is_known else None  # unknown tokens have an id, or none

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", *self.image_processor.model_input_names]

    # Chat templates: the tokenizer's own and ours have the same file name, so ours is saved as the default and the
    # tokenizer's beside it; both get their own back when loaded. Other named ones belong to both, as upstream has it.

    def _separate_chat_templates(self, chat_template: str | dict[str, str] | None) -> None:
        templates = self.tokenizer.chat_template
        if isinstance(templates, dict) and _TEXT_CHAT in templates:
            templates = {**templates, "default": templates[_TEXT_CHAT]}
            self.tokenizer.chat_template = _without_text_chat(templates)
        if isinstance(chat_template, dict):
            chat_template = _without_text_chat(chat_template)
        self.chat_template = chat_template or CHAT_TEMPLATE

    def _text_chat(self) -> str | None:
        """The tokenizer's own template; None if it has none, or only that of chats with images from the same file."""
        template = _named(self.tokenizer.chat_template).get("default")
        return None if template in (None, CHAT_TEMPLATE, _named(self.chat_template).get("default")) else template

    def save_pretrained(
        self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any
    ) -> list[str]:
        """As any processor's; both chat templates are kept."""
        own, text_chat = self.chat_template, self._text_chat()
        if text_chat is not None:
            self.chat_template = {**_named(own), _TEXT_CHAT: text_chat}
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
        limits: dict[str, Any] = {name: kwargs.pop(name) for name in ("truncation", "max_length") if name in kwargs}
        processor_kwargs = {**(processor_kwargs or {}), **limits}
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
        if self._text_chat() is None or any(map(has_image, chat)):
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
        grids = self._grids(image_processor, image_processor.fetch_images(images[0]), images_kwargs["resize_mode"])
        return sum(4 + math.prod(grid) for grid in grids)  # two numbers, `<boi>`, the codes, `<|/image|>`

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
        images: ImageInput | None = None,
        text: str | list[str] | None = None,
        task: str | None = None,
        height: int | None = None,
        width: int | None = None,
        thinking_text: str | list[str] | None = None,
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
            **kwargs: Of the tokenizer and of the image processor (`resize_mode`, ...). `return_tensors` is `"pt"`
                (also `"np"`, or `None` for lists). `truncation` to `max_length` cuts the user's words with a `task`,
                and finished prompts as the tokenizer does. `sanitize_control_tokens`, `True` with a `task`, says that
                control tokens in the words are text; of finished prompts, which are `False`, that such are marked as
                [`apply_chat_template`] does it.

        Returns:
            [`BatchFeature`]: `input_ids` and `attention_mask` (batch, length), left padded; with images
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
            if images is None or task is not None:
                raise ValueError("`text` is missing." if task else "At least one of `images` and `text` is needed.")
            return image_processor(images, return_tensors=return_tensors, **images_kwargs)

        # 1. Which images belong to which text, and how many codes they become.
        texts = list_of_texts(text, "text")
        if not all(entry.strip() for entry in texts):
            raise ValueError("`text` is empty; a prompt needs at least one word.")
        wanted = self._wanted_grid(task, height, width, thinking_text)
        spans = [self._lone_image_tokens(entry) if task is None else [] for entry in texts]
        if images is not None:
            images = image_processor.fetch_images(images, images_kwargs.get("input_data_format"))
        samples = deal_out(images, len(texts), [len(found) for found in spans] if task is None else None)
        if task in ("text_to_image", "thinking") and any(samples):
            raise ValueError(f"`images` cannot be given with task {task!r}; 'editing' and 'interleaved' take images.")
        if task == "editing" and not all(samples):
            raise ValueError("`images` is missing: the task 'editing' needs at least one image for each text.")
        grids = [self._grids(image_processor, sample, images_kwargs["resize_mode"]) for sample in samples]
        blocks = [[self._block(*grid) for grid in sample] for sample in grids]

        # 2. The prompt and its negative prompts, as text and as ids.
        extras: dict[str, Any] = {}
        if task is None:
            offsets = [replacements(*row) for row in zip(texts, spans, blocks, strict=True)]
            prompts = {"": [replace(entry, found) for entry, found in zip(texts, offsets, strict=True)]}
            if merged["return_text_replacement_offsets"]:
                extras["text_replacement_offsets"] = offsets
        else:
            if task == "editing" and wanted is None:
                wanted = self._source_grid(grids)
            mark = partial(mark_words, self.tokenizer) if is_marked else str
            max_length = self._max_length(text_kwargs)
            text_kwargs.pop("truncation", None)
            if text_kwargs.get("padding") != "max_length":
                text_kwargs.pop("max_length", None)
            prompts = self._task_prompts(task, texts, blocks, wanted, thinking_text, mark, max_length)
        data: dict[str, Any] = {}
        for prefix, rows in prompts.items():
            data |= {
                prefix + name: value for name, value in self._encode(rows, wanted, is_marked, text_kwargs).items()
            }
        if task == "interleaved":
            data["uncondition_ids"] = [self._ids(UNCONDITION)]
        if merged["return_mm_token_type_ids"]:
            data["mm_token_type_ids"] = self.create_mm_token_type_ids(data["input_ids"])
        if wanted is not None:
            extras["grid"] = wanted

        # 3. The images.
        if any(samples):
            # transformers' ImageInput leaves out the lists of lists that its processors take.
            data |= image_processor(samples, **images_kwargs)  # type: ignore[arg-type]
        return BatchFeature({**data, **extras}, tensor_type=return_tensors, skip_tensor_conversion=list(extras))

    def _task_prompts(
        self,
        task: str,
        texts: list[str],
        blocks: list[list[str]],
        wanted: tuple[int, int] | None,
        thinking_text: str | list[str] | None,
        mark: Callable[[str], str],
        max_length: int | None,
    ) -> dict[str, list[str]]:
        """The prompts of a task and its negative prompts, by the prefix of their names in the output."""
        sources = ["".join(sample) for sample in blocks]
        thoughts = [""] * len(texts) if thinking_text is None else list_of_texts(thinking_text, "thinking_text")
        if len(thoughts) != len(texts):
            raise ValueError(f"`thinking_text` has {len(thoughts)} entries for {len(texts)} texts.")
        header = "" if wanted is None else self._header(*wanted)

        def write(source: str, thought: str, words: str) -> str:
            return build_prompt(task, mark(words), source) + mark(thought) + header

        if max_length is not None:

            def num_tokens(source: str, thought: str, words: str) -> int:
                return len(encode_prompt(self.tokenizer, write(source, thought, words))[0])

            texts = [
                cut_words(words, partial(num_tokens, *frame), max_length)
                for words, *frame in zip(texts, sources, thoughts, strict=True)
            ]
        prompts = {"": [write(*row) for row in zip(sources, thoughts, texts, strict=True)]}
        if wanted is not None:
            prompts["negative_"] = [build_prompt(task, UNCONDITION, source) + header for source in sources]
        elif task == "interleaved":  # here also the start of the negative prompt without image
            prompts["negative_"] = [build_prompt(task, UNCONDITION)] * len(texts)
        if task == "editing":
            lone = [IMAGE_START * len(sample) for sample in blocks]
            prompts["negative_image_"] = [write(image, "", words) for image, words in zip(lone, texts, strict=True)]
        return prompts

    def _encode(
        self, rows: list[str], wanted: tuple[int, int] | None, is_marked: bool, text_kwargs: dict[str, Any]
    ) -> dict[str, list[list[int]]]:
        if len(rows) > 1 and self.tokenizer.pad_token_id is None:
            raise ValueError("`tokenizer` has no pad token, so a batch of prompts cannot be padded.")
        settings = {**text_kwargs, "padding_side": "left", "return_attention_mask": True}
        if self.tokenizer.pad_token_id is None:
            settings["padding"] = False
        for name in ("return_mm_token_type_ids", "return_text_replacement_offsets"):
            settings.pop(name, None)
        has_marks = is_marked and any(MARK_START in row or MARK_END in row for row in rows)
        encoded = self._encode_marked(rows, settings) if has_marks else dict(self.tokenizer(rows, **settings))
        for row, ids in zip(rows, encoded["input_ids"], strict=True):
            if settings.get("truncation") and ids.count(self.image_token_id) != len(_PLACEHOLDER.findall(row)):
                raise ValueError("`truncation` to `max_length` would cut into an image.")
        self._check_length(max(sum(mask) for mask in encoded["attention_mask"]), wanted)
        return encoded

    def _encode_marked(self, rows: list[str], settings: dict[str, Any]) -> dict[str, list[list]]:
        """As the tokenizer would encode prompts with marked words."""
        encoded = [encode_prompt(self.tokenizer, row) for row in rows]
        names = ["padding", "pad_to_multiple_of", "padding_side"]
        names += ["max_length"] if settings["padding"] == "max_length" else []
        ids = [ids[: self._max_length(settings)] for ids, _ in encoded]
        padded = self.tokenizer.pad({"input_ids": ids}, **{name: settings.get(name) for name in names})
        if settings.get("return_offsets_mapping"):
            padding = [mask.count(0) for mask in padded["attention_mask"]]
            spans = [spans[: self._max_length(settings)] for _, spans in encoded]
            padded["offset_mapping"] = [[(0, 0)] * count + row for count, row in zip(padding, spans, strict=True)]
        return dict(padded)

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
        wanted = self._grid_to_generate(height, width)
        header = self._ids(self._header(*wanted))
        answer = self._ids(ANSWER)
        special = [self.tokenizer.eos_token_id, self.tokenizer.pad_token_id, self.tokenizer.mask_token_id]
        ends = {*special, self.begin_of_image_token_id, self._find_token_id("<|role_end|>")}
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
            padded, masks = left_pad(sequences, self.tokenizer.pad_token_id)
            data |= {f"{prefix}input_ids": padded, f"{prefix}attention_mask": masks}
        return BatchFeature(data, tensor_type=return_tensors, skip_tensor_conversion=["grid"])

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    # Grids

    def _lone_image_tokens(self, text: str) -> list[tuple[int, int]]:
        """Where each `<|image|>` without a header is. Tokens marked as a user's own words do not count."""
        return [match.span() for match in _LONE_IMAGE.finditer(text)]

    def _header(self, height: int, width: int) -> str:
        return IMAGE_START + GRID_TOKEN.format(height) + GRID_TOKEN.format(width) + BEGIN_OF_IMAGE

    def _block(self, height: int, width: int) -> str:
        return self._header(height, width) + GRID_TOKEN.format(0) * (height * width) + IMAGE_END

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs: Any) -> str:
        """The text that stands for a processed image. Serving engines call it."""
        _, height, width = (int(side) for side in image_inputs["image_grid_thw"][image_idx])
        return self._block(height, width)

    def _grids(
        self, image_processor: LLaDAUniImageProcessor, sample: list[Image.Image], resize_mode: str | None
    ) -> list[tuple[int, int]]:
        """The grids of a sample's images; refuses those that no header could name."""
        largest = len(self.grid_token_ids) - 1

        def grid_of(height: int, width: int) -> tuple[int, int]:
            return image_processor.get_grid(height, width, resize_mode, len(sample))

        grids = [grid_of(image.height, image.width) for image in sample]
        for image, grid in zip(sample, grids, strict=True):
            if max(grid) > largest:
                step = image_processor.size_multiple if resize_mode is None else 1
                refuse_grid(image.height, image.width, grid_of, largest, step)
        return grids

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
        grid = self._grid_to_generate(height, width)
        return grid if task != "thinking" or thinking_text is not None else None

    def _grid_to_generate(self, height: int | None, width: int | None) -> tuple[int, int]:
        """The grid of an image to generate, from pixels."""
        if (height is None) != (width is None):
            raise ValueError("`height` and `width` must be given together.")
        height, width = (side if side is not None else self.default_side for side in (height, width))
        unit, largest = self.image_processor.patch_size * UPSCALE, len(self.grid_token_ids) - 1
        return codes_of_side("height", height, unit, largest), codes_of_side("width", width, unit, largest)

    def _source_grid(self, grids: list[list[tuple[int, int]]]) -> tuple[int, int]:
        """The grid of the first image of each sample, which must be the same."""
        first = {sample[0] for sample in grids}
        if len(first) > 1:
            different = ", ".join(f"{height} x {width}" for height, width in sorted(first))
            raise ValueError(
                f"`images`: those to edit have different grids ({different}), and a batch has one; give "
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
            skip_special_tokens (`bool`, defaults to `True`): Whether to leave special tokens, and codes outside of an
                image, out of the text.
            **kwargs: For the tokenizer's `decode`.

        Returns:
            For each row its parts in order: `str`, or `torch.LongTensor` (H, W) with the codes of an image. An image
            given as pixels, whose codes are not in `ids`, is left out; so is one that is not complete.

        Raises:
            ValueError: if there is an image and `image_token_offset` is None.
        """
        return [self._parts(row, skip_special_tokens, **kwargs) for row in to_lists(ids)]

    def _parts(self, row: list[int], skip_special_tokens: bool, **kwargs: Any) -> list[str | torch.Tensor]:
        parts: list[str | torch.Tensor] = []
        offset = self.image_token_offset
        for grid, ids in split_images(row, self._grid_at, self.image_end_token_id):
            if grid is not None and all(token == self.image_token_id for token in ids):
                continue  # given as pixels
            if grid is not None:
                if offset is None:
                    raise ValueError(
                        "`image_token_offset` of the processor is None, so codes cannot be told from text."
                    )
                if len(ids) == math.prod(grid) and all(map(self._is_code, ids)):
                    parts.append(torch.tensor(ids).view(grid) - offset)
            else:
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
        """The text of each row, without its images; arguments as in [`post_process`]."""
        rows = self.post_process(generated_outputs, skip_special_tokens=skip_special_tokens, **kwargs)
        return ["".join(part for part in row if isinstance(part, str)) for row in rows]


__all__ = ["LLaDAUniProcessor"]
