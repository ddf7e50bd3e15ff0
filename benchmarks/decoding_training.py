r"""
What is gained by training for decoding (`confidence_weight`, `editing_weight`, `draft_share`), on the emoji model.

    python benchmarks/decoding_training.py packages \
        --models shipped control=runs/control editing=runs/editing

Each model is `shipped`, or NAME=FOLDER with the output folder of `llada-uni train sft`, which takes the shipped
language model's place.
Of each, with several settings of decoding: the shares of exact names and of exact descriptions of scenes, and of right
image codes of drawings and of scenes (which no decoder takes part in), and how often a block went through the model
for them, the mean over blocks of all rows, guidance not counted. And of each: where a tenth of the tokens of right
answers is replaced by others at random, how many of these a single pass with token editing repairs, and how many of
the right ones it spoils.
"""

import argparse
import itertools
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from datasets import Dataset, concatenate_datasets
from diffusers import DiffusionPipeline
from transformers import AutoModelForImageTextToText

from diffusers_llada_uni import embedded_checkpoint
from transformers_llada_uni.generation.policy import CommitPolicy
from transformers_llada_uni.generation.state import BlockState
from transformers_llada_uni.seeding import seeded_generator
from transformers_llada_uni.training import prepare_dataset
from transformers_llada_uni.training.objective.block_diffusion import never_shown
from transformers_llada_uni.training.objective.token_corruption import TokenCorruption


sys.path.insert(0, str(Path(__file__).parent.parent / "examples" / "emoji"))
from emoji_codes import SIDE
from emoji_table import Emoji, load_emoji
from evaluate import BATCH, Evaluation
from grounds import CELL
from questions import DESCRIBING, NAMING
from scenes import Scenes, drawn
from task_rows import chat, text
from wishes import BEFORE


SHIPPED: tuple[str, str | None] = ("shipped", None)
EDITING = {"editing_threshold": 0.9}
SETTINGS = {
    "0.95": {"threshold": 0.95},
    "0.85": {"threshold": 0.85},
    "0.5": {"threshold": 0.5},
    "0.95, editing": {"threshold": 0.95, **EDITING},
    "0.85, editing": {"threshold": 0.85, **EDITING},
    "0.5, editing": {"threshold": 0.5, **EDITING},
}


class PassesOfBlocks:
    """Counts the steps of each row's blocks, whatever is computed beside them."""

    def __init__(self) -> None:
        self.num_steps = self.num_blocks = 0

    @contextmanager
    def counting(self) -> Iterator[None]:
        begin, update = CommitPolicy.begin, CommitPolicy.update

        def counted_begin(policy: CommitPolicy, state: BlockState) -> None:
            self.num_blocks += int(state.masked.any(dim=-1).sum())
            begin(policy, state)

        def counted_update(policy: CommitPolicy, state: BlockState, *args: Any, **kwargs: Any) -> None:
            self.num_steps += int(state.predicted.any(dim=-1).sum())
            update(policy, state, *args, **kwargs)

        with (
            mock.patch.object(CommitPolicy, "begin", counted_begin),
            mock.patch.object(CommitPolicy, "update", counted_update),
        ):
            yield

    def measure(self, method: Any, *args: Any, **kwargs: Any) -> str:
        """Cells of the table: the share that is right, passes a block."""
        self.num_steps = self.num_blocks = 0
        with self.counting():
            share = method(*args, **kwargs)
        return f"{100 * share:.1f}% | {self.num_steps / self.num_blocks:.2f}"


def named_model(argument: str) -> tuple[str, str | None]:
    """Name and folder of a model; of the shipped one, no folder."""
    name, _, folder = argument.partition("=")
    if argument == SHIPPED[0]:
        return SHIPPED
    if not name or not folder or not Path(folder).is_dir():
        raise argparse.ArgumentTypeError(f"NAME=FOLDER is needed, and that there is the folder, got {argument!r}")
    return name, folder


def load_pipeline(folder: str | None) -> DiffusionPipeline:
    parts = {}
    if folder is not None:
        parts["model"] = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    return DiffusionPipeline.from_pretrained(embedded_checkpoint(), dtype=torch.float32, **parts)


def drawing(pipe: Any, wished: list[tuple[str, torch.Tensor]], seed: int, generation_kwargs: dict[str, Any]) -> float:
    """The share of codes that are those `(rows, columns)` of what was wished."""
    is_right = []
    for shape, group in itertools.groupby(sorted(wished, key=shape_of), key=shape_of):
        rows, (height, width) = list(group), (side // SIDE * CELL for side in shape)
        for start in range(0, len(rows), BATCH):
            batch = rows[start : start + BATCH]
            settings = {"generator": torch.Generator().manual_seed(seed + start), "height": height, "width": width}
            own_codes = pipe(
                [words for words, _ in batch], output_type="codes", generation_kwargs=generation_kwargs, **settings
            ).codes
            is_right += [(own == asked).flatten() for own, (_, asked) in zip(own_codes, batch, strict=True)]
    return torch.cat(is_right).float().mean().item()


def shape_of(wished: tuple[str, torch.Tensor]) -> tuple[int, ...]:
    return tuple(wished[1].shape)


@torch.no_grad()
def repairs(model: Any, answers: Dataset, threshold: float, seed: int) -> tuple[float, float]:
    """Of a tenth of an answer's tokens that is wrong the share that is repaired, and of the others what is spoilt."""
    config, corruption = model.config.text_config, TokenCorruption(rate=0.1)
    vocabulary = config.image_token_offset, config.vocab_size
    num_wrong = num_repaired = num_right = num_spoilt = 0
    for number, row in enumerate(answers):
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        shown, _, _ = corruption.corrupt(
            ids,
            labels,
            masked=torch.zeros(1, 1, ids.shape[1], dtype=torch.bool),
            weights=torch.zeros(1, 1, ids.shape[1]),
            masked_share=torch.zeros(ids.shape),
            vocabulary=vocabulary,
            never_shown=never_shown(model),
            document_ids=torch.zeros_like(ids),
            block_length=config.block_length,
            generators=[seeded_generator(seed, number)],
        )
        shown = shown[:, 0]
        best = model(input_ids=shown).logits.softmax(dim=-1).max(dim=-1)
        after = torch.where(best.values > threshold, best.indices, shown)
        is_wrong, is_right = shown != ids, (labels != -100) & (shown == ids)
        num_wrong, num_right = num_wrong + int(is_wrong.sum()), num_right + int(is_right.sum())
        num_repaired += int((is_wrong & (after == ids)).sum())
        num_spoilt += int((is_right & (after != ids)).sum())
    return num_repaired / max(num_wrong, 1), num_spoilt / max(num_right, 1)


def answers_of(pipe: DiffusionPipeline, subjects: list[Emoji], codes: list[torch.Tensor], seed: int) -> Dataset:
    """A name and a drawing of each subject, as rows of the training."""
    own = [{"grid": list(grid.shape), "codes": grid.flatten().tolist()} for grid in codes]
    drawings = [{"caption": emoji.name, "image_codes": [image]} for emoji, image in zip(subjects, own, strict=True)]
    question = [{"type": "image"}, text(NAMING[0])]
    names = [
        {"messages": chat(question, [text(emoji.answer_name)]), "image_codes": [image]}
        for emoji, image in zip(subjects, own, strict=True)
    ]
    settings = {"block_length": pipe.model.config.text_config.block_length, "max_length": 256, "seed": seed}
    parts = [Dataset.from_list(task) for task in (names, drawings)]
    return concatenate_datasets([prepare_dataset(part, pipe.processor, **settings) for part in parts])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", type=Path, help="The folder of the npm packages, see examples/emoji/packages.py.")
    parser.add_argument("--models", nargs="+", type=named_model, default=[SHIPPED], metavar="NAME=FOLDER")
    parser.add_argument("--subjects", type=int, default=256, help="emoji to name and to draw")
    parser.add_argument("--scenes", type=int, default=100, help="scenes to describe and to draw")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    table = load_emoji(arguments.packages)
    generator = random.Random(arguments.seed)
    subjects = generator.sample([emoji for emoji in table if not emoji.is_held_out], arguments.subjects)
    scenes = Scenes(table, generator)
    some_scenes = [scenes.any_scene() for _ in range(arguments.scenes)]
    images = [drawn(scene, scenes.by_key) for scene in some_scenes]
    asked = [
        ([image], DESCRIBING[number % len(DESCRIBING)], scenes.described(scene))
        for number, (image, scene) in enumerate(zip(images, some_scenes, strict=True))
    ]
    prompts = [BEFORE[number % len(BEFORE)].format(emoji.name) for number, emoji in enumerate(subjects)]
    threshold = EDITING["editing_threshold"]
    print(f"{len(subjects)} emoji, {len(some_scenes)} scenes; editing replaces with more than {threshold}\n")
    print("| model | threshold | names | passes | descriptions | passes | codes | passes | codes of scenes | passes |")
    print("|---" * 10 + "|")
    lines, codes = [], []
    for name, folder in arguments.models:
        evaluation = Evaluation(load_pipeline(folder), table, arguments.seed)
        pipe: Any = evaluation.pipe
        if not codes:  # all models have the same image tokenizer
            codes = pipe.encode_images([emoji.picture for emoji in subjects])
            wished = list(zip(prompts, codes, strict=True))
            wished_scenes = list(zip(map(scenes.wish, some_scenes), pipe.encode_images(images), strict=True))
        for setting in arguments.settings:
            passes, options = PassesOfBlocks(), SETTINGS[setting]
            cells = [
                passes.measure(evaluation.naming, subjects, **options),
                passes.measure(evaluation.answers, asked, **options),
                passes.measure(drawing, pipe, wished, arguments.seed, options),
                passes.measure(drawing, pipe, wished_scenes, arguments.seed, options),
            ]
            print(f"| {name} | {setting} | {' | '.join(cells)} |", flush=True)
        answers = answers_of(pipe, subjects, codes, arguments.seed)
        repaired, spoilt = repairs(pipe.model, answers, threshold, arguments.seed)
        lines.append(f"| {name} | {100 * repaired:.1f}% | {100 * spoilt:.2f}% |")
    print("\n| model | wrong tokens repaired | right ones spoilt |\n|---|---|---|")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
