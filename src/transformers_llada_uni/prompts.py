"""The prompts LLaDA2.0-Uni was trained on, as text. Spaces matter: one stands on either side of the system's words."""

from collections.abc import Callable
from functools import partial
from typing import Any

from transformers import PreTrainedTokenizerFast

from .image_places import IMAGE_START
from .user_words import cut_words, encode_prompt


SYSTEM_PROMPTS = {
    "understanding": "You are a multimodal understanding assistant.",
    "text_to_image": "You are a text-to-image generation assistant.",
    "thinking": "You are a text-to-image generation assistant with a thinking process.",
    "editing": "You are an image editing assistant.",
    "interleaved": "You are a interleaved generation assistant.",
}
TASKS = tuple(SYSTEM_PROMPTS)

# Stands for "no text" in the negative prompts of guidance. Ordinary text to the tokenizer, not a special token.
UNCONDITION = "<uncondition>"

ANSWER = "<role>ASSISTANT</role>"


def build_prompt(task: str, text: str, images: str = "") -> str:
    """
    One turn of a task, up to where the model's answer starts.

    Args:
        task (`str`): One of `TASKS`.
        text (`str`): The user's words, or `UNCONDITION`.
        images (`str`, defaults to `""`): What stands for the images; they come before the words.
    """
    return f"<role>SYSTEM</role> {SYSTEM_PROMPTS[task]} <role>HUMAN</role>{images}{text}{ANSWER}"


def write_task_prompts(
    task: str,
    texts: list[str],
    blocks: list[list[str]],
    header: str,
    thinking_text: str | list[str] | None,
    mark: Callable[[str], str],
    tokenizer: PreTrainedTokenizerFast,
    max_length: int | None,
) -> dict[str, list[str]]:
    """
    The prompts of a task and its negative prompts, by the prefix of their names in the processor's output.

    Args:
        task (`str`): One of `TASKS`.
        texts (`list[str]`): The user's words.
        blocks (`list[list[str]]`): For each text what stands for its images.
        header (`str`): Of the image to generate; empty where none follows the prompt.
        thinking_text (`str` or `list[str]`, *optional*): Thoughts that come before the header.
        mark: Marks words as a user's own.
        tokenizer: Counts tokens.
        max_length (`int`, *optional*): The tokens of a prompt, to which words are cut.
    """
    sources = ["".join(sample) for sample in blocks]
    thoughts = [""] * len(texts) if thinking_text is None else list_of_texts(thinking_text, "thinking_text")
    if len(thoughts) != len(texts):
        raise ValueError(f"`thinking_text` has {len(thoughts)} entries for {len(texts)} texts.")

    def write(source: str, thought: str, words: str) -> str:
        return build_prompt(task, mark(words), source) + mark(thought) + header

    if max_length is not None:

        def num_tokens(source: str, thought: str, words: str) -> int:
            return len(encode_prompt(tokenizer, write(source, thought, words))[0])

        texts = [
            cut_words(words, partial(num_tokens, *frame), max_length)
            for words, *frame in zip(texts, sources, thoughts, strict=True)
        ]
    prompts = {"": [write(*row) for row in zip(sources, thoughts, texts, strict=True)]}
    if header:
        prompts["negative_"] = [build_prompt(task, UNCONDITION, source) + header for source in sources]
    elif task == "interleaved":  # here also the start of the negative prompt without image
        prompts["negative_"] = [build_prompt(task, UNCONDITION)] * len(texts)
    if task == "editing":
        lone = [IMAGE_START * len(sample) for sample in blocks]
        prompts["negative_image_"] = [write(image, "", words) for image, words in zip(lone, texts, strict=True)]
    return prompts


def list_of_texts(text: str | list[str], name: str) -> list[str]:
    """
    `text` as a list; raises TypeError if it is neither a string nor a list of strings, ValueError if it is empty, or
    no text in Unicode.
    """
    texts = [text] if isinstance(text, str) else text
    if not isinstance(texts, list | tuple) or not all(isinstance(entry, str) for entry in texts):
        raise TypeError(f"`{name}` must be a string or a list of strings, got {text!r:.100}.")
    if not texts:
        raise ValueError(f"`{name}` is an empty list.")
    for entry in texts:
        try:
            entry.encode()
        except UnicodeEncodeError as error:
            lone = entry[error.start]
            raise ValueError(
                f"`{name}` holds half a character: {lone!r} at {error.start} is a lone surrogate."
            ) from None
    return list(texts)


def has_image(message: dict[str, Any]) -> bool:
    """Whether a message of a chat holds an image."""
    content = message.get("content")
    return isinstance(content, list | tuple) and any(part.get("type") == "image" for part in content)


def text_of_message(message: dict[str, Any]) -> str:
    """All text of a message."""
    content = message["content"]
    return content if isinstance(content, str) else "".join(part["text"] for part in content if part["type"] == "text")


def flat_text(message: dict[str, Any]) -> dict[str, Any]:
    """A message whose content, if a list of texts, is one string, as templates of text-only chats expect."""
    content = message.get("content")
    if not isinstance(content, list | tuple) or any(part.get("type") != "text" for part in content):
        return message
    return {**message, "content": text_of_message(message)}
