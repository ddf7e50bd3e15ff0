"""The chat templates of a processor: ours for chats with images, and its tokenizer's own for those without."""

from transformers import PreTrainedTokenizerBase

from .prompts import SYSTEM_PROMPTS


# Name under which the tokenizer's own template is saved: both would be `chat_template.jinja`. So ours is saved as the
# default and the tokenizer's beside it; both get their own back when loaded. Other named ones belong to both, as
# upstream has it.
TEXT_CHAT = "text_chat"

# Several turns, with images. For one user turn it gives `build_prompt("understanding", ...)`.
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
    {{- raise_exception('Tools can only be used in a chat without images.') -}}
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
        {{- raise_exception("Roles must be 'user' or 'assistant' after one 'system' at most, got '"
            ~ message.role ~ "'.") -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<role>ASSISTANT</role>' -}}
{%- endif -%}
"""
)


def by_name(templates: str | dict[str, str] | None) -> dict[str, str]:
    """Chat templates by name; one without a name is the default."""
    return templates if isinstance(templates, dict) else {"default": templates} if templates else {}


def without_text_chat(templates: str | dict[str, str] | None) -> str | dict[str, str]:
    """Ours, of what was saved; the default on its own needs no name."""
    rest = {name: template for name, template in by_name(templates).items() if name != TEXT_CHAT}
    return rest["default"] if list(rest) == ["default"] else rest or CHAT_TEMPLATE


def give_back_text_chat(tokenizer: PreTrainedTokenizerBase) -> None:
    """A tokenizer that was loaded from a processor's folder gets its own template as the default."""
    templates = tokenizer.chat_template
    if isinstance(templates, dict) and TEXT_CHAT in templates:
        tokenizer.chat_template = without_text_chat({**templates, "default": templates[TEXT_CHAT]})


def text_chat_of(tokenizer: PreTrainedTokenizerBase, own: str | dict[str, str] | None) -> str | None:
    """The tokenizer's own template; None if it has none, or only that of chats with images from the same file."""
    template = by_name(tokenizer.chat_template).get("default")
    return None if template in (None, CHAT_TEMPLATE, by_name(own).get("default")) else template
