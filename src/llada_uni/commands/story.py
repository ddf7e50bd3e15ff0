"""`story`: a document of text and images, as Markdown or HTML."""

import base64
import html
import io
import os
import re
from pathlib import Path
from typing import Literal

import PIL.Image

from transformers_llada_uni.loading.folder_writing import folder_at_once


STYLE = (
    "body{max-width:40rem;margin:2rem auto;padding:0 1rem;font:1.1rem/1.6 sans-serif}"
    "p,h1{white-space:pre-line;overflow-wrap:anywhere}img{max-width:100%}"
)


def write_story(
    parts: list[str | PIL.Image.Image], folder: str | os.PathLike, title: str, page: Literal["md", "html"] = "md"
) -> Path:
    """
    Writes a page into a folder of its own, which stands whole or not at all: Markdown with its images beside it, or
    HTML that holds them itself. What the user and the model say is text there, and no markup.

    Args:
        parts: Text and images in their order.
        folder: To make; must not exist.
        title: Of the page.
        page: `"md"` or `"html"`.

    Returns:
        The page's path.

    Raises:
        FileExistsError: if the folder exists.
    """
    folder = Path(folder)
    if folder.exists():
        raise FileExistsError(f"`output` {str(folder)!r} exists already.")
    with folder_at_once(folder) as partial:
        blocks, number = [], 0
        for part in parts:
            if isinstance(part, str):
                blocks.append(_markdown(part.strip()) if page == "md" else f"<p>{html.escape(part.strip())}</p>")
                continue
            number += 1
            if page == "md":
                part.save(partial / f"image-{number}.png")
                blocks.append(f"![image {number}](image-{number}.png)")
            else:
                blocks.append(f'<img src="{_data_url(part)}" alt="image {number}">')
        text = _page(blocks, title) if page == "html" else "\n\n".join([_heading(title), *blocks]) + "\n"
        (partial / f"story.{page}").write_text(text, encoding="utf-8")
    return folder / f"story.{page}"


def _markdown(text: str) -> str:
    """Words, of which no character is markup."""
    escaped = re.sub(r"([\\`*_\[\]#|~!])", r"\\\1", html.escape(text, quote=False))
    return re.sub(r"^(\s*)([-+=]|\d+(?=[.)]))", r"\1\\\2", escaped, flags=re.MULTILINE)


def _heading(title: str) -> str:
    return f"# {_markdown(' '.join(title.split()))}"


def _data_url(image: PIL.Image.Image) -> str:
    content = io.BytesIO()
    image.save(content, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"


def _page(blocks: list[str], title: str) -> str:
    title = html.escape(title)
    return (
        f'<!doctype html>\n<html><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head><body>\n'
        + "\n".join([f"<h1>{title}</h1>", *blocks])
        + "\n</body></html>\n"
    )
