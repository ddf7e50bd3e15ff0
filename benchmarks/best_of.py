"""
What best of n gains: the shipped emoji model draws and names each subject several times, and judges its own answers.

    python benchmarks/best_of.py packages        # examples/emoji/packages.py says what it holds

Shares of exact names and of right drawings (of all emoji, the asked one is the nearest to the drawn one): of all
candidates, which is what a judge by chance would keep; of those that `num_candidates` keeps; of subjects with a right
one among theirs, which is what a judge that knows would keep.
"""

import argparse
import random
import sys
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from diffusers_llada_uni import embedded_checkpoint
from transformers_llada_uni.generation.best_of import best_of


sys.path.insert(0, str(Path(__file__).parent.parent / "examples" / "emoji"))
from emoji_table import Emoji, load_emoji
from nearest_emoji import NearestEmoji
from questions import NAMING
from wishes import BEFORE


BATCH = 64
Found = tuple[
    int, list[bool], list[float]
]  # how many different ones there are; of each, whether it is right; its score


def draw(pipe: DiffusionPipeline, subjects: list[Emoji], table: list[Emoji], arguments: argparse.Namespace) -> Found:
    """All candidates of a subject are decoded from the same noise, so that what differs is their codes."""
    count = arguments.candidates
    prompts = [BEFORE[i % len(BEFORE)].format(emoji.name) for i, emoji in enumerate(subjects)]
    codes = pipe(
        prompts,
        num_images_per_prompt=count,
        output_type="codes",
        generation_kwargs={"temperature": arguments.temperature},
        generator=torch.Generator().manual_seed(arguments.seed),
    ).codes
    subject_and_codes = [(row // count, tuple(grid.flatten().tolist())) for row, grid in enumerate(codes)]
    different = list(dict.fromkeys(subject_and_codes))
    nearest, is_right = NearestEmoji(table), {}
    for start in range(0, len(different), BATCH):
        batch = different[start : start + BATCH]
        grids = torch.tensor([grid for _, grid in batch]).view(len(batch), *codes[0].shape)
        noises = [torch.Generator().manual_seed(subject) for subject, _ in batch]
        for entry, found in zip(batch, nearest(pipe.decode_codes(grids, generator=noises)), strict=True):
            is_right[entry] = subjects[entry[0]].key in found
    scores = pipe.code_generator.judge([prompt for prompt in prompts for _ in range(count)], codes)
    return len(different), [is_right[entry] for entry in subject_and_codes], scores


def name(pipe: DiffusionPipeline, subjects: list[Emoji], table: list[Emoji], arguments: argparse.Namespace) -> Found:
    """Of each subject's image."""
    count, processor = arguments.candidates, pipe.processor
    images, questions = [[emoji.picture] for emoji in subjects], [NAMING[0]] * len(subjects)
    inputs = processor(images=images, text=questions, task="understanding")
    ids = pipe.model.generate(
        **inputs,
        max_new_tokens=32,
        do_sample=True,
        temperature=arguments.temperature,
        num_return_sequences=count,
        generator=torch.Generator().manual_seed(arguments.seed),
    )
    length, mask = inputs["input_ids"].shape[1], inputs["attention_mask"].bool().repeat_interleave(count, dim=0)
    answers = [text.strip() for text in processor.batch_decode(ids[:, length:], skip_special_tokens=True)]
    asked = [row[:length][is_token] for row, is_token in zip(ids, mask, strict=True)]
    scores = pipe.code_generator.judge_answers([None] * len(answers), asked, ids[:, length:], answers)
    different = len({(row // count, answer) for row, answer in enumerate(answers)})
    return different, [answer in subjects[row // count].names for row, answer in enumerate(answers)], scores


MEASURES = {"drawings": draw, "names": name}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", type=Path, help="The folder of the npm packages, see examples/emoji/packages.py.")
    parser.add_argument("--subjects", type=int, default=128, help="emoji to draw and to name")
    parser.add_argument("--candidates", type=int, default=4, help="of each")
    parser.add_argument("--temperature", type=float, default=2.0, help="of their sampling")
    parser.add_argument("--measures", nargs="+", choices=MEASURES, default=list(MEASURES))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    table = load_emoji(arguments.packages)
    trained = [emoji for emoji in table if not emoji.is_held_out]
    subjects = random.Random(arguments.seed).sample(trained, arguments.subjects)
    pipe = DiffusionPipeline.from_pretrained(embedded_checkpoint(), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    print("| of each emoji | temperature | different | any of them | best of them | one right |")
    print("|---|---|---|---|---|---|")
    for measure in arguments.measures:
        different, right, scores = MEASURES[measure](pipe, subjects, table, arguments)
        right = torch.tensor(right, dtype=torch.float)
        kept = right[best_of(scores, arguments.candidates)]
        shares = [
            different / len(right),
            right.mean(),
            kept.mean(),
            right.view(-1, arguments.candidates).amax(1).mean(),
        ]
        cells = [f"{arguments.candidates} {measure}", f"{arguments.temperature:g}"]
        print(f"| {' | '.join(cells + [f'{100 * float(share):.1f}%' for share in shares])} |", flush=True)


if __name__ == "__main__":
    main()
