"""
What the emoji model can do, measured.

    python examples/emoji/evaluate.py packages                              # the shipped model
    python examples/emoji/evaluate.py packages --model runs/emoji/model --share 0.1

Prints a table; `--card FILE` also writes it there, between the lines that mark its place. An image counts as right
if, of all 3,786 emoji, the nearest one (L2 in 32 x 32 RGB) is the one asked for; a scene, if all its places are.
"""

import argparse
import csv
import itertools
import random
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from emoji_table import Emoji, load_emoji
from grounds import CELL
from keywords import Keywords
from nearest_emoji import NearestEmoji
from PIL import Image, ImageChops
from questions import NAMING, Questions
from riddles import Riddle, Riddles
from scenes import Scene, Scenes, drawn
from task_rows import SENTENCE
from tasks import Edit, EmojiTasks, Story, shown_to_adapter
from tqdm import tqdm
from wishes import BEFORE, HELD_OUT_BEFORE

from diffusers_llada_uni import LLaDAUniPipeline, embedded_checkpoint


TABLE_BEGIN, TABLE_END = "<!-- evaluation -->", "<!-- /evaluation -->"
BATCH = 64
TYPED = Path(__file__).parent / "typed_prompts.tsv"  # by people who did not know the wordings, with what they accept
SEEDS = 4


class Evaluation:
    """
    Args:
        pipe: The pipeline.
        table: All emoji.
        seed: Of all noise; each batch has a generator of its own.
    """

    def __init__(self, pipe: LLaDAUniPipeline, table: list[Emoji], seed: int):
        self.pipe: Any = pipe  # all its parts are there, its images are of PIL
        self.seed = seed
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

    def accepted(self, rows: list[tuple[str, set[str]]], seed: int = 0, **settings: Any) -> list[bool]:
        """Of wordings, whether what was drawn is one of the emoji (by their keys) that are accepted."""
        results = []
        for batch, generator in self._batches("wordings", rows):
            generator.manual_seed(generator.initial_seed() + 1000 * seed)
            pictures = self.pipe([words for words, _ in batch], generator=generator, **settings).images
            results += [bool(keys & found) for (_, keys), found in zip(batch, self.nearest(pictures), strict=True)]
        return results

    def wordings(self, rows: list[tuple[str, set[str]]]) -> float:
        return self._share(self.accepted(rows))

    def variety(self, rows: list[tuple[str, set[str]]]) -> tuple[float, float]:
        """Of wordings drawn by four seeds, sampled: the share that is right, and of those with several sets of codes
        (the decoder's noise alone makes other pixels)."""
        right: list[bool] = []
        codes_of: list[set[tuple[int, ...]]] = [set() for _ in rows]
        for seed in range(SEEDS):
            start = 0
            for batch, generator in self._batches("seeds", rows):
                generator.manual_seed(generator.initial_seed() + 1000 * seed)
                prompts = [words for words, _ in batch]
                drawn = self.pipe(prompts, generator=generator, generation_kwargs={"do_sample": True})
                found = self.nearest(drawn.images)
                right += [bool(keys & names) for (_, keys), names in zip(batch, found, strict=True)]
                for number, codes in enumerate(drawn.codes):
                    codes_of[start + number].add(tuple(codes.flatten().tolist()))
                start += len(batch)
        return self._share(right), self._share([len(codes) > 1 for codes in codes_of])

    def answers(self, rows: list[tuple[list[Image.Image], str, str]], **settings: Any) -> float:
        """Images, a question and its one answer."""
        processor, model, results = self.pipe.processor, self.pipe.model, []
        by_size = sorted(rows, key=lambda row: ([image.size for image in row[0]], row[1]))
        for batch, _ in self._batches("answers", by_size):
            inputs = processor(
                images=[images for images, _, _ in batch], text=[words for _, words, _ in batch], task="understanding"
            )
            sequences = model.generate(**inputs, max_new_tokens=64, **settings)
            texts = processor.batch_decode(sequences[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            results += [text.strip() == answer for text, (_, _, answer) in zip(texts, batch, strict=True)]
        return self._share(results)

    def scenes(self, rows: list[tuple[Scene, str]], **settings: Any) -> float:
        """Scenes by their wishes: every emoji in its place."""
        results = []
        for shape, group in self._by_shape(rows, lambda row: row[0].shape):
            for batch, generator in self._batches(f"scenes of {shape}", group):
                height, width = shape[0] * CELL, shape[1] * CELL
                prompts = [words for _, words in batch]
                pictures = self.pipe(prompts, height=height, width=width, generator=generator, **settings).images
                results += self._all_in_place(pictures, [scene for scene, _ in batch])
        return self._share(results)

    def scene_edits(self, rows: list[tuple[Scene, str, Scene]]) -> float:
        results = []
        for shape, group in self._by_shape(rows, lambda row: row[0].shape):
            for batch, generator in self._batches(f"edits of {shape}", group):
                sources = [[drawn(source, self.tasks.by_key)] for source, _, _ in batch]
                pictures = self.pipe([words for _, words, _ in batch], image=sources, generator=generator).images
                results += self._all_in_place(pictures, [target for _, _, target in batch])
        return self._share(results)

    def infilling(self, rows: list[tuple[Scene, str]]) -> float:
        """One place of a scene is hidden; its wish says what was there."""
        results = []
        for number, (scene, words) in enumerate(tqdm(rows, desc="infilling")):
            image = drawn(scene, self.tasks.by_key)
            index = next(place for place, placed in enumerate(scene.places) if placed is not None)
            columns = scene.shape[1]
            left, top = index % columns * CELL, index // columns * CELL
            mask = Image.new("L", image.size, 0)
            mask.paste(255, (left, top, left + CELL, top + CELL))
            generator = torch.Generator().manual_seed(self.seed + number)
            filled = self.pipe(words, image=image, mask_image=mask, generator=generator).images[0]
            results.append(all(self.nearest.in_places(filled, scene)))
        return self._share(results)

    def own_drawings(self, rows: list[Emoji]) -> float:
        """Emoji drawn by their names, and what the model calls its drawings."""
        processor, model, results = self.pipe.processor, self.pipe.model, []
        for batch, generator in self._batches("own drawings", rows):
            pictures = self.pipe([emoji.name for emoji in batch], generator=generator).images
            inputs = processor(
                images=[[picture] for picture in pictures], text=[NAMING[0]] * len(batch), task="understanding"
            )
            sequences = model.generate(**inputs, max_new_tokens=32)
            texts = processor.batch_decode(sequences[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            shown = self.nearest(pictures)
            # What it has drawn, not what it was asked for, is what it should see.
            names = [set().union(*(self.tasks.by_key[key].names for key in keys if key)) for keys in shown]
            results += [text.strip() in right for text, right in zip(texts, names, strict=True)]
        return self._share(results)

    def riddles(self, rows: list[Riddle], is_thought: bool) -> float:
        results = []
        for shape, group in self._by_shape(rows, lambda row: row.scene.shape):
            for batch, generator in self._batches("riddles", group):
                size = {"height": shape[0] * CELL, "width": shape[1] * CELL}
                pictures = self.pipe(
                    [row.wish for row in batch], thinking=is_thought, generator=generator, **size
                ).images
                results += self._all_in_place(pictures, [riddle.scene for riddle in batch])
        return self._share(results)

    def shared_codes(self, rows: list[Emoji]) -> tuple[int, float]:
        """How many base emoji share all codes with one that looks different, and the share of all images that do."""
        owners: dict[tuple[int, ...], list[Emoji]] = {}
        for batch, _ in self._batches("encoding", rows):
            for emoji, codes in zip(batch, self._codes(batch), strict=True):
                owners.setdefault(codes, []).append(emoji)
        shared = [
            emoji
            for alike in owners.values()
            for emoji in alike
            if any(_look_different(emoji.picture, other.picture) for other in alike)
        ]
        return sum(not emoji.tones for emoji in shared), len(shared) / len(rows)

    def _codes(self, batch: list[Emoji]) -> list[tuple[int, ...]]:
        pictures = [[emoji.picture] for emoji in batch]
        inputs = self.pipe.processor.image_processor(pictures, return_tensors="pt")
        grids = self.pipe.model.get_image_codes(inputs["pixel_values"], inputs["image_grid_thw"])
        return [tuple(grid.flatten().tolist()) for grid in grids]

    def _all_in_place(self, pictures: list[Image.Image], scenes: list[Scene]) -> list[bool]:
        return [all(self.nearest.in_places(*pair)) for pair in zip(pictures, scenes, strict=True)]

    def _by_shape(self, rows: list[Any], shape_of: Callable[[Any], Any]) -> Iterable[tuple[Any, list[Any]]]:
        for shape, group in itertools.groupby(sorted(rows, key=shape_of), key=shape_of):
            yield shape, list(group)

    def codebook_usage(self, rows: list[Emoji]) -> float:
        """The share of codes that some image has."""
        used: set[int] = set()
        for batch, _ in self._batches("encoding", rows):
            used.update(*self._codes(batch))
        return len(used) / self.pipe.model.config.vq_config.num_embeddings

    def _found(self, pictures: list[Image.Image], keys: list[str]) -> list[bool]:
        return [key in found for found, key in zip(self.nearest(pictures), keys, strict=True)]


def _look_different(one: Image.Image, other: Image.Image) -> bool:
    """The flag of Norway is drawn a little differently for one of its islands: at edges, by 23 of 255."""
    differences = ImageChops.difference(one.convert("RGB"), other.convert("RGB"))
    levels = np.asarray(differences)
    return bool(levels.max() > 32 or levels.mean() > 1)


def timed(measure: Callable[..., float], *args: Any, **settings: Any) -> tuple[float, float]:
    start = time.perf_counter()
    return measure(*args, **settings), time.perf_counter() - start


def typed_prompts(table: list[Emoji]) -> list[tuple[str, set[str]]]:
    """What people typed, with the keys of what they accept."""
    with TYPED.open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file, delimiter="\t"))[1:]
    return [(words, set(accepted.split("|"))) for words, accepted in rows]


def evaluate(
    pipe: LLaDAUniPipeline, adapter: Path, packages: Path, share: float, seed: int
) -> list[tuple[str, str, str]]:
    """Rows of the table: what, the goal, what was found."""
    table = load_emoji(packages)
    evaluation, generator = Evaluation(pipe, table, seed), random.Random(seed)
    tasks, keywords = evaluation.tasks, Keywords(table, packages)
    asked = Questions(table, keywords, generator)
    scenes = Scenes(table, generator)
    riddles = Riddles(table, scenes, generator)

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
    measure("text-to-image, emoji of the training", ">= 90%", evaluation.drawing, some(trained), BEFORE)
    measure("text-to-image, held-out wordings", ">= 80%", evaluation.drawing, some(trained), HELD_OUT_BEFORE)
    measure("text-to-image, held-out skin tones", ">= 60%", evaluation.drawing, held_out, BEFORE)
    measure("edits", ">= 85%", evaluation.editing, known_edits)
    measure("edits to held-out skin tones", ">= 50%", evaluation.editing, new_edits)
    measure("stories", ">= 80%", evaluation.stories, some(tasks.stories(), most=100))

    sample = some(trained, most=256)
    free = some(sorted(keywords.held_out.items()), most=1000)
    are_right = evaluation.accepted(free)
    add("words of a source that was kept out", ">= 80%", sum(are_right) / len(free), len(free))
    for what, is_known in (("of these, other sources have", True), ("of these, no other source has", False)):
        of_kind = [r for r, (word, _) in zip(are_right, free, strict=True) if (word in keywords.emoji_of) == is_known]
        if of_kind:
            add(what, "", sum(of_kind) / len(of_kind), len(of_kind))
    measure("prompts as people typed them", ">= 85%", evaluation.wordings, typed_prompts(table))
    people = [emoji for emoji in trained if not emoji.tones]
    coloured = [emoji for emoji in people if asked.colours[emoji.key] is not None]
    kinds_of_questions: dict[str, list[tuple[list[Image.Image], str, str]]] = {
        "yes or no": [([emoji.picture], *asked.is_of_kind(emoji)) for emoji in some(people, most=250)]
        + [([emoji.picture], *asked.is_called(emoji)) for emoji in some(people, most=250)],
        "category": [([emoji.picture], *asked.category(emoji)) for emoji in some(people, most=500)],
        "colour": [([emoji.picture], *asked.colour(emoji)) for emoji in some(coloured, most=500)],
    }
    some_scenes = [scenes.any_scene() for _ in range(max(1, round(1000 * share)))]
    kinds_of_questions["count, in scenes"] = [
        ([drawn(scene, tasks.by_key)], *scenes.count(scene)) for scene in some_scenes
    ]
    kinds_of_questions["all others, in scenes"] = [
        ([drawn(scene, tasks.by_key)], *scenes.questions(scene)) for scene in some_scenes
    ]
    for kind, rows_of_kind in kinds_of_questions.items():
        measure(f"questions: {kind}", ">= 90%", evaluation.answers, rows_of_kind)
    measure("own drawings named", ">= 85%", evaluation.own_drawings, some(trained, most=500))
    wished = [(scene, scenes.wish(scene)) for scene in some_scenes]
    measure("scenes, every emoji in its place", ">= 85%", evaluation.scenes, wished)
    pairs = [scenes.any_scene(held_out=True) for _ in some_scenes]
    measure(
        "scenes of pairs never seen together", ">= 65%", evaluation.scenes, [(one, scenes.wish(one)) for one in pairs]
    )
    edits_of_scenes = list(itertools.islice(scenes.edits(), len(some_scenes)))
    measure("edits of scenes", ">= 75%", evaluation.scene_edits, edits_of_scenes)
    measure("infilling under a mask", ">= 75%", evaluation.infilling, wished[: max(1, len(wished) // 4)])
    told = [riddles.any_riddle(held_out=True) for _ in some_scenes]
    with_thoughts, without = (evaluation.riddles(told, is_thought) for is_thought in (True, False))
    add("riddles and sums never seen, with thoughts", ">= 70%", with_thoughts, len(told))
    found = f"{100 * (with_thoughts - without):+.1f} points"
    rows.append(("with thoughts minus without", ">= 15 points", found))
    number, shared = evaluation.shared_codes(trained)
    rows.append(("base emoji that share all codes", "0", f"{number} of {len(people)}"))
    rows.append(("images that share all codes", "< 0.5%", f"{100 * shared:.1f}% of {len(trained)}"))
    right, varied = evaluation.variety(typed_prompts(table))
    add("the same prompts by four seeds, sampled", ">= 85%", right, SEEDS * len(typed_prompts(table)))
    rows.append(("prompts with more than one set of codes", "", f"{100 * varied:.0f}%"))

    # Turbo is the default decoder where it is loaded.
    exact, exact_seconds = timed(evaluation.drawing, sample, BEFORE)
    if pipe.loaded_decoders == ["turbo", "normal"]:
        normal, normal_seconds = timed(evaluation.drawing, sample, BEFORE, decoder="normal")
        found = f"{100 * (normal - exact):+.1f} points ({100 * exact:.1f}% and {100 * normal:.1f}% of {len(sample)}), "
        found += f"{normal_seconds / exact_seconds:.1f}x the time"
        rows.append(("50 steps against turbo", "<= 2 points", found))
    # The ratios of the paper's example
    ratios = {"text_keep_ratio": 1.0, "image_keep_ratio": 0.8}
    sprint = {"cache_implementation": "sprint", "cache_config": ratios}
    approximate, sprint_seconds = timed(evaluation.drawing, sample, BEFORE, generation_kwargs=sprint)
    found = f"{100 * (exact - approximate):+.1f} points, {exact_seconds / sprint_seconds:.2f}x faster in all"
    rows.append(("exact decoding against SPRINT", "<= 3 points", found))
    add(
        "codes used",
        ">= 80%",
        evaluation.codebook_usage(trained),
        evaluation.pipe.model.config.vq_config.num_embeddings,
    )
    if adapter.is_dir():
        evaluation.pipe.model.load_adapter(str(adapter))
        shown = {emoji.key for emoji in shown_to_adapter(trained)}
        others = some([emoji for emoji in trained if emoji.key not in shown], most=500)
        measure("name and category, emoji the adapter was not shown", "", evaluation.naming, others, SENTENCE)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", type=Path, help="The folder of the npm packages, see packages.py.")
    parser.add_argument("--model", type=Path, help="A pipeline folder; default: the shipped one.")
    parser.add_argument(
        "--share", type=float, default=1.0, help="Share of the trained emoji to draw and of the edits."
    )
    parser.add_argument("--card", type=Path, help="The model card to write the table into.")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    folder = arguments.model or embedded_checkpoint()
    pipe = LLaDAUniPipeline.from_pretrained(folder, dtype=torch.float32)
    start = time.perf_counter()
    rows = evaluate(pipe, folder / "adapter", arguments.packages, arguments.share, arguments.seed)
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
