"""A tiny model learns conversations by heart, and an adapter others; merged and exported it says them again."""

import random
import shutil

import numpy as np
import pytest
import torch
from datasets import Dataset, concatenate_datasets
from PIL import Image
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

from llada_uni.conversion.convert_llada_uni_checkpoint import convert_to_released
from transformers_llada_uni.training.data.preparation import prepare_dataset
from transformers_llada_uni.training.lora import lora_config
from transformers_llada_uni.training.sft_config import LLaDAUniSFTConfig
from transformers_llada_uni.training.sft_trainer import LLaDAUniSFTTrainer


BLOCK = 8
GRID = (4, 4)
WORDS = ["red", "blue", "green", "cat", "dog", "sun", "moon", "tree"]


@pytest.fixture(scope="module")
def processor(converted_dir):
    processor = AutoProcessor.from_pretrained(converted_dir / "processor")
    processor.image_processor.min_pixels = processor.image_processor.editing_max_pixels = 64 * 64
    return processor


def picture(seed):
    squares = np.random.default_rng(seed).integers(0, 256, (*GRID, 3), dtype=np.uint8)
    return Image.fromarray(squares.repeat(16, axis=0).repeat(16, axis=1))


def answer(seed):
    return " ".join(random.Random(seed).sample(WORDS, 3))


def conversations(seed):
    """Three chats, three questions about images, and three images to make."""
    chats = [
        {"messages": [{"role": "user", "content": f"Say {i}"}, {"role": "assistant", "content": answer(seed + i)}]}
        for i in range(3)
    ]
    question = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Name it"}]}
    questions = [
        {
            "messages": [
                question,
                {"role": "assistant", "content": [{"type": "text", "text": answer(seed + 100 + i)}]},
            ],
            "images": [picture(i)],
        }
        for i in range(3)
    ]
    drawings = [{"caption": f"scene {i}", "image": picture(seed + 50 + i)} for i in range(3)]
    return {
        "text": Dataset.from_list(chats),
        "understanding": Dataset.from_list(questions),
        "text_to_image": Dataset.from_list(drawings),
    }


def prepared(seed, processor, model):
    settings = {"block_length": BLOCK, "caption_dropout": 0.0, "model": model}
    return {task: prepare_dataset(rows, processor, **settings) for task, rows in conversations(seed).items()}


def train(model, rows, processor, folder, **settings):
    peft_config = settings.pop("peft_config", None)
    args = LLaDAUniSFTConfig(
        str(folder),
        per_device_train_batch_size=12,
        block_length=BLOCK,
        weighting="none",
        warmup_steps=15,
        lr_scheduler_type="cosine",
        gradient_checkpointing=False,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        **settings,
    )
    dataset = concatenate_datasets(list(rows.values()))
    trainer = LLaDAUniSFTTrainer(
        model, args, train_dataset=dataset, processing_class=processor, peft_config=peft_config
    )
    trainer.train()
    return trainer


def count_verbatim(model, rows, processor):
    """How many rows the model says again, ids for ids, given what comes before their labels."""
    model.eval()
    tokenizer = processor.tokenizer
    image_offset, role_end = processor.image_token_offset, tokenizer.convert_tokens_to_ids("<|role_end|>")
    correct = dict.fromkeys(rows, 0)
    for task, dataset in rows.items():
        for row in dataset:
            begin = next(place for place, label in enumerate(row["labels"]) if label != -100)
            prompt, wanted = torch.tensor([row["input_ids"][:begin]]), row["input_ids"][begin:]
            if task == "text_to_image":
                wanted = wanted[: GRID[0] * GRID[1]]
                codes = model.generate_image_codes(prompt, grid=GRID, guidance_scale=1.0, num_steps_per_block=BLOCK)
                said = (codes[0] + image_offset).tolist()
            else:
                wanted = wanted[: wanted.index(role_end) + 1]
                said = model.generate(prompt, max_new_tokens=len(wanted), num_steps_per_block=BLOCK)[
                    0, begin:
                ].tolist()
            correct[task] += said == wanted
    return correct


def test_learns_adapts_merges_and_exports(converted_dir, processor, tmp_path):
    everything = {"text": 3, "understanding": 3, "text_to_image": 3}

    # 1. In full: nine conversations by heart.
    model = AutoModelForImageTextToText.from_pretrained(converted_dir / "model")
    rows = prepared(0, processor, model)
    assert sum(count_verbatim(model, rows, processor).values()) == 0
    trainer = train(model, rows, processor, tmp_path / "full", max_steps=70, learning_rate=1e-2)
    assert count_verbatim(trainer.model, rows, processor) == everything

    # 2. By an adapter alone: nine others, to the same questions.
    rows = prepared(1000, processor, model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer = train(
        model,
        rows,
        processor,
        tmp_path / "adapter",
        max_steps=70,
        learning_rate=1.5e-2,
        peft_config=lora_config(r=16, lora_alpha=16),
    )
    adapted = trainer.model
    assert count_verbatim(adapted, rows, processor) == everything
    with adapted.disable_adapter():
        assert sum(count_verbatim(adapted, rows, processor).values()) <= 1

    # 3. Merged: the same outputs without adapter.
    ids = torch.tensor([rows["understanding"][0]["input_ids"]])
    with torch.no_grad():
        logits = adapted(input_ids=ids).logits
        merged = adapted.merge_and_unload()
        torch.testing.assert_close(merged(input_ids=ids).logits, logits, rtol=1e-3, atol=1e-3)
    assert count_verbatim(merged, rows, processor) == everything
    changed = {name for name, tensor in merged.state_dict().items() if not torch.equal(tensor, before[name])}
    for part in ("query_key_value", "attention.dense", "experts.gate_up_proj", "shared_experts.up_proj"):
        assert any(part in name for name in changed), part
    assert not any("visual" in name or "word_embeddings" in name or "lm_head" in name for name in changed)

    # 4. In the released layout: the same outputs from its files.
    pipeline = tmp_path / "pipeline"
    shutil.copytree(converted_dir, pipeline)
    shutil.rmtree(pipeline / "model")
    merged.save_pretrained(pipeline / "model")
    released = convert_to_released(pipeline, tmp_path / "released", progress=False)
    backbone = AutoModelForCausalLM.from_pretrained(released)
    with torch.no_grad():
        torch.testing.assert_close(backbone(input_ids=ids, block_length=BLOCK).logits, merged(input_ids=ids).logits)
    expected = AutoModelForImageTextToText.from_pretrained(pipeline / "model").generation_config
    assert expected.block_length == BLOCK
    backbone.generation_config.block_length = BLOCK  # the released layout has no field for it
    text = {"text": rows["text"]}
    assert count_verbatim(backbone, text, processor) == {"text": 3}


def test_trains_on_a_mix_of_tasks_with_images(converted_dir, processor, tmp_path):
    """The trainer makes codes and ids by itself; its checkpoint is a model with its processor."""
    model = AutoModelForImageTextToText.from_pretrained(converted_dir / "model")
    args = LLaDAUniSFTConfig(
        str(tmp_path / "mix"),
        max_steps=2,
        logging_steps=1,
        per_device_train_batch_size=16,
        block_length=BLOCK,
        task_mix={"text": 1, "understanding": 1, "text_to_image": 2},
        stage="pretraining",
        max_length=256,
        use_cpu=True,
        report_to=[],
        save_steps=2,
    )
    trainer = LLaDAUniSFTTrainer(
        model,
        args,
        train_dataset=conversations(0),
        eval_dataset=conversations(5)["text_to_image"],
        processing_class=processor,
    )
    trainer.train()
    first = trainer.state.log_history[0]
    assert first["text_loss"] > 0 and first["image_loss"] > 0 and first["block_length"] == BLOCK
    assert "eval_image_loss" in trainer.evaluate()
    checkpoint = tmp_path / "mix" / "checkpoint-2"
    saved = AutoProcessor.from_pretrained(checkpoint)
    assert saved.image_processor.min_pixels == 64 * 64
    again = AutoModelForImageTextToText.from_pretrained(checkpoint)
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_trains_from_a_name_and_a_stream(official_tiny, tmp_path):
    args = LLaDAUniSFTConfig(str(tmp_path), max_steps=2, logging_steps=1, use_cpu=True, report_to=[], packing=True)
    stream = Dataset.from_list([{"text": f"{answer(i)} and {answer(i + 1)}"} for i in range(40)]).to_iterable_dataset()
    trainer = LLaDAUniSFTTrainer(str(official_tiny), args, train_dataset=stream)
    trainer.train()
    assert trainer.block_length == trainer.model.config.block_length == 32
    assert trainer.state.log_history[0]["text_loss"] > 0
