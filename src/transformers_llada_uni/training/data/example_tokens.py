"""One row of a dataset to the token ids of its prompt and of what is learnt, as the processor writes prompts."""

from collections.abc import Iterable
from typing import Any

from transformers import PreTrainedTokenizerBase, ProcessorMixin
from trl.data_utils import prepare_multimodal_messages

from ...processing_llada_uni import IMAGE_END, IMAGE_START
from ...prompts import SYSTEM_PROMPTS, UNCONDITION, build_prompt, flat_text, has_picture, replace, replacements
from .dataset_formats import (
    CODES_COLUMN,
    check_messages,
    check_text,
    num_pictures,
    refuse_row,
    without_empty_fields,
)


# A stretch of a sequence: its ids, and whether a loss is taken on them.
Segment = tuple[list[int], bool]


class ExampleTokenizer:
    """
    Writes rows as the processor writes prompts, so that what is learnt is what `generate` is asked for.

    Args:
        processor ([`LLaDAUniProcessor`] or a tokenizer): Tokenizers serve text-only models.

    Raises:
        TypeError, ValueError: if `processor` is neither, or has no end token.
    """

    def __init__(self, processor: ProcessorMixin | PreTrainedTokenizerBase):
        self.processor = processor
        self.tokenizer = getattr(processor, "tokenizer", processor)
        if not isinstance(self.tokenizer, PreTrainedTokenizerBase):
            raise TypeError(f"`processor` must be a processor or a tokenizer, got {type(processor).__name__}.")
        if self.tokenizer.eos_token_id is None:
            raise ValueError("`processor`: its tokenizer has no end token, which closes every example.")
        self.has_images = self.tokenizer is not processor
        self.end = self.tokenizer.eos_token_id

    def ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"] if text else []

    # Formats

    def text(self, row: dict[str, Any], index: int) -> list[Segment]:
        """Plain text, all of it learnt."""
        return [(self.ids(check_text(row["text"], index, "text")), True)]

    def messages(self, row: dict[str, Any], index: int) -> list[Segment]:
        """A chat; every answer is learnt."""
        messages = check_messages(row["messages"], index, "messages")
        return self.chat(messages, row, index, first_answer=0)

    def prompt_completion(self, row: dict[str, Any], index: int, completion: str = "completion") -> list[Segment]:
        """A prompt, as text or messages, and its completion, which is learnt."""
        if isinstance(row["prompt"], str):
            self._refuse_pictures_of_texts(row, index)
            prompt, answer = check_text(row["prompt"], index, "prompt"), check_text(row[completion], index, completion)
            return [(self.ids(prompt), False), (self.ids(answer), True)]
        prompt = check_messages(row["prompt"], index, "prompt", last_role="user")
        answer = check_messages(row[completion], index, completion, last_role="assistant")
        return self.chat([*prompt, *answer], row, index, first_answer=len(prompt))

    def preference(self, row: dict[str, Any], index: int) -> tuple[list[int], list[int], list[int]]:
        """The ids of a prompt, of the chosen and of the rejected answer; each may have pictures of its own."""
        codes = row.get(CODES_COLUMN) or []
        counts = [num_pictures(row[name]) for name in ("chosen", "rejected")]
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
            refuse_row(index, "`chosen` and `rejected` must both hold pictures, or none; their prompts differ else.")
        return prompts[0], answers[0], answers[1]

    def prompt(self, row: dict[str, Any], index: int) -> list[Segment]:
        """A prompt alone."""
        if isinstance(row["prompt"], str):
            self._refuse_pictures_of_texts(row, index)
            return [(self.ids(check_text(row["prompt"], index, "prompt")), False)]
        messages = check_messages(row["prompt"], index, "prompt", last_role="user")
        messages, codes = self._with_pictures(messages, row, index)
        return [(self._fill(self._render(messages, True, index, bool(codes)), codes), False)]

    def text_to_image(self, row: dict[str, Any], index: int, drop_text: bool = False) -> list[Segment]:
        """
        A caption and its picture; the picture is learnt. With a text `thinking`, thoughts come before the picture and
        are learnt as well.
        """
        self._needs_processor(index)
        caption = UNCONDITION if drop_text else check_text(row["caption"], index, "caption")
        (picture,) = self._codes(row, index, 1)
        thinking = row.get("thinking")
        if thinking is None or drop_text:
            task = "text_to_image" if thinking is None else "thinking"
            header = self.processor._header(*picture["grid"])
            return [(self.ids(build_prompt(task, caption) + header), False), (self._learnt_picture(picture), True)]
        learnt = check_text(thinking, index, "thinking") + self.processor._header(*picture["grid"])
        learnt = self.ids(learnt) + self._learnt_picture(picture)
        return [(self.ids(build_prompt("thinking", caption)), False), (learnt, True)]

    def editing(
        self, row: dict[str, Any], index: int, drop_text: bool = False, drop_image: bool = False
    ) -> list[Segment]:
        """A picture, an instruction, and the edited picture, which is learnt."""
        self._needs_processor(index)
        instruction = UNCONDITION if drop_text else check_text(row["instruction"], index, "instruction")
        source, target = self._codes(row, index, 2)
        if source["grid"] != target["grid"]:
            refuse_row(
                index,
                f"`target_image` has a grid of {target['grid']} codes, `source_image` one of {source['grid']}; an "
                "edited picture has the shape of its source.",
            )
        keeps_image = drop_text or not drop_image
        prompt = build_prompt("editing", instruction, IMAGE_START) + self.processor._header(*target["grid"])
        ids = self._fill(prompt, [source]) if keeps_image else self.ids(prompt)
        return [(ids, False), (self._learnt_picture(target), True)]

    # Chats

    def chat(self, messages: list[dict], row: dict[str, Any], index: int, first_answer: int) -> list[Segment]:
        """
        The segments of a chat, cut before and after each answer from message `first_answer` on. A prompt ends where
        the template with `add_generation_prompt` ends, as it does when a model is asked. An answer with pictures is
        that of the task "interleaved", so without a system message of its own the chat has that task's.
        """
        num_messages = len(messages)
        messages, codes = self._with_pictures(messages, row, index)
        first_answer += len(messages) - num_messages
        has_pictures = bool(codes)
        whole = self._render(messages, False, index, has_pictures)
        cuts = []
        for number in range(first_answer, len(messages)):
            if messages[number]["role"] != "assistant":
                continue
            before = self._render(messages[:number], True, index, has_pictures)
            through = self._render(messages[: number + 1], False, index, has_pictures)
            if not whole.startswith(through) or not through.startswith(before):
                refuse_row(index, "the chat template writes the begin of this chat in another way than the whole.")
            cuts.append((len(before), len(through)))
        if not cuts:
            refuse_row(index, "there is no message of role 'assistant' to learn from.")

        segments: list[Segment] = []
        remaining, last = iter(codes), 0
        for start, end in cuts:
            segments.append((self._fill(whole[last:start], remaining), False))
            segments.append((self._fill(whole[start:end], remaining), True))
            last = end
        return segments  # what follows the last answer is not needed

    def _with_pictures(self, messages: list[dict], row: dict[str, Any], index: int) -> tuple[list[dict], list[dict]]:
        """Structured messages, and the codes of their pictures in order."""
        codes = row.get(CODES_COLUMN) or []
        messages = without_empty_fields(messages)
        if not codes and not any(has_picture(message) for message in messages):
            return messages, []
        if not codes:
            refuse_row(index, "its messages have pictures that are not encoded; `model` encodes them.")
        self._needs_processor(index)
        for message in messages:
            if isinstance(message["content"], list):
                for part in message["content"]:
                    part.pop("image", None)
        try:
            messages = prepare_multimodal_messages(messages, images=codes)
        except ValueError as error:
            refuse_row(index, str(error))
        answers = [message for message in messages if message["role"] == "assistant"]
        if any(map(has_picture, answers)) and messages[0]["role"] == "user":
            system = {"type": "text", "text": SYSTEM_PROMPTS["interleaved"]}
            messages = [{"role": "system", "content": [system]}, *messages]
        # The template puts the pictures of a user's message before its words, which keeps their order.
        return messages, codes

    def _render(self, messages: list[dict], add_generation_prompt: bool, index: int, has_pictures: bool) -> str:
        """The beginning of a chat as text; `has_pictures` of the whole chat decides on the template."""
        if not messages:
            refuse_row(index, "the first message is the model's; there must be a user's before it.")
        if not has_pictures:
            messages = [flat_text(message) for message in messages]
        settings = {"chat_template": self.processor.chat_template} if has_pictures else {}
        try:
            return self.processor.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt, **settings
            )
        except Exception as error:  # jinja's, for chats the template does not know
            refuse_row(index, f"the chat template cannot write its messages: {error}")

    # Pictures

    def _fill(self, text: str, codes: Iterable[dict[str, list[int]]]) -> list[int]:
        """The ids of `text`, in which each `<|image|>` without a header becomes the next picture of `codes`."""
        if not self.has_images:
            return self.ids(text)
        remaining = iter(codes)
        spans = self.processor._lone_image_tokens(text)
        pictures = [next(remaining) for _ in spans]
        blocks = [self.processor._block(*picture["grid"]) for picture in pictures]
        ids = self.ids(replace(text, replacements(text, spans, blocks)))
        numbers = (token for picture in pictures for token in self._tokens(picture))
        return [next(numbers) if token == self.processor.image_token_id else token for token in ids]

    def _tokens(self, picture: dict[str, list[int]]) -> list[int]:
        return [self.processor.image_token_offset + code for code in picture["codes"]]

    def _learnt_picture(self, picture: dict[str, list[int]]) -> list[int]:
        return self._tokens(picture) + self.ids(IMAGE_END)

    def _codes(self, row: dict[str, Any], index: int, count: int) -> list[dict[str, list[int]]]:
        codes = row.get(CODES_COLUMN)
        if codes is None or len(codes) != count:
            refuse_row(
                index, f"`{CODES_COLUMN}` must hold {count} picture(s), got {0 if codes is None else len(codes)}."
            )
        return codes

    def _refuse_pictures_of_texts(self, row: dict[str, Any], index: int) -> None:
        if row.get(CODES_COLUMN):
            refuse_row(index, "it has pictures, for which a `prompt` that is a text has no place; give messages.")

    def _needs_processor(self, index: int) -> None:
        if not self.has_images or self.processor.image_token_offset is None:
            refuse_row(index, "it has pictures, which need a LLaDAUniProcessor that knows its `image_token_offset`.")


__all__: list[str] = []
