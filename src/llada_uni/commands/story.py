"""`story`: a document of text and images, as Markdown or HTML."""

import base64
import html
import io
import os
import re
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from .loading import load
from .options import Device, Dtype, Model, Output, Seed, Size, size_of
from .prompt_files import check_text


if TYPE_CHECKING:
    import PIL.Image


STYLE = (
    "body{max-width:40rem;margin:2rem auto;padding:0 1rem;font:1.1rem/1.6 sans-serif}"
    "p,h1{white-space:pre-line;overflow-wrap:anywhere}img{max-width:100%}"
)


class PageFormat(StrEnum):
    MARKDOWN = "md"
    HTML = "html"


def story(
    prompt: Annotated[str, typer.Argument(help="What to tell.")],
    image: Annotated[
        list[str] | None, typer.Option("--image", "-i", help="An image before it; more than once.")
    ] = None,
    output: Output = Path("story"),
    page: Annotated[PageFormat, typer.Option("--format", "-f", help="Of the page.")] = PageFormat.MARKDOWN,
    model: Model = "emoji",
    max_images: Annotated[int, typer.Option(min=1, help="Most images.")] = 4,
    size: Size = None,
    seed: Seed = 0,
    device: Device = None,
    dtype: Dtype = "auto",
) -> None:
    """Tell a story with images, as a page in a folder of its own."""
    if not prompt.strip():
        raise ValueError("`prompt` is empty.")
    check_text(prompt, "`prompt`")
    sides = size_of(size)
    if output.exists():
        raise FileExistsError(f"`output` {str(output)!r} exists already; `--output` names another folder.")
    from ..image_files import open_image
    from ..pipeline_loading import resolve_model

    images = [open_image(path) for path in image or []]
    resolve_model(model)  # before torch is imported
    import torch

    from diffusers_llada_uni.evaluation.manifest import make_folder

    make_folder(output.parent)
    pipe = load(model, device, dtype)
    generator = torch.Generator().manual_seed(seed)
    settings: dict[str, Any] = {"image": images or None, "generator": generator, **sides}
    parts = pipe.interleave(prompt, max_images=max_images, **settings)
    if not parts:
        typer.echo("llada-uni: the model has told nothing; other words, or another `--seed`, may help.", err=True)
        raise typer.Exit(1)
    typer.echo(write_story(parts, output, prompt, page.value))


def write_story(
    parts: "list[str | PIL.Image.Image]", folder: str | os.PathLike, title: str, page: Literal["md", "html"] = "md"
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
    from transformers_llada_uni.loading.folder_writing import folder_at_once

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


def _data_url(image: "PIL.Image.Image") -> str:
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
