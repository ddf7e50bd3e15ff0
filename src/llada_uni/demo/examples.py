"""What a visitor can click to see what a model does."""

from dataclasses import dataclass
from pathlib import Path

from diffusers_llada_uni import embedded_checkpoint

from ..trained_parts import base_of_adapter, is_adapter


IMAGES = Path(__file__).with_name("example_images")


@dataclass(frozen=True)
class Examples:
    """
    Attributes:
        drawings: Prompts.
        edits: Files of images with what to change; no file for the image that stands there.
        questions: Words with files of images.
        stories: Prompts.
        credit: A line below the page, in Markdown.
    """

    drawings: tuple[str, ...]
    edits: tuple[tuple[Path | None, str], ...]
    questions: tuple[tuple[str, tuple[Path, ...]], ...]
    stories: tuple[str, ...]
    credit: str = ""


EMOJI = Examples(
    drawings=("a red apple", "thumbs up with dark skin", "a bicycle", "cherries", "grinning face", "a sunflower"),
    edits=(
        (IMAGES / "waving_hand.png", "change the skin tone to dark"),
        (IMAGES / "three_oclock.png", "set the clock to seven o'clock"),
        (IMAGES / "full_moon.png", "change it to the first quarter moon"),
    ),
    questions=(
        ("what is this?", (IMAGES / "rocket.png",)),
        ("is it an animal?", (IMAGES / "spouting_whale.png",)),
        ("which emoji is this?", (IMAGES / "cat_face.png",)),
    ),
    stories=("a story of 4 moon phases from the new moon", "a story of 3 hours from three o'clock"),
    credit=(
        "This small model knows emoji and little else. It resembles "
        "[Twemoji](https://github.com/jdecked/twemoji) by Twitter and contributors, CC-BY 4.0."
    ),
)

GENERAL = Examples(
    drawings=(
        "a red apple on a wooden table, morning light",
        "a fox in the snow, watercolour",
        "a poster that says HELLO in large letters",
    ),
    edits=((None, "make it winter"), (None, "turn it into an oil painting"), (None, "remove the background")),
    questions=(("What can you do?", ()), ("Write four lines about the sea.", ())),
    stories=(
        "A picture story about the phases of the moon.",
        "How to fold a paper boat, with a picture of each step.",
    ),
)


def examples_of(model: str) -> Examples:
    """
    Args:
        model: The folder or repository that the model is from, or an adapter of it.
    """
    base = base_of_adapter(model, Path(model)) if is_adapter(Path(model)) else model
    return EMOJI if base in ("emoji", str(embedded_checkpoint("emoji"))) else GENERAL
