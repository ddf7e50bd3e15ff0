"""
The emoji of an npm package as a dataset of images with names, and as a text to train a tokenizer on.

    npm pack emoji-datasource-twitter@16.0.0
    python examples/emoji/prepare_data.py emoji-datasource-twitter-16.0.0.tgz runs/emoji/data

Writes `pictures/` (splits "train" and "held_out"; columns image, caption, key, content, style) and `corpus.txt`.
Graphics: Twemoji, CC-BY 4.0.
"""

import argparse
from pathlib import Path

from datasets import Dataset, DatasetDict, Features, Image, Value
from emoji_table import Emoji, load_emoji
from tasks import texts_of_all_tasks


TEXT_COLUMNS = ("caption", "key", "content", "style")
FEATURES = Features({"image": Image(), **{name: Value("string") for name in TEXT_COLUMNS}})


def pictures(table: list[Emoji], is_held_out: bool) -> Dataset:
    rows = [emoji for emoji in table if emoji.is_held_out == is_held_out]
    columns = {
        "image": [emoji.picture for emoji in rows],
        "caption": [emoji.answer_name for emoji in rows],
        "key": [emoji.key for emoji in rows],
        # What the codes of variants share, and what tells them apart
        "content": [emoji.base for emoji in rows],
        "style": [", ".join(emoji.tones) for emoji in rows],
    }
    return Dataset.from_dict(columns, features=FEATURES)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", type=Path, help="emoji-datasource-twitter-16.0.0.tgz")
    parser.add_argument("output_dir", type=Path)
    arguments = parser.parse_args()
    table = load_emoji(arguments.package)
    splits = DatasetDict(train=pictures(table, False), held_out=pictures(table, True))
    splits.save_to_disk(arguments.output_dir / "pictures")
    texts = texts_of_all_tasks([emoji for emoji in table if not emoji.is_held_out])
    (arguments.output_dir / "corpus.txt").write_text("\n".join(texts) + "\n", encoding="utf-8")
    print(f"{len(splits['train'])} pictures to train on, {len(splits['held_out'])} held out, {len(texts)} texts.")


if __name__ == "__main__":
    main()
