"""
Draws three prompts, names an image, edits it, tells a story in words and images; saves everything.

    python examples/quickstart.py                                # the emoji model of this package, on a CPU
    python examples/quickstart.py --image mine.png --instruction "make it a man"
    python examples/quickstart.py --checkpoint DIR --prompts "a red fox in the snow"  # the released weights

The emoji model knows 3,786 emoji of 64 x 64 pixels and little else.
"""

import argparse
import hashlib
import time
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from PIL import Image

from diffusers_llada_uni import embedded_checkpoint


ROOT = Path(__file__).resolve().parents[1]
IMAGE = ROOT / "examples" / "emoji" / "pictures" / "waving_hand.png"
PROMPTS = ("a red apple", "thumbs up with dark skin", "show me an emoji of a rocket")


def load_pipeline(checkpoint: Path, output_dir: Path) -> DiffusionPipeline:
    """Loads a converted folder, or converts a folder in the released layout first: once, into `output_dir`."""
    if not (checkpoint / "model_index.json").exists():
        path = hashlib.sha256(str(checkpoint.resolve()).encode()).hexdigest()
        converted = output_dir / f"{checkpoint.resolve().name}-{path[:8]}"
        if not converted.exists():
            from llada_uni.conversion.convert_llada_uni_checkpoint import convert_to_diffusers

            convert_to_diffusers(checkpoint, converted)
        checkpoint = converted
    if torch.cuda.is_available():
        return DiffusionPipeline.from_pretrained(checkpoint, dtype=torch.bfloat16).to("cuda")
    return DiffusionPipeline.from_pretrained(checkpoint, dtype=torch.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="A pipeline folder; default: the emoji model.")
    parser.add_argument("--output-dir", type=Path, default=ROOT / "outputs" / "quickstart")
    parser.add_argument("--prompts", nargs="+", default=PROMPTS)
    parser.add_argument("--image", type=Path, default=IMAGE, help="An image of your own to name and edit.")
    parser.add_argument("--question", default="what is this?")
    parser.add_argument("--instruction", default="change the skin tone to dark")
    parser.add_argument("--story", default="a story of 4 moon phases from the new moon")
    parser.add_argument("--size", type=int, help="Sides of the images made, in pixels; default: the model's own.")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="Length of the answer at most.")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if not arguments.image.is_file():
        parser.error(f"--image: there is no file {arguments.image}.")
    if arguments.checkpoint is not None and not arguments.checkpoint.is_dir():
        parser.error(f"--checkpoint: there is no folder {arguments.checkpoint}.")
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    report = []

    @contextmanager
    def timed(what: str):
        start = time.perf_counter()
        yield
        report.append(f"{time.perf_counter() - start:7.2f} s  {what}")

    def generator() -> torch.Generator:
        return torch.Generator().manual_seed(arguments.seed)

    def save(image: Image.Image, name: str) -> Path:
        path = arguments.output_dir / f"{name}.png"
        image.save(path)
        return path

    with timed("loaded the model"):
        pipe = load_pipeline(arguments.checkpoint or embedded_checkpoint(), arguments.output_dir)
    size = {"height": arguments.size, "width": arguments.size} if arguments.size else {}

    with timed("drew " + ", ".join(map(repr, arguments.prompts))):
        images = pipe(list(arguments.prompts), **size, generator=generator()).images
    for number, image in enumerate(images, start=1):
        save(image, f"drawn_{number}")

    source = Image.open(arguments.image).convert("RGB")
    content = [{"type": "image", "image": source}, {"type": "text", "text": arguments.question}]
    with timed(f"read {arguments.image.name}"):
        answer = pipe.chat([{"role": "user", "content": content}], max_new_tokens=arguments.max_new_tokens).strip()
    with timed(f"edited it: {arguments.instruction!r}"):
        edited = pipe(arguments.instruction, image=source, **size, generator=generator()).images[0]
    save(source, "image")
    save(edited, "edited")

    with timed(f"told {arguments.story!r}"):
        parts = pipe.interleave(arguments.story, max_images=4, **size, generator=generator())
    story = []
    for part in parts:
        if isinstance(part, Image.Image):
            part = f"[{save(part, f'story_{len(story) + 1}').name}]"
        story.append(part.strip())
    text = f"{arguments.question}\n{answer}\n\n{arguments.story}\n" + "\n".join(filter(None, story)) + "\n"
    (arguments.output_dir / "words.txt").write_text(text, encoding="utf-8")

    print("\n" + text + "\n" + "\n".join(report) + f"\n\nEverything: {arguments.output_dir}")


if __name__ == "__main__":
    main()
