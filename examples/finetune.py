"""
Fine-tunes with LoRA on a handful of conversations, one of them about an image; merges, saves, and asks again.

    python examples/finetune.py                                          # the tiny checkpoint in this repository
    python examples/finetune.py --checkpoint llada-uni --data my/dataset # a converted pipeline, your conversations

The tiny checkpoint has random weights. An adapter cannot make a speaker of it: watch the loss fall.
"""

import argparse
import tempfile
from pathlib import Path

import datasets
from datasets import Dataset, Image, List
from PIL import Image as PILImage

from llada_uni.conversion.convert_llada_uni_checkpoint import convert_to_diffusers
from transformers_llada_uni.training import LLaDAUniSFTConfig, LLaDAUniSFTTrainer, lora_config


TINY = Path(__file__).resolve().parents[1] / "tests" / "fixtures" / "official_tiny"


def conversations() -> Dataset:
    rows = {"messages": [], "images": []}
    for question, answer, images in (
        ("Up or down?", "Up.", []),
        ("What is the colour of the sky?", "Blue.", []),
        ("What do you see?", "A red square.", [PILImage.new("RGB", (64, 64), "red")]),
    ):
        rows["messages"].append([{"role": "user", "content": question}, {"role": "assistant", "content": answer}])
        rows["images"].append(images)
    return Dataset.from_dict(rows).cast_column("images", List(Image()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", help="a converted pipeline folder (default: the tiny checkpoint, converted)")
    parser.add_argument("--data", help="a dataset of conversations (default: three of them)")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--output", type=Path, default=Path("outputs/finetune"))
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = options.checkpoint
        if checkpoint is None:
            checkpoint = str(Path(scratch, "tiny"))
            convert_to_diffusers(TINY, checkpoint)
        dataset = conversations() if options.data is None else datasets.load_dataset(options.data, split="train")
        trainer = LLaDAUniSFTTrainer(
            model=checkpoint,
            args=LLaDAUniSFTConfig(
                str(options.output),
                max_steps=options.steps,
                per_device_train_batch_size=3,
                learning_rate=3e-3 if options.checkpoint is None else 1e-4,
                logging_steps=10,
                save_strategy="no",
                report_to="none",
            ),
            train_dataset=dataset,
            peft_config=lora_config(r=16),
        )
        trainer.train()
        merged = trainer.model.merge_and_unload().eval()
        merged.save_pretrained(options.output / "model")
        trainer.processing_class.save_pretrained(options.output / "processor")
        trainer.create_model_card(dataset_name=options.data)

        inputs = trainer.processing_class.apply_chat_template(
            [{"role": "user", "content": "Up or down?"}], add_generation_prompt=True, tokenize=True, return_dict=True
        )
        answer = merged.generate(**inputs.to(merged.device), max_new_tokens=32)[0, inputs["input_ids"].shape[1] :]
        print("Answer:", trainer.processing_class.decode(answer, skip_special_tokens=True))
    print(f"Model, processor and card are in {options.output}.")


if __name__ == "__main__":
    main()
