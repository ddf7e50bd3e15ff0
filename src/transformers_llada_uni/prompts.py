"""The prompts LLaDA2.0-Uni was trained on, as text. Spaces matter: one stands on either side of the system's words."""

from typing import Any

SYSTEM_PROMPTS = {
    "understanding": "You are a multimodal understanding assistant.",
    "text_to_image": "You are a text-to-image generation assistant.",
    "thinking": "You are a text-to-image generation assistant with a thinking process.",
    "editing": "You are an image editing assistant.",
    "interleaved": "You are a interleaved generation assistant.",
}
TASKS = tuple(SYSTEM_PROMPTS)

# Stands for "no text" in the companions of guidance. Ordinary text to the tokenizer, not a special token.
UNCONDITION = "<uncondition>"

ANSWER = "<role>ASSISTANT</role>"


def build_prompt(task: str, text: str, images: str = "") -> str:
    """
    One turn of a task, up to where the model's answer starts.

    Args:
        task (`str`): One of `TASKS`.
        text (`str`): The user's words, or `UNCONDITION`.
        images (`str`, defaults to `""`): What stands for the pictures; they come before the words.
    """
    return f"<role>SYSTEM</role> {SYSTEM_PROMPTS[task]} <role>HUMAN</role>{images}{text}{ANSWER}"


# Several turns, with pictures. For one user turn it gives `build_prompt("understanding", ...)`.
CHAT_TEMPLATE = (
    """{%- macro text_of(content) -%}
    {%- if content is string -%}
        {{- content -}}
    {%- else -%}
        {%- for part in content -%}
            {%- if part.type == 'text' -%}
                {{- part.text -}}
            {%- elif part.type != 'image' -%}
                {{- raise_exception("Content must be of type 'text' or 'image', got '" ~ part.type ~ "'.") -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- if tools -%}
    {{- raise_exception('Tools can only be used in a chat without pictures.') -}}
{%- endif -%}
{%- if messages and messages[0].role == 'system' -%}
    {%- set system = text_of(messages[0].content) -%}
    {%- set turns = messages[1:] -%}
{%- else -%}
    {%- set system = '"""
    + SYSTEM_PROMPTS["understanding"]
    + """' -%}
    {%- set turns = messages -%}
{%- endif -%}
{{- '<role>SYSTEM</role> ' ~ system ~ ' ' -}}
{%- for message in turns -%}
    {%- if message.role == 'user' -%}
        {{- '<role>HUMAN</role>' -}}
        {%- if message.content is not string -%}
            {%- for part in message.content if part.type == 'image' -%}
                {{- '<|image|>' -}}
            {%- endfor -%}
        {%- endif -%}
        {{- text_of(message.content) -}}
    {%- elif message.role == 'assistant' -%}
        {{- '<role>ASSISTANT</role>' -}}
        {%- generation -%}
        {%- if message.content is string -%}
            {{- message.content -}}
        {%- else -%}
            {%- for part in message.content -%}
                {{- '<|image|>' if part.type == 'image' else text_of([part]) -}}
            {%- endfor -%}
        {%- endif -%}
        {{- '<|role_end|>' -}}
        {%- endgeneration -%}
    {%- else -%}
        {{- raise_exception("Roles must be 'user' or 'assistant' after at most one 'system', got '" ~ message.role) -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<role>ASSISTANT</role>' -}}
{%- endif -%}
"""
)


def list_of_texts(text: str | list[str], name: str) -> list[str]:
    """`text` as a list; raises TypeError if it is neither a string nor a list of strings, ValueError if empty."""
    texts = [text] if isinstance(text, str) else text
    if not isinstance(texts, list | tuple) or not all(isinstance(entry, str) for entry in texts):
        raise TypeError(f"`{name}` must be a string or a list of strings, got {text!r:.100}.")
    if not texts:
        raise ValueError(f"`{name}` is an empty list.")
    return list(texts)


def deal_out(pictures: Any, num_texts: int, counts: list[int] | None) -> list[list]:
    """
    Gives each text its pictures.

    Args:
        pictures: None, a picture, a list (dealt out in order), or a list of lists with one list per text.
        num_texts (`int`): Number of texts.
        counts (`list[int]`, *optional*): How many pictures each text asks for. Without it a list is dealt out one by
            one, or goes to the only text.

    Raises:
        ValueError: if the pictures do not fit the texts.
    """
    pictures = [] if pictures is None else pictures if isinstance(pictures, list) else [pictures]
    if any(isinstance(entry, list) for entry in pictures):
        if not all(isinstance(entry, list) for entry in pictures) or any(
            isinstance(entry, list) for sample in pictures for entry in sample
        ):
            raise ValueError("`images` must be one list of pictures, or one list of lists with a list per text.")
        if len(pictures) != num_texts:
            raise ValueError(f"`images` has {len(pictures)} lists of pictures for {num_texts} texts.")
        samples = pictures
    elif num_texts == 1:
        samples = [pictures]
    elif not pictures:
        samples = [[] for _ in range(num_texts)]
    elif counts is None:
        if len(pictures) != num_texts:
            raise ValueError(
                f"`images` has {len(pictures)} pictures for {num_texts} texts; a list of lists says which are whose."
            )
        samples = [[picture] for picture in pictures]
    else:
        if len(pictures) != sum(counts):
            raise ValueError(f"`images`: {len(pictures)} pictures were given for {sum(counts)} <|image|> in `text`.")
        remaining = iter(pictures)
        samples = [[next(remaining) for _ in range(count)] for count in counts]
    for sample, count in zip(samples, counts or [], strict=counts is not None):
        if len(sample) != count:
            raise ValueError(f"`images`: {len(sample)} pictures were given for {count} <|image|> in a text.")
    return samples


def replacements(text: str, spans: list[tuple[int, int]], blocks: list[str]) -> list[dict[str, Any]]:
    """What to put where, with the places before and after, in the form transformers' processors report it."""
    found, shift = [], 0
    for (start, end), block in zip(spans, blocks, strict=True):
        new_span = (start + shift, start + shift + len(block))
        found.append(
            {
                "type": "image",
                "span": (start, end),
                "new_span": new_span,
                "text": text[start:end],
                "replacement": block,
            }
        )
        shift += len(block) - (end - start)
    return found


def replace(text: str, found: list[dict[str, Any]]) -> str:
    """`text` with the [`replacements`] made."""
    pieces, last = [], 0
    for entry in found:
        pieces += [text[last : entry["span"][0]], entry["replacement"]]
        last = entry["span"][1]
    return "".join([*pieces, text[last:]])


def has_picture(message: dict[str, Any]) -> bool:
    """Whether a message of a chat holds a picture."""
    content = message.get("content")
    return isinstance(content, list | tuple) and any(part.get("type") == "image" for part in content)


def flat_text(message: dict[str, Any]) -> dict[str, Any]:
    """A message whose content, if a list of texts, is one string, as templates of text-only chats expect."""
    content = message.get("content")
    if not isinstance(content, list | tuple) or any(part.get("type") != "text" for part in content):
        return message
    return {**message, "content": "".join(part["text"] for part in content)}
