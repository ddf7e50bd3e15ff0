"""
Reads a photograph, answers about it, makes a picture from a prompt, edits the photograph; saves everything.

    python examples/quickstart.py                               # the tiny checkpoint in this repository, on a CPU
    python examples/quickstart.py --checkpoint DIR --size 1024  # the released weights, or a converted folder

The tiny checkpoint has random weights: it shows that everything runs, its words and pictures are noise.
"""

import argparse
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from PIL import Image

import diffusers_llada_uni  # noqa: F401  registers the pipeline and the models


ROOT = Path(__file__).resolve().parents[1]
TINY_CHECKPOINT = ROOT / "tests" / "fixtures" / "official_tiny"


def photograph(size: int) -> Image.Image:
    """The Summer Palace, a photograph that comes with scikit-learn, cut to a square."""
    from sklearn.datasets import load_sample_image

    picture = Image.fromarray(load_sample_image("china.jpg"))
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    return picture.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.LANCZOS)


def load_pipeline(checkpoint: Path, output_dir: Path) -> DiffusionPipeline:
    """Loads a converted folder, or converts a folder in the released layout first."""
    if not (checkpoint / "model_index.json").exists():
        converted = output_dir / "checkpoint"
        if not converted.exists():
            sys.path.insert(0, str(ROOT))  # the converter belongs to the repository, not to the installed packages
            from conversion.convert_llada_uni_checkpoint import convert_to_diffusers

            convert_to_diffusers(checkpoint, converted)
        checkpoint = converted
    if torch.cuda.is_available():
        return DiffusionPipeline.from_pretrained(checkpoint, dtype=torch.bfloat16).to("cuda")
    return DiffusionPipeline.from_pretrained(checkpoint, dtype=torch.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=TINY_CHECKPOINT)
    parser.add_argument("--output-dir", type=Path, default=ROOT / "outputs" / "quickstart")
    parser.add_argument("--prompt", default="a red apple on a wooden table")
    parser.add_argument("--question", default="What is in this picture?")
    parser.add_argument("--instruction", default="Change the background to a beach.")
    parser.add_argument("--image", type=Path, help="Your own picture in place of the photograph.")
    parser.add_argument("--size", type=int, default=256, help="Sides of the pictures made, in pixels.")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="Length of the answer at most.")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    report = []

    @contextmanager
    def timed(what: str, path: Path | None = None):
        start = time.perf_counter()
        yield
        where = "" if path is None else f" -> {path}"
        report.append(f"{time.perf_counter() - start:7.2f} s  {what}{where}")

    def generator() -> torch.Generator:
        return torch.Generator().manual_seed(arguments.seed)

    with timed("loaded the model"):
        pipe = load_pipeline(arguments.checkpoint, arguments.output_dir)

    source_path = arguments.output_dir / "photograph.png"
    source = Image.open(arguments.image) if arguments.image else photograph(arguments.size)
    source.save(source_path)

    answer_path = arguments.output_dir / "answer.txt"
    with timed("read the photograph and answered", answer_path):
        content = [{"type": "image", "image": source}, {"type": "text", "text": arguments.question}]
        messages = [{"role": "user", "content": content}]
        answer = pipe.chat(messages, max_new_tokens=arguments.max_new_tokens)
        answer_path.write_text(f"{arguments.question}\n{answer}\n", encoding="utf-8")

    size = {"height": arguments.size, "width": arguments.size}
    drawn_path = arguments.output_dir / "drawn.png"
    with timed(f"drew {arguments.prompt!r}", drawn_path):
        pipe(arguments.prompt, **size, generator=generator()).images[0].save(drawn_path)

    edited_path = arguments.output_dir / "edited.png"
    with timed(f"edited the photograph: {arguments.instruction!r}", edited_path):
        pipe(arguments.instruction, image=source, **size, generator=generator()).images[0].save(edited_path)

    print("\n" + "\n".join(report))
    print(f"\nphotograph: {source_path}\neverything: {arguments.output_dir}")


if __name__ == "__main__":
    main()
