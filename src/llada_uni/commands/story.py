"""`story`: a document of text and images, as Markdown or HTML."""

import html
import os
from pathlib import Path
from typing import Literal

import PIL.Image

from transformers_llada_uni.loading.folder_writing import folder_at_once


def write_story(
    parts: list[str | PIL.Image.Image], folder: str | os.PathLike, title: str, page: Literal["md", "html"] = "md"
) -> Path:
    """
    Writes a page and its images into a folder of its own, which stands whole or not at all.

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
                text = part.strip()
                blocks.append(text if page == "md" else f"<p>{html.escape(text)}</p>")
                continue
            number += 1
            name = f"image-{number}.png"
            part.save(partial / name)
            blocks.append(f"![]({name})" if page == "md" else f'<img src="{name}" alt="">')
        (partial / f"story.{page}").write_text(_page(blocks, title, page), encoding="utf-8")
    return folder / f"story.{page}"


def _page(blocks: list[str], title: str, page: str) -> str:
    if page == "md":
        return "\n\n".join([f"# {title}", *blocks]) + "\n"
    style = "body{max-width:40rem;margin:2rem auto;padding:0 1rem;font:1.1rem/1.6 sans-serif}img{max-width:100%}"
    return (
        f'<!doctype html>\n<html><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{style}</style></head><body>\n'
        + "\n".join([f"<h1>{html.escape(title)}</h1>", *blocks])
        + "\n</body></html>\n"
    )
