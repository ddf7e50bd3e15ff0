"""
The emoji of an npm package as a dataset of images with names, and as a text to train a tokenizer on.

    python examples/emoji/prepare_data.py packages runs/emoji/data

Writes `pictures/` (splits "train" and "held_out"; columns image, caption, key, content, style) and `corpus.txt`. Each
emoji stands there on white, and several times on another ground or smaller. Graphics: Twemoji, CC-BY 4.0.
"""

import argparse
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, Features, Image, List, Value
from emoji_codes import EmojiCodes, styles_of
from emoji_table import Emoji, load_emoji
from grounds import GROUNDS, SIZES, on_ground
from prepare_tasks import PRETRAINING, texts_of
from task_rows import TaskRows


# What the codes of variants share, and what tells them apart: tones of one and of a second person, ground, size
FEATURES = Features(
    {
        "image": Image(),
        **{name: Value("string") for name in ("caption", "key", "content")},
        "style": List(Value("string")),
    }
)
NUM_VARIANTS = 5  # of each emoji beside the one on white
NUM_EMPTY = 3  # times each empty ground


def pictures(table: list[Emoji], generator: random.Random) -> Iterator[dict[str, Any]]:
    places = [(ground, size) for ground in GROUNDS for size in SIZES]
    for emoji in table:
        for ground, size in [("white", "big"), *generator.sample(places[1:], NUM_VARIANTS)]:
            yield {
                "image": on_ground(emoji.drawn, ground, size),
                "caption": emoji.answer_name,
                "key": emoji.key,
                "content": emoji.base,
                "style": styles_of(emoji.tones, ground, size),
            }
    for ground in GROUNDS:
        for size in SIZES:
            style = styles_of((), ground, size)
            row = {
                "image": on_ground(None, ground),
                "caption": "nothing",
                "key": "",
                "content": "nothing",
                "style": style,
            }
            yield from [row] * NUM_EMPTY


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", type=Path, help="The folder of the npm packages, see packages.py.")
    parser.add_argument("output_dir", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    table = load_emoji(arguments.packages)
    parts = {
        "train": [emoji for emoji in table if not emoji.is_held_out],
        "held_out": [emoji for emoji in table if emoji.is_held_out],
    }
    splits = DatasetDict(
        {
            name: Dataset.from_list(list(pictures(part, random.Random(arguments.seed))), features=FEATURES)
            for name, part in parts.items()
        }
    )
    splits.save_to_disk(arguments.output_dir / "pictures")
    # Codes are not known yet, words are.
    codes = EmojiCodes.without_codes(table)
    rows = TaskRows(table, codes, arguments.packages, arguments.seed)
    texts = texts_of([row for task, count in PRETRAINING.items() for row in getattr(rows, task)(count)])
    (arguments.output_dir / "corpus.txt").write_text("\n".join(texts) + "\n", encoding="utf-8")
    print(f"{len(splits['train'])} pictures to train on, {len(splits['held_out'])} held out, {len(texts)} texts.")


if __name__ == "__main__":
    main()
