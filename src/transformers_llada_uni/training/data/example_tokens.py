"""One row of a dataset to the token ids of its prompt and of what is learnt, as the processor writes prompts."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast, ProcessorMixin
from trl.data_utils import prepare_multimodal_messages

from ...chat_templates import give_back_text_chat
from ...image_places import IMAGE_END, IMAGE_START, LONE_IMAGE, image_block, image_header, place_images
from ...processing_llada_uni import LLaDAUniProcessor
from ...prompts import SYSTEM_PROMPTS, UNCONDITION, build_prompt, flat_text, has_image
from ...user_words import encode_prompt, encode_words, mark_words
from .dataset_formats import (
    CODES_COLUMN,
    CODES_FORM,
    are_image_codes,
    check_messages,
    check_text,
    is_chat,
    num_images,
    refuse_row,
    without_empty_fields,
)


# A stretch of a sequence: its ids, and whether a loss is taken on them.
Segment = tuple[list[int], bool]
# Of one image: its `grid` (H, W) and its `codes` (H * W).
ImageCodes = dict[str, list[int]]


class ExampleTokenizer:
    """
    Writes rows as the processor writes prompts, so that what is learnt is what `generate` is asked for. The words of a
    row are words: what reads like a control token in them becomes ordinary tokens.

    Args:
        processor ([`LLaDAUniProcessor`] or a fast tokenizer): Tokenizers serve text-only models.

    Raises:
        TypeError, ValueError: if `processor` is neither, or has no end token.
    """

    def __init__(self, processor: ProcessorMixin | PreTrainedTokenizerBase):
        self.processor = processor if isinstance(processor, LLaDAUniProcessor) else None
        tokenizer = processor if self.processor is None else self.processor.tokenizer
        if not isinstance(tokenizer, PreTrainedTokenizerFast):
            raise TypeError(
                f"`processor` must be a LLaDAUniProcessor or a fast tokenizer, got {type(processor).__name__}."
            )
        if tokenizer.eos_token_id is None:
            raise ValueError("`processor`: its tokenizer has no end token, which closes every example.")
        give_back_text_chat(tokenizer)  # `AutoTokenizer` knows only that of a processor's folder for chats with images
        self.tokenizer = tokenizer
        self.end: int = tokenizer.eos_token_id

    def words(self, value: Any, index: int, field: str) -> list[int]:
        """The ids of a text of a row."""
        return encode_words(self.tokenizer, check_text(value, index, field))

    def frame(self, text: str) -> list[int]:
        """The ids of a prompt: control tokens count, but for those in words that are marked."""
        return encode_prompt(self.tokenizer, text)[0]

    # Formats

    def text(self, row: dict[str, Any], index: int) -> list[Segment]:
        """Plain text, all of it learnt."""
        return [(self.words(row["text"], index, "text"), True)]

    def messages(self, row: dict[str, Any], index: int) -> list[Segment]:
        """A chat; every answer is learnt."""
        messages = check_messages(row["messages"], index, "messages")
        return self.chat(messages, row, index, first_answer=0)

    def prompt_completion(self, row: dict[str, Any], index: int, completion: str = "completion") -> list[Segment]:
        """A prompt, as text or messages, and its completion, which is learnt."""
        if not is_chat(row["prompt"], index, "prompt"):
            self._refuse_images_of_texts(row, index)
            return [
                (self.words(row["prompt"], index, "prompt"), False),
                (self.words(row[completion], index, completion), True),
            ]
        asked = check_messages(row["prompt"], index, "prompt", last_role="user")
        answer = check_messages(row[completion], index, completion, last_role="assistant")
        return self.chat([*asked, *answer], row, index, first_answer=len(asked))

    def preference(self, row: dict[str, Any], index: int) -> tuple[list[int], list[int], list[int]]:
        """The ids of a prompt, of the chosen and of the rejected answer; each may have images of its own."""
        codes = row.get(CODES_COLUMN) or []
        counts = [num_images(row[name]) for name in ("chosen", "rejected")]
        before = len(codes) - sum(counts)
        own = {"chosen": codes[before : before + counts[0]], "rejected": codes[before + counts[0] :]}
        prompts, answers = [], []
        for name, own_codes in own.items():
            of_answer = {**row, CODES_COLUMN: [*codes[:before], *own_codes]}
            segments = self.prompt_completion(of_answer, index, completion=name)
            if len(segments) != 2:
                refuse_row(index, f"`{name}` must be one answer, it holds {len(segments) // 2}.")
            prompts.append(segments[0][0])
            answers.append(segments[1][0])
        if prompts[0] != prompts[1]:
            refuse_row(index, "`chosen` and `rejected` must both hold images, or none; their prompts differ else.")
        return prompts[0], answers[0], answers[1]

    def prompt(self, row: dict[str, Any], index: int) -> list[Segment]:
        """A prompt alone."""
        if not is_chat(row["prompt"], index, "prompt"):
            self._refuse_images_of_texts(row, index)
            return [(self.words(row["prompt"], index, "prompt"), False)]
        messages = check_messages(row["prompt"], index, "prompt", last_role="user")
        messages, codes = self._with_images(messages, row, index)
        return [(self._fill(self._render(messages, True, index, bool(codes)), iter(codes), index), False)]

    def text_to_image(self, row: dict[str, Any], index: int, drop_text: bool = False) -> list[Segment]:
        """
        A caption and its image; the image is learnt. With a text `thinking`, thoughts come before the image and are
        learnt as well.
        """
        processor = self._needs_processor(index)
        caption = UNCONDITION if drop_text else self._marked(row["caption"], index, "caption")
        (image,) = self._codes(row, index, 1)
        header, codes = image_header(*image["grid"]), self._learnt_image(processor, image)
        if row.get("thinking") is None or drop_text:
            task = "text_to_image" if row.get("thinking") is None else "thinking"
            return [(self.frame(build_prompt(task, caption) + header), False), (codes, True)]
        thoughts = self._marked(row["thinking"], index, "thinking")
        return [(self.frame(build_prompt("thinking", caption)), False), (self.frame(thoughts + header) + codes, True)]

    def editing(
        self, row: dict[str, Any], index: int, drop_text: bool = False, drop_image: bool = False
    ) -> list[Segment]:
        """An image, an instruction, and the edited image, which is learnt."""
        processor = self._needs_processor(index)
        instruction = UNCONDITION if drop_text else self._marked(row["instruction"], index, "instruction")
        source, target = self._codes(row, index, 2)
        if source["grid"] != target["grid"]:
            refuse_row(
                index,
                f"`target_image` has a grid of {target['grid']} codes, `source_image` one of {source['grid']}; an "
                "edited image has the shape of its source.",
            )
        keeps_image = drop_text or not drop_image
        prompt = build_prompt("editing", instruction, IMAGE_START) + image_header(*target["grid"])
        ids = self._fill(prompt, iter([source]), index) if keeps_image else self.frame(prompt)
        return [(ids, False), (self._learnt_image(processor, target), True)]

    def _marked(self, value: Any, index: int, field: str) -> str:
        return mark_words(self.tokenizer, check_text(value, index, field))

    # Chats

    def chat(
        self, messages: list[dict[str, Any]], row: dict[str, Any], index: int, first_answer: int
    ) -> list[Segment]:
        """
        The segments of a chat, cut before and after each answer from message `first_answer` on. A prompt ends where
        the template with `add_generation_prompt` ends, as it does when a model is asked. An answer with images is
        that of the task "interleaved", so without a system message of its own the chat has that task's.
        """
        num_messages = len(messages)
        messages, codes = self._with_images(messages, row, index)
        first_answer += len(messages) - num_messages
        has_images = bool(codes)
        whole = self._render(messages, False, index, has_images)
        cuts = []
        for number in range(first_answer, len(messages)):
            if messages[number]["role"] != "assistant":
                continue
            before = self._render(messages[:number], True, index, has_images)
            through = self._render(messages[: number + 1], False, index, has_images)
            if not whole.startswith(through) or not through.startswith(before):
                refuse_row(index, "the chat template writes the begin of this chat in another way than the whole.")
            cuts.append((len(before), len(through)))
        if not cuts:
            refuse_row(index, "there is no message of role 'assistant' to learn from.")

        segments: list[Segment] = []
        remaining, last = iter(codes), 0
        for start, end in cuts:
            segments.append((self._fill(whole[last:start], remaining, index), False))
            segments.append((self._fill(whole[start:end], remaining, index), True))
            last = end
        return segments  # what follows the last answer is not needed

    def _with_images(
        self, messages: list[dict[str, Any]], row: dict[str, Any], index: int
    ) -> tuple[list[dict[str, Any]], list[ImageCodes]]:
        """Structured messages whose words are marked, and the codes of their images in order."""
        codes = self._codes(row, index)
        messages = without_empty_fields(messages)
        if not codes and any(has_image(message) for message in messages):
            refuse_row(index, "its messages have images that are not encoded; `model` encodes them.")
        for message in messages:
            for part in message["content"] if isinstance(message["content"], list) else []:
                part.pop("image", None)
        messages = mark_words(self.tokenizer, messages)
        if not codes:
            return messages, []
        try:
            messages = prepare_multimodal_messages(messages, images=codes)
        except ValueError as error:
            refuse_row(index, str(error))
        answers = [message for message in messages if message["role"] == "assistant"]
        if any(map(has_image, answers)) and messages[0]["role"] == "user":
            system = {"type": "text", "text": SYSTEM_PROMPTS["interleaved"]}
            messages = [{"role": "system", "content": [system]}, *messages]
        # The template puts the images of a user's message before its words, which keeps their order.
        return messages, codes

    def _render(
        self, messages: list[dict[str, Any]], add_generation_prompt: bool, index: int, has_images: bool
    ) -> str:
        """The beginning of a chat as text; `has_images` of the whole chat decides on the template."""
        if not messages:
            refuse_row(index, "the first message is the model's; there must be a user's before it.")
        if not has_images:
            messages = [flat_text(message) for message in messages]
        template: Any = self._needs_processor(index).chat_template if has_images else None
        if isinstance(template, dict):
            template = template["default"]
        writer = self.tokenizer if self.processor is None else self.processor
        try:
            return str(
                writer.apply_chat_template(
                    messages, chat_template=template, tokenize=False, add_generation_prompt=add_generation_prompt
                )
            )
        except Exception as error:  # jinja's, for chats the template does not know
            refuse_row(index, f"the chat template cannot write its messages: {error}")

    # Images

    def _fill(self, text: str, codes: Iterator[ImageCodes], index: int) -> list[int]:
        """The ids of `text`, in which each `<|image|>` without a header becomes the next image of `codes`."""
        processor = self.processor
        if processor is None:
            return self.frame(text)
        num_places = len(LONE_IMAGE.findall(text))
        images = list(islice(codes, num_places))
        if len(images) != num_places:
            refuse_row(index, f"the chat template writes {IMAGE_START} in more places than there are images.")
        text, _ = place_images(text, [image_block(*image["grid"]) for image in images])
        ids = self.frame(text)
        numbers = (token for image in images for token in self._tokens(processor, image))
        return [next(numbers) if token == processor.image_token_id else token for token in ids]

    @staticmethod
    def _tokens(processor: LLaDAUniProcessor, image: ImageCodes) -> list[int]:
        assert processor.image_token_offset is not None  # `_needs_processor` has looked
        return [processor.image_token_offset + code for code in image["codes"]]

    def _learnt_image(self, processor: LLaDAUniProcessor, image: ImageCodes) -> list[int]:
        return self._tokens(processor, image) + self.frame(IMAGE_END)

    def _codes(self, row: dict[str, Any], index: int, count: int | None = None) -> list[ImageCodes]:
        """The images of a row, which are codes of the model; so many, or as many as there are."""
        codes = row.get(CODES_COLUMN) or []
        if count is not None and len(codes) != count:
            refuse_row(index, f"`{CODES_COLUMN}` must hold {count} image(s), got {len(codes)}.")
        if not all(map(are_image_codes, codes)):
            refuse_row(index, f"`{CODES_COLUMN}` must hold {CODES_FORM} for each image, got {str(codes)[:100]}.")
        if codes:
            processor = self._needs_processor(index)
            try:
                processor.fetch_codes([torch.tensor(image["codes"]).view(*image["grid"]) for image in codes])
            except (TypeError, ValueError, RuntimeError) as error:
                refuse_row(index, str(error))
        return codes

    def _refuse_images_of_texts(self, row: dict[str, Any], index: int) -> None:
        if row.get(CODES_COLUMN):
            refuse_row(index, "it has images, for which a `prompt` that is a text has no place; give messages.")

    def _needs_processor(self, index: int) -> LLaDAUniProcessor:
        if self.processor is None or self.processor.image_token_offset is None:
            refuse_row(index, "it has images, which need a LLaDAUniProcessor that knows its `image_token_offset`.")
        return self.processor
