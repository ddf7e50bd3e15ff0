"""
What the emoji model can do, measured.

    python examples/emoji/evaluate.py emoji-datasource-twitter-16.0.0.tgz            # the shipped model
    python examples/emoji/evaluate.py emoji-datasource-twitter-16.0.0.tgz --model runs/emoji/model --share 0.1

Prints a table; `--card FILE` also writes it there, between the lines that mark its place. An image counts as right
if, of all 3,786 emoji, the nearest one (L2 in 32 x 32 RGB) is the one asked for.
"""

import argparse
import random
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from emoji_table import Emoji, load_emoji
from nearest_emoji import NearestEmoji
from PIL import Image
from tasks import Edit, EmojiTasks, Story, shown_to_adapter
from tqdm import tqdm
from wordings import HELD_OUT_DRAWING, NAMING, SENTENCE, TRAINED_DRAWING

from diffusers_llada_uni import embedded_checkpoint


TABLE_BEGIN, TABLE_END = "<!-- evaluation -->", "<!-- /evaluation -->"
BATCH = 64


class Evaluation:
    """
    Args:
        pipe: The pipeline.
        table: All emoji.
        seed: Of all noise; each batch has a generator of its own.
    """

    def __init__(self, pipe: DiffusionPipeline, table: list[Emoji], seed: int):
        self.pipe, self.seed = pipe, seed
        self.tasks = EmojiTasks(table)
        self.nearest = NearestEmoji(table)
        pipe.set_progress_bar_config(disable=True)

    def _batches(self, what: str, rows: list[Any]) -> Iterable[tuple[list[Any], torch.Generator]]:
        starts = range(0, len(rows), BATCH)
        for number, start in enumerate(tqdm(starts, desc=what, unit="batch")):
            yield rows[start : start + BATCH], torch.Generator().manual_seed(self.seed + number)

    def _share(self, results: list[bool]) -> float:
        return sum(results) / max(len(results), 1)

    # Measures: each gives the share of what is right

    def naming(self, rows: list[Emoji], answer: str = "{}", **settings: Any) -> float:
        """The exact name, asked with a wording that goes round, or an `answer` with name and category."""
        processor, model, results = self.pipe.processor, self.pipe.model, []
        for batch, _ in self._batches("naming", rows):
            questions = [NAMING[number % len(NAMING)] for number in range(len(batch))]
            pictures = [[emoji.picture] for emoji in batch]
            inputs = processor(images=pictures, text=questions, task="understanding")
            sequences = model.generate(**inputs, max_new_tokens=32, **settings)
            answers = sequences[:, inputs["input_ids"].shape[1] :]
            texts = processor.batch_decode(answers, skip_special_tokens=True)
            for text, emoji in zip(texts, batch, strict=True):
                results.append(text.strip() in [answer.format(name, emoji.category) for name in emoji.names])
        return self._share(results)

    def drawing(self, rows: list[Emoji], wordings: tuple[str, ...], **settings: Any) -> float:
        """The asked emoji is the nearest to what was drawn."""
        results = []
        for batch, generator in self._batches("drawing", rows):
            prompts = [wordings[number % len(wordings)].format(emoji.name) for number, emoji in enumerate(batch)]
            pictures = self.pipe(prompts, generator=generator, **settings).images
            results += self._found(pictures, [emoji.key for emoji in batch])
        return self._share(results)

    def editing(self, rows: list[Edit]) -> float:
        """The target is the nearest to what became of the source."""
        results = []
        for batch, generator in self._batches("editing", rows):
            sources = [self.tasks.by_key[edit.source].picture for edit in batch]
            instructions = [edit.instructions[n % len(edit.instructions)] for n, edit in enumerate(batch)]
            pictures = self.pipe(instructions, image=[[source] for source in sources], generator=generator).images
            results += self._found(pictures, [edit.target for edit in batch])
        return self._share(results)

    def stories(self, rows: list[Story]) -> float:
        """All sentences and all images are right, in order."""
        results = []
        for story in tqdm(rows, desc="stories"):
            generator = torch.Generator().manual_seed(self.seed)
            parts = self.pipe.interleave(story.wish, max_images=6, generator=generator)
            texts = [part.strip() for part in parts if isinstance(part, str) and part.strip()]
            pictures = [part for part in parts if isinstance(part, Image.Image)]
            is_right = texts == [sentence for sentence, _ in story.parts] and len(pictures) == len(story.parts)
            results.append(is_right and all(self._found(pictures, [key for _, key in story.parts])))
        return self._share(results)

    def codebook_usage(self, rows: list[Emoji]) -> float:
        """The share of codes that some image has."""
        used = set()
        for batch, _ in self._batches("encoding", rows):
            inputs = self.pipe.processor.image_processor(
                [[emoji.picture] for emoji in batch], resize_mode="editing", return_tensors="pt"
            )
            for codes in self.pipe.model.get_image_codes(inputs["pixel_values"], inputs["image_grid_thw"]):
                used |= set(codes.flatten().tolist())
        return len(used) / self.pipe.model.config.vq_config.num_embeddings

    def _found(self, pictures: list[Image.Image], keys: list[str]) -> list[bool]:
        return [key in found for found, key in zip(self.nearest(pictures), keys, strict=True)]


def timed(measure: Callable[..., float], *args: Any, **settings: Any) -> tuple[float, float]:
    start = time.perf_counter()
    return measure(*args, **settings), time.perf_counter() - start


def evaluate(
    pipe: DiffusionPipeline, adapter: Path, table: list[Emoji], share: float, seed: int
) -> list[tuple[str, str, str]]:
    """Rows of the table: what, the goal, what was found."""
    evaluation, generator = Evaluation(pipe, table, seed), random.Random(seed)
    tasks = evaluation.tasks

    def some(rows: list[Any], most: int | None = None) -> list[Any]:
        count = max(1, round(share * len(rows)))
        return generator.sample(rows, min(count, most or count))

    trained = [emoji for emoji in table if not emoji.is_held_out]
    held_out = [emoji for emoji in table if emoji.is_held_out]
    edits = tasks.edits()
    new_edits = some([edit for edit in edits if tasks.by_key[edit.target].is_held_out], most=500)
    # Every kind alike, so that the many pairs of skin tones do not hide the rest
    kinds = sorted({edit.kind for edit in edits})
    known = [edit for edit in edits if not tasks.by_key[edit.target].is_held_out]
    known_edits = [e for kind in kinds for e in some([edit for edit in known if edit.kind == kind], most=100)]

    rows: list[tuple[str, str, str]] = []

    def add(what: str, goal: str, found: float, number: int) -> None:
        rows.append((what, goal, f"{100 * found:.1f}% of {number}"))
        print(f"{what}: {rows[-1][2]} (goal {goal or 'none'})", flush=True)

    def measure(what: str, goal: str, method: Callable, subjects: list[Any], *args: Any) -> None:
        add(what, goal, method(subjects, *args), len(subjects))

    measure("names, emoji of the training", ">= 95%", evaluation.naming, trained)
    measure("names, held-out skin tones", ">= 70%", evaluation.naming, held_out)
    measure("text-to-image, emoji of the training", ">= 90%", evaluation.drawing, some(trained), TRAINED_DRAWING)
    measure("text-to-image, held-out wordings", ">= 80%", evaluation.drawing, some(trained), HELD_OUT_DRAWING)
    measure("text-to-image, held-out skin tones", ">= 60%", evaluation.drawing, held_out, TRAINED_DRAWING)
    measure("edits", ">= 85%", evaluation.editing, known_edits)
    measure("edits to held-out skin tones", ">= 50%", evaluation.editing, new_edits)
    measure("stories", ">= 80%", evaluation.stories, some(tasks.stories(), most=100))

    sample = some(trained, most=256)
    # Turbo is the default decoder where it is loaded.
    exact, exact_seconds = timed(evaluation.drawing, sample, TRAINED_DRAWING)
    if pipe.loaded_decoders == ["turbo", "normal"]:
        normal, normal_seconds = timed(evaluation.drawing, sample, TRAINED_DRAWING, decoder="normal")
        found = f"{100 * (normal - exact):+.1f} points ({100 * exact:.1f}% and {100 * normal:.1f}% of {len(sample)}), "
        found += f"{normal_seconds / exact_seconds:.1f}x the time"
        rows.append(("50 steps against turbo", "<= 2 points", found))
    # The ratios of the paper's example
    ratios = {"text_keep_ratio": 1.0, "image_keep_ratio": 0.8}
    sprint = {"cache_implementation": "sprint", "cache_config": ratios}
    approximate, sprint_seconds = timed(evaluation.drawing, sample, TRAINED_DRAWING, generation_kwargs=sprint)
    found = f"{100 * (exact - approximate):+.1f} points, {exact_seconds / sprint_seconds:.2f}x faster in all"
    rows.append(("exact decoding against SPRINT", "<= 3 points", found))
    add("codes used", ">= 80%", evaluation.codebook_usage(trained), len(trained))
    if adapter.is_dir():
        pipe.model.load_adapter(str(adapter))
        shown = {emoji.key for emoji in shown_to_adapter(trained)}
        others = some([emoji for emoji in trained if emoji.key not in shown], most=500)
        measure("name and category, emoji the adapter was not shown", "", evaluation.naming, others, SENTENCE)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", type=Path, help="emoji-datasource-twitter-16.0.0.tgz")
    parser.add_argument("--model", type=Path, help="A pipeline folder; default: the shipped one.")
    parser.add_argument(
        "--share", type=float, default=1.0, help="Share of the trained emoji to draw and of the edits."
    )
    parser.add_argument("--card", type=Path, help="The model card to write the table into.")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    folder = arguments.model or embedded_checkpoint()
    pipe = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    start = time.perf_counter()
    rows = evaluate(pipe, folder / "adapter", load_emoji(arguments.package), arguments.share, arguments.seed)
    lines = ["| measure | goal | found |", "|---|---|---|", *(f"| {' | '.join(row)} |" for row in rows)]
    print("\n".join(lines), f"\n{(time.perf_counter() - start) / 60:.0f} minutes.")
    if arguments.card is not None:
        text = arguments.card.read_text(encoding="utf-8")
        before, _, rest = text.partition(TABLE_BEGIN)
        _, _, after = rest.partition(TABLE_END)
        table = "\n".join([TABLE_BEGIN, *lines, TABLE_END])
        part = arguments.card.with_suffix(".part")
        part.write_text(before + table + after, encoding="utf-8")
        part.rename(arguments.card)


if __name__ == "__main__":
    main()
