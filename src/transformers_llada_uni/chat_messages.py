"""The messages of a chat as a caller gives them: checked, their words marked, and cut where there is no room."""

from collections.abc import Callable
from typing import Any

from transformers import PreTrainedTokenizerFast

from .prompts import flat_text, list_of_texts, text_of_message
from .user_words import MARK_END, cut_words, encode_prompt, mark_words


PART_TYPES = ("text", "image", "image_url")  # of the last, transformers makes an image
ELSEWHERE = ("audio", "video")  # transformers says it itself


def check_conversation(conversation: Any) -> None:
    """
    Raises TypeError or ValueError, which name `conversation`, if that is no chat and no list of chats: of messages
    with a content each, text or a list of parts. Templates would write `None`, or nothing, for what is missing.
    """
    if not isinstance(conversation, list | tuple):
        raise TypeError(f"`conversation` must be a list of messages, got {type(conversation).__name__}.")
    chats = conversation if conversation and isinstance(conversation[0], list | tuple) else [conversation]
    if not all(chats):
        raise ValueError("`conversation` is empty.")
    for messages in chats:
        _check_messages(messages)


def _check_messages(messages: Any) -> None:
    if not isinstance(messages, list | tuple) or not all(isinstance(message, dict) for message in messages):
        raise TypeError(f"`conversation` must be a list of messages, which are dicts, got {messages!r:.100}.")
    for number, message in enumerate(messages):
        name = f"conversation[{number}]['content']"
        content = message.get("content")
        if content is None and message.get("role") in ("system", "user"):
            raise ValueError(f"`{name}` is missing.")
        if isinstance(content, str):
            list_of_texts(content, name)
        elif content is not None and not (isinstance(content, list | tuple) and all(map(_is_part, content))):
            raise TypeError(f"`{name}` must be a string or a list of dicts with a 'type', got {content!r:.100}.")
        else:
            for part in content or []:
                if part["type"] not in (*PART_TYPES, *ELSEWHERE):
                    kinds = ", ".join(map(repr, PART_TYPES))
                    raise ValueError(f"`{name}` has a part of type {part['type']!r}; known are {kinds}.")
                if part["type"] == "text":
                    list_of_texts([part.get("text")], f"{name}: 'text'")


def _is_part(part: Any) -> bool:
    return isinstance(part, dict) and "type" in part


def mark_message(tokenizer: PreTrainedTokenizerFast, message: dict[str, Any]) -> dict[str, Any]:
    """A message whose words are marked (see `user_words`); where its images are is left as it is."""
    content = message.get("content")
    if not isinstance(content, list | tuple):
        return mark_words(tokenizer, message)
    parts: list[dict[str, Any]] = []
    for part in content:
        if part["type"] == "text":
            # A mark on its own keeps two parts from being one control token together.
            between = MARK_END if any(before["type"] == "text" for before in parts) else ""
            part = {**part, "text": between + mark_words(tokenizer, part["text"])}
        parts.append(part)
    return {**mark_words(tokenizer, {**message, "content": None}), "content": parts}


def encode_chat(tokenizer: PreTrainedTokenizerFast, conversation: list[dict[str, Any]]) -> list[int]:
    """
    The ids of a chat in the tokenizer's own template, up to the answer: what a text-only model is asked. Words are
    words, whatever they read like.

    Raises:
        TypeError, ValueError: if `conversation` is not one chat, or holds more than text.
    """
    check_conversation([conversation])
    contents = [message.get("content") for message in conversation]
    parts = [part for content in contents if isinstance(content, list | tuple) for part in content]
    if found := next((part["type"] for part in parts if part["type"] != "text"), None):
        raise ValueError(f"`conversation` holds a part {found!r}, and the model reads text alone.")
    marked = [flat_text(mark_message(tokenizer, message)) for message in conversation]
    prompt = tokenizer.apply_chat_template(marked, tokenize=False, add_generation_prompt=True)
    return encode_prompt(tokenizer, str(prompt))[0]


def cut_chat(messages: list[dict], num_tokens: Callable[[list[dict]], int], max_length: int) -> list[dict]:
    """
    A chat of at most so many tokens: the words of its last user message are cut from their end.

    Args:
        messages (`list[dict]`): The chat.
        num_tokens: The tokens of a chat.
        max_length (`int`): The tokens it may have.

    Raises:
        ValueError: if what is not cut has no room.
    """
    last = max((number for number, message in enumerate(messages) if message.get("role") == "user"), default=None)

    def with_words(words: str) -> list[dict]:
        if last is None:
            return messages
        return [*messages[:last], begin_of_message(messages[last], len(words)), *messages[last + 1 :]]

    words = "" if last is None else text_of_message(messages[last])
    return with_words(cut_words(words, lambda words: num_tokens(with_words(words)), max_length))


def begin_of_message(message: dict[str, Any], num_characters: int) -> dict[str, Any]:
    """A message with so many characters of its text, which may be in several parts; images stay."""
    if isinstance(message["content"], str):
        return {**message, "content": message["content"][:num_characters]}
    parts = []
    for part in message["content"]:
        if part["type"] == "text":
            part = {**part, "text": part["text"][:num_characters]}
            num_characters -= len(part["text"])
        parts.append(part)
    return {**message, "content": parts}
