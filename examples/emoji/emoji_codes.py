"""The image codes of all emoji."""

from datasets import Dataset
from emoji_table import Emoji

from transformers_llada_uni.training import encode_images


def codes_of(table: list[Emoji], model, processor) -> dict[str, dict[str, list[int]]]:
    """Of each emoji, by its key, the `grid` and `codes` that `encode_images` gives."""
    pictures = {"image": [emoji.picture for emoji in table], "caption": [emoji.name for emoji in table]}
    encoded = encode_images(Dataset.from_dict(pictures), model, processor, batch_size=64)["image_codes"]
    return {emoji.key: picture for emoji, (picture,) in zip(table, encoded, strict=True)}
