"""
All tasks on the emoji as token ids, for a model whose codes are settled.

    python examples/emoji/prepare_tasks.py packages runs/emoji/model runs/emoji/data/codes.json runs/emoji/tasks

Writes `text/`, `alignment/` (drawing and naming), `pretraining/`, `sft/` and `finishing/` (all tasks, in other shares)
and `sentences/` (for the adapter) as prepared datasets (input_ids, labels) for `llada-uni train sft`. With
`--readings FILE`, which `prepare_readings.py` writes, `words/` alone: images as the tokenizer reads them.
"""

import argparse
from pathlib import Path

from datasets import Dataset, DatasetDict, concatenate_datasets
from emoji_codes import EmojiCodes
from emoji_table import load_emoji
from task_rows import Row, TaskRows

from transformers_llada_uni.loading.model_loading import load_processor
from transformers_llada_uni.training import prepare_dataset


# How often an emoji is drawn, named, asked about and thought of in one round; how many edits, scenes, riddles.
# A name is longer to learn than an image: a row of naming has five words to learn from, one of drawing sixteen codes.
PRETRAINING = {
    "drawing": 12,
    "drawing_by_name": 4,
    "naming": 10,
    "describing": 2,
    "questions": 5,
    "comparing": 6_000,
    "unknown": 1_000,
    "thinking": 2,
    "editing": 14_000,
    "placing": 4_000,
    "stories": 8,
    "growing_stories": 1_500,
    "scenes": 30_000,
    "scene_questions": 15_000,
    "scene_edits": 20_000,
    "riddles": 12_000,
}
FINE_TUNING = {**PRETRAINING, "conversations": 3, "naming_of_pairs": 8, "toning": 4_000}
# What is hardest last: names of two people with a tone each, drawing by any words
FINISHING = {**FINE_TUNING, "drawing": 16, "naming": 12, "naming_of_pairs": 40, "unknown": 500}
# What is many and was seldom seen: every word for every emoji, every question; of the rest a little.
WORDS = {
    "wordings": 3,
    "categories": 12,
    "kinds": 5,
    "questions": 6,
    "looking": 60_000,
    "looking_edits": 45_000,
    "drawing": 4,
    "naming": 7,
    "naming_of_pairs": 12,
    "describing": 1,
    "comparing": 2_000,
    "unknown": 150,
    "thinking": 1,
    "editing": 7_000,
    "toning": 1_000,
    "placing": 1_200,
    "stories": 5,
    "growing_stories": 400,
    "scenes": 7_000,
    "scene_edits": 8_000,
    "riddles": 1_600,
}
STAGES = {"pretraining": PRETRAINING, "sft": FINE_TUNING, "finishing": FINISHING}
MAX_LENGTH = 384  # an edit of nine emoji: twice 144 codes, and the words


def texts_of(rows: list[Row]) -> list[str]:
    """Every sentence that a model of the emoji has to read or write, for a tokenizer and for text pre-training."""
    texts: dict[str, None] = {}
    for row in rows:
        for name in ("caption", "instruction", "thinking"):
            if name in row:
                texts[row[name]] = None
        for message in row.get("messages", []):
            for part in message["content"]:
                if part["type"] == "text":
                    texts[part["text"]] = None
    return list(texts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", type=Path, help="The folder of the npm packages.")
    parser.add_argument("model", type=Path, help="The pipeline folder.")
    parser.add_argument("codes", type=Path, help="What prepare_codes.py has settled.")
    parser.add_argument("output_dir", type=Path)
    parser.add_argument("--readings", type=Path, help="What prepare_readings.py has written, for `words/`.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--share", type=float, default=1.0, help="Of all counts, for a quick look.")
    arguments = parser.parse_args()
    table = load_emoji(arguments.packages)
    processor = load_processor(str(arguments.model))
    codes = EmojiCodes.load(arguments.codes, table)
    rows = TaskRows(table, codes, arguments.packages, arguments.seed, arguments.readings)

    def prepared(*tasks: list[Row]) -> DatasetDict:
        settings = {"block_length": 16, "max_length": MAX_LENGTH, "seed": arguments.seed}
        parts = [prepare_dataset(Dataset.from_list(task), processor, **settings) for task in tasks if task]
        return DatasetDict(train=concatenate_datasets(parts).shuffle(seed=arguments.seed))

    def round_of(counts: dict[str, int]) -> list[list[Row]]:
        return [getattr(rows, task)(max(1, round(count * arguments.share))) for task, count in counts.items()]

    if arguments.readings is not None:
        prepared(*round_of(WORDS)).save_to_disk(arguments.output_dir / "words")
        return
    tasks = round_of(PRETRAINING)
    texts = texts_of([row for task in tasks for row in task])
    prepared([{"text": text} for text in texts]).save_to_disk(arguments.output_dir / "text")
    prepared(rows.drawing_by_name(4), rows.naming(4)).save_to_disk(arguments.output_dir / "alignment")
    prepared(rows.sentences()).save_to_disk(arguments.output_dir / "sentences")
    for name, counts in STAGES.items():
        prepared(*round_of(counts)).save_to_disk(arguments.output_dir / name)


if __name__ == "__main__":
    main()
