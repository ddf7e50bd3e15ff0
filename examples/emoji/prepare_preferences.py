"""
What the model gets wrong, as preferences: for DPO, the right codes or the right name over what the model wrote.

    python examples/emoji/prepare_preferences.py emoji-datasource-twitter-16.0.0.tgz runs/emoji/model \
        runs/emoji/preferences

The model draws every trained emoji a few times, by wordings of the training and by samples; codes that are nearer to
another emoji's than to the asked one's become rejected answers. It names each as often, and wrong names become
rejected answers, too. Writes prompt_ids, chosen_ids, rejected_ids.
"""

import argparse
import random
from pathlib import Path

import torch
from datasets import Dataset, DatasetDict, concatenate_datasets
from emoji_codes import codes_of
from emoji_table import Emoji, load_emoji
from prepare_tasks import chat
from tqdm import tqdm
from wordings import NAMING, TRAINED_DRAWING, subjects

from transformers_llada_uni.loading.model_loading import load_model, load_processor
from transformers_llada_uni.training import prepare_preference_dataset


BATCH = 128


def wrong_drawings(
    model, processor, table: list[Emoji], codes: torch.LongTensor, rounds: int, seed: int
) -> list[dict[str, list[int]]]:
    """Rows of preferences, from `rounds` drawings of each trained emoji; `codes` `(emoji, 16)` are the right ones."""
    chosen, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    offset, block_length = processor.image_token_offset, model.config.text_config.block_length
    end_of_image, end = model.config.image_end_token_id, processor.tokenizer.eos_token_id
    trained = [number for number, emoji in enumerate(table) if not emoji.is_held_out]
    numbers = [number for _ in range(rounds) for number in trained]
    rows = []
    for start in tqdm(range(0, len(numbers), BATCH), unit="batch"):
        batch = numbers[start : start + BATCH]
        texts = [chosen.choice(TRAINED_DRAWING).format(chosen.choice(subjects(table[number]))) for number in batch]
        inputs = processor(text=texts, task="text_to_image")
        found = model.generate_image_codes(**inputs, do_sample=True, generator=generator).flatten(1)
        distances = (found[:, None] != codes[None]).sum(dim=-1)
        for row, (number, text) in enumerate(zip(batch, texts, strict=True)):
            if distances[row, number] <= distances[row].min():
                continue
            prompt = processor(text=text, task="text_to_image")["input_ids"][0].tolist()
            answers = {}
            for name, picture in (("chosen_ids", codes[number]), ("rejected_ids", found[row])):
                answer = [offset + code for code in picture.tolist()] + [end_of_image]
                closing = 1 + -(len(prompt) + len(answer) + 1) % block_length
                answers[name] = answer + [end] * closing
            rows.append({"prompt_ids": prompt, **answers})
    return rows


def wrong_names(
    model, processor, table: list[Emoji], encoded: dict[str, dict[str, list[int]]], rounds: int, seed: int
) -> list[dict]:
    """The same from `rounds` namings of each trained emoji, as messages; `encoded` holds the codes of each."""
    chosen, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    named = [emoji for _ in range(rounds) for emoji in table if not emoji.is_held_out]
    rows = []
    for start in tqdm(range(0, len(named), BATCH), unit="batch"):
        batch = named[start : start + BATCH]
        questions = [chosen.choice(NAMING) for _ in batch]
        inputs = processor(images=[[emoji.picture] for emoji in batch], text=questions, task="understanding")
        sequences = model.generate(**inputs, max_new_tokens=32, do_sample=True, generator=generator)
        answers = processor.batch_decode(sequences[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for emoji, question, answer in zip(batch, questions, answers, strict=True):
            if answer.strip() in emoji.names:
                continue
            content = [{"type": "image"}, {"type": "text", "text": question}]
            prompt, right = chat(content, [{"type": "text", "text": emoji.answer_name}])
            _, wrong = chat(content, [{"type": "text", "text": answer.strip()}])
            messages = {"prompt": [prompt], "chosen": [right], "rejected": [wrong]}
            rows.append({**messages, "image_codes": [encoded[emoji.key]]})
    return rows


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", type=Path, help="emoji-datasource-twitter-16.0.0.tgz")
    parser.add_argument("model", type=Path, help="The pipeline folder.")
    parser.add_argument("output_dir", type=Path)
    parser.add_argument("--rounds", type=int, default=2, help="How often each emoji is drawn.")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    table = load_emoji(arguments.package)
    model, processor = load_model(str(arguments.model)).eval(), load_processor(str(arguments.model))
    encoded = codes_of(table, model, processor)
    codes = torch.tensor([encoded[emoji.key]["codes"] for emoji in table])
    drawings = wrong_drawings(model, processor, table, codes, arguments.rounds, arguments.seed)
    names = wrong_names(model, processor, table, encoded, arguments.rounds, arguments.seed)
    print(f"{len(drawings)} wrong drawings, {len(names)} wrong names.")
    names = prepare_preference_dataset(
        Dataset.from_list(names), processor, block_length=model.config.text_config.block_length
    )
    columns = ["prompt_ids", "chosen_ids", "rejected_ids"]
    rows = concatenate_datasets([Dataset.from_list(drawings).select_columns(columns), names.select_columns(columns)])
    DatasetDict(train=rows.shuffle(seed=arguments.seed)).save_to_disk(arguments.output_dir)


if __name__ == "__main__":
    main()
