"""What several nodes have in common: types, widgets, and values between ComfyUI and the pipeline."""

from typing import Any

import PIL.Image
import torch


CATEGORY = "LLaDA-Uni"
MODEL = "LLADA_UNI_MODEL"  # a `ManagedPipeline`
CODES = "LLADA_UNI_CODES"  # a list with the codes `(H, W)` of each image, on the CPU
Codes = list[torch.Tensor]

LARGEST_SEED = 2**64 - 1


def text(tooltip: str, default: str = "", multiline: bool = True) -> tuple[str, dict[str, Any]]:
    return "STRING", {"default": default, "multiline": multiline, "tooltip": tooltip}


def integer(tooltip: str, default: int, low: int, high: int, step: int = 1) -> tuple[str, dict[str, Any]]:
    return "INT", {"default": default, "min": low, "max": high, "step": step, "tooltip": tooltip}


def number(tooltip: str, default: float, low: float, high: float, step: float = 0.1) -> tuple[str, dict[str, Any]]:
    return "FLOAT", {"default": default, "min": low, "max": high, "step": step, "tooltip": tooltip}


def flag(tooltip: str, default: bool = False) -> tuple[str, dict[str, Any]]:
    return "BOOLEAN", {"default": default, "tooltip": tooltip}


def choice(tooltip: str, *choices: str) -> tuple[list[str], dict[str, Any]]:
    return list(choices), {"default": choices[0], "tooltip": tooltip}


def seed(tooltip: str) -> tuple[str, dict[str, Any]]:
    kind, options = integer(tooltip, 0, 0, LARGEST_SEED)
    return kind, {**options, "control_after_generate": True}


def side(name: str) -> tuple[str, dict[str, Any]]:
    """A side of the image to make; 0 leaves it open."""
    tooltip = f"{name} in pixels, a multiple of 32 (at the decoder's `upscale` 2). 0: the model's own."
    return integer(tooltip, 0, 0, 4096, 32)


def refusal_of_empty(name: str, value: str | None) -> bool | str:
    """What `VALIDATE_INPUTS` says before anything runs. A value that another node makes is not known then: `None`."""
    return True if value is None or value.strip() else f"`{name}` must not be empty."


def size_of(height: int, width: int) -> tuple[int | None, int | None]:
    """The sides as the pipeline takes them."""
    return height or None, width or None


def generators(seed: int, count: int) -> list[torch.Generator]:
    """For each image one of its own: the image of a seed is the same alone and in a batch."""
    return [torch.Generator().manual_seed((seed + index) % (LARGEST_SEED + 1)) for index in range(count)]


def to_pil(images: torch.Tensor) -> list[PIL.Image.Image]:
    """ComfyUI's `IMAGE`: `(batch, height, width, 3 or 4)` in 0..1."""
    pixels = (images.clamp(0, 1) * 255).round().to("cpu", torch.uint8).numpy()
    return [PIL.Image.fromarray(image) for image in pixels]


def masks_to_pil(masks: torch.Tensor, images: list[PIL.Image.Image]) -> list[PIL.Image.Image]:
    """
    ComfyUI's `MASK`, `(batch, height, width)` in 0..1, scaled to the images; one for each, or one for all.

    Raises:
        ValueError: if there is another number of them, or one has nothing that is marked.
    """
    masks = masks[None] if masks.ndim == 2 else masks
    if len(masks) not in (1, len(images)):
        raise ValueError(f"`mask` has {len(masks)} masks for {len(images)} images; give one for each, or one for all.")
    if (masks.flatten(1).amax(dim=1) <= 0.5).any():
        raise ValueError(
            "`mask` marks nothing. Paint what is to be made anew: right-click on the Load Image node, Open in "
            "MaskEditor."
        )
    pixels = (255 * (masks > 0.5)).to("cpu", torch.uint8).expand(len(images), -1, -1).numpy()
    marked = [PIL.Image.fromarray(mask) for mask in pixels]
    return [mask.resize(image.size, PIL.Image.Resampling.NEAREST) for mask, image in zip(marked, images, strict=True)]
