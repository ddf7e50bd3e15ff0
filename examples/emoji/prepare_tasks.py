"""
All tasks on the emoji as token ids, for a model whose image tokenizer is trained.

    python examples/emoji/prepare_tasks.py emoji-datasource-twitter-16.0.0.tgz runs/emoji/model runs/emoji/tasks

Each image is encoded once. Writes `text/`, `alignment/` (drawing and naming), `all/`, `sft/` (all tasks, with more
naming), `refining/` (more drawing by name, more skin tones), `polishing/` and `finishing/` (more naming, above all of
pairs of people) and `sentences/` (for the adapter) as prepared datasets (input_ids, labels) for `llada-uni train sft`.
"""

import argparse
import random
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, concatenate_datasets
from emoji_codes import codes_of
from emoji_table import Emoji, load_emoji
from tasks import EmojiTasks, Story, shown_to_adapter, texts_of_all_tasks
from wordings import NAMING, SENTENCE, TRAINED_DRAWING, subjects

from transformers_llada_uni.loading.model_loading import load_model, load_processor
from transformers_llada_uni.training import prepare_dataset


# How often an image is drawn, named, asked about and thought of in one round; how many edits, and each story.
# A name is longer to learn than a picture: a row of naming has five words to learn from, one of drawing sixteen codes.
PRETRAINING = {"drawing": 8, "naming": 12, "questions": 1, "thinking": 2, "editing": 12_000, "stories": 10}
FINE_TUNING = {"drawing": 6, "naming": 10, "conversations": 2, "thinking": 2, "editing": 12_000, "stories": 12}
# What was weakest after fine-tuning (drawing by name, changing tones) makes most of the next stage.
REFINING = {
    "drawing": 3,
    "drawing_by_name": 8,
    "naming": 6,
    "conversations": 1,
    "thinking": 1,
    "editing": 6_000,
    "toning": 9_000,
    "stories": 8,
}
# And what was weakest after that: names, most of all of two people with a skin tone each.
POLISHING = {
    "drawing": 2,
    "drawing_by_name": 5,
    "naming": 12,
    "naming_of_pairs": 12,
    "conversations": 1,
    "thinking": 1,
    "editing": 6_000,
    "toning": 9_000,
    "stories": 6,
}
# Half of the wrong names that were left are those of two people with a tone each, a fourteenth of the emoji.
FINISHING = {
    "drawing": 1,
    "drawing_by_name": 4,
    "naming": 8,
    "naming_of_pairs": 60,
    "conversations": 1,
    "thinking": 1,
    "editing": 4_000,
    "toning": 6_000,
    "stories": 6,
}

STAGES = {
    "all": PRETRAINING,
    "sft": FINE_TUNING,
    "refining": REFINING,
    "polishing": POLISHING,
    "finishing": FINISHING,
}

Row = dict[str, Any]


class TaskRows:
    """
    Rows of each task, in the formats of `docs/training.md`, on images that may be trained on.

    Args:
        table (`list[Emoji]`): All emoji.
        codes: Of each emoji by its key.
        seed (`int`): Of what is drawn at random.
    """

    def __init__(self, table: list[Emoji], codes: dict[str, dict[str, list[int]]], seed: int):
        self.tasks = EmojiTasks(table)
        self.trained = [emoji for emoji in table if not emoji.is_held_out]
        self.codes = codes
        self.generator = random.Random(seed)

    def drawing(self, repeats: int) -> list[Row]:
        rows = []
        for emoji in self.trained:
            for _ in range(repeats):
                wording = self.generator.choice(TRAINED_DRAWING)
                # Half of the wishes use the name, the rest other words for it
                is_plain = self.generator.random() < 0.5
                subject = emoji.name if is_plain else self.generator.choice(subjects(emoji))
                rows.append({"caption": wording.format(subject), "image_codes": [self.codes[emoji.key]]})
        return rows

    def drawing_by_name(self, repeats: int) -> list[Row]:
        return [
            {
                "caption": self.generator.choice(TRAINED_DRAWING).format(emoji.name),
                "image_codes": [self.codes[emoji.key]],
            }
            for emoji in self.trained
            for _ in range(repeats)
        ]

    def thinking(self, repeats: int) -> list[Row]:
        rows = []
        for emoji in self.trained:
            if not emoji.tones:
                for _ in range(repeats):
                    wish, thought = self.tasks.thought(emoji, self.generator)
                    rows.append({"caption": wish, "thinking": thought, "image_codes": [self.codes[emoji.key]]})
        return rows

    def naming(self, repeats: int) -> list[Row]:
        return self._names(self.trained, repeats)

    def naming_of_pairs(self, repeats: int) -> list[Row]:
        return self._names([emoji for emoji in self.trained if len(emoji.tones) > 1], repeats)

    def _names(self, named: list[Emoji], repeats: int) -> list[Row]:
        return [
            self._question(emoji, self.generator.choice(NAMING), emoji.answer_name)
            for emoji in named
            for _ in range(repeats)
        ]

    def conversations(self, repeats: int) -> list[Row]:
        """The name, and then another question about the same image."""
        rows = []
        for emoji in self.trained:
            for _ in range(repeats):
                row = self._question(emoji, self.generator.choice(NAMING), emoji.answer_name)
                question, answer = self.tasks.questions(emoji, self.generator)
                row["messages"] += chat([{"type": "text", "text": question}], [{"type": "text", "text": answer}])
                rows.append(row)
        return rows

    def sentences(self) -> list[Row]:
        """Name and category at once, for the adapter."""
        return [
            self._question(emoji, self.generator.choice(NAMING), SENTENCE.format(emoji.answer_name, emoji.category))
            for emoji in shown_to_adapter(self.trained)
        ]

    def questions(self, repeats: int) -> list[Row]:
        return [
            self._question(emoji, *self.tasks.questions(emoji, self.generator))
            for emoji in self.trained
            for _ in range(repeats)
        ]

    def editing(self, count: int) -> list[Row]:
        """Each kind of edit is drawn alike, skin tones more often: there are fifty times as many."""
        shares = {"skin tone": 0.35, "gender": 0.3, "hair": 0.1, "flag": 0.12, "clock": 0.1, "moon": 0.03}
        return self._edits({kind: round(share * count) for kind, share in shares.items()})

    def toning(self, count: int) -> list[Row]:
        return self._edits({"skin tone": count})

    def _edits(self, counts: dict[str, int]) -> list[Row]:
        by_kind: dict[str, list] = {}
        for edit in self.tasks.edits():
            if not self.tasks.by_key[edit.target].is_held_out:
                by_kind.setdefault(edit.kind, []).append(edit)
        rows = []
        for kind, count in counts.items():
            for edit in self.generator.choices(by_kind[kind], k=count):
                instruction = self.generator.choice(edit.instructions)
                pair = [self.codes[edit.source], self.codes[edit.target]]
                rows.append({"instruction": instruction, "image_codes": pair})
        return rows

    def stories(self, repeats: int) -> list[Row]:
        return [self._story(story) for story in self.tasks.stories() for _ in range(repeats)]

    def _question(self, emoji: Emoji, question: str, answer: str) -> Row:
        content = [{"type": "image"}, {"type": "text", "text": question}]
        return {"messages": chat(content, [{"type": "text", "text": answer}]), "image_codes": [self.codes[emoji.key]]}

    def _story(self, story: Story) -> Row:
        answer = []
        for sentence, _ in story.parts:
            answer += [{"type": "text", "text": sentence}, {"type": "image"}]
        codes = [self.codes[key] for _, key in story.parts]
        return {"messages": chat([{"type": "text", "text": story.wish}], answer), "image_codes": codes}


def chat(question: list[dict], answer: list[dict]) -> list[dict]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", type=Path, help="emoji-datasource-twitter-16.0.0.tgz")
    parser.add_argument("model", type=Path, help="The pipeline folder.")
    parser.add_argument("output_dir", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    table = load_emoji(arguments.package)
    model, processor = load_model(str(arguments.model)), load_processor(str(arguments.model))
    codes = codes_of(table, model, processor)
    distinct = {tuple(codes[emoji.key]["codes"]) for emoji in table}
    print(f"{len(distinct)} different rows of codes for {len({e.picture.tobytes() for e in table})} pictures.")

    rows = TaskRows(table, codes, arguments.seed)
    texts = texts_of_all_tasks(rows.trained)

    def prepared(*tasks: list[Row]) -> DatasetDict:
        settings = {"block_length": model.config.text_config.block_length, "max_length": 256, "seed": arguments.seed}
        parts = [prepare_dataset(Dataset.from_list(task), processor, **settings) for task in tasks]
        return DatasetDict(train=concatenate_datasets(parts).shuffle(seed=arguments.seed))

    prepared([{"text": text} for text in texts]).save_to_disk(arguments.output_dir / "text")
    prepared(rows.drawing(4), rows.naming(4)).save_to_disk(arguments.output_dir / "alignment")
    prepared(rows.sentences()).save_to_disk(arguments.output_dir / "sentences")
    for name, counts in STAGES.items():
        tasks = [getattr(rows, task)(count) for task, count in counts.items()]
        prepared(*tasks).save_to_disk(arguments.output_dir / name)


if __name__ == "__main__":
    main()
