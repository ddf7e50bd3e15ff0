"""
What re-masking does to errors and to what is right: the shipped emoji model names emoji and writes codes of them, once
as ever, once checked, and once with wrong tokens planted in every finished block before it is checked.

    python benchmarks/planted_errors.py packages        # examples/emoji/packages.py says what it holds

Counted are tokens that differ from those of decoding without re-masking, and batched forward passes. What is planted
behind the end of a row is not seen.
"""

import argparse
import random
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from diffusers_llada_uni import embedded_checkpoint


sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "examples" / "emoji"))
from emoji_table import load_emoji
from questions import NAMING
from wishes import BEFORE

from tests.transformers_llada_uni.generation.planted_errors import planted_errors


def num_different(found: torch.Tensor, wanted: torch.Tensor) -> int:
    """Tokens of two answers, each `(rows, length)`, of which one may be longer."""
    width = max(found.shape[1], wanted.shape[1])
    padded = (torch.nn.functional.pad(ids, (0, width - ids.shape[1]), value=-1) for ids in (found, wanted))
    return int(torch.ne(*padded).sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", type=Path, help="The folder of the npm packages, see examples/emoji/packages.py.")
    parser.add_argument("--subjects", type=int, default=64)
    parser.add_argument("--share", type=float, default=0.1, help="of the tokens of each block that are replaced")
    parser.add_argument("--thresholds", nargs="+", type=float, default=[0.01, 0.05, 0.3])
    arguments = parser.parse_args()

    folder = embedded_checkpoint("emoji")
    model = AutoModelForImageTextToText.from_pretrained(folder / "model", dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder / "processor")
    trained = [emoji for emoji in load_emoji(arguments.packages) if not emoji.is_held_out]
    subjects = random.Random(0).sample(trained, arguments.subjects)
    asked = [NAMING[number % len(NAMING)] for number in range(len(subjects))]
    wished = [BEFORE[number % len(BEFORE)].format(emoji.name) for number, emoji in enumerate(subjects)]
    questions = processor(images=[[emoji.picture] for emoji in subjects], text=asked, task="understanding")
    wishes = processor(text=wished, task="text_to_image", height=64, width=64)
    config = model.config.get_text_config()
    first_code, vocab_size = config.image_token_offset, config.vocab_size
    tasks: dict[str, tuple[Callable, tuple[int, int]]] = {
        "names": (lambda **settings: model.generate(**questions, max_new_tokens=32, **settings), (3, first_code)),
        "codes": (lambda **settings: model.generate_image_codes(**wishes, **settings), (first_code, vocab_size)),
    }
    print(f"{len(subjects)} emoji, {100 * arguments.share:g}% planted\n")
    print("| what | threshold | planted | wrong at the end | changed where none is planted | passes, before |")
    print("|---|---|---|---|---|---|")
    for what, (generate, ids) in tasks.items():
        plain = generate(return_dict_in_generate=True)
        for threshold in arguments.thresholds:
            checked = generate(remasking_threshold=threshold, return_dict_in_generate=True)
            with planted_errors(arguments.share, ids) as planted:
                found = generate(remasking_threshold=threshold)
            cells = [what, threshold, sum(planted), num_different(found, plain.sequences)]
            cells += [num_different(checked.sequences, plain.sequences)]
            cells += [f"{checked.num_forward_passes}, {plain.num_forward_passes}"]
            print(f"| {' | '.join(map(str, cells))} |", flush=True)


if __name__ == "__main__":
    main()
