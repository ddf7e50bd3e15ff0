"""
A few-step decoder: the shipped emoji model's many-step decoder teaches, the student starts from it.

    python benchmarks/distillation.py packages                   # examples/emoji/packages.py says what it holds
    python benchmarks/distillation.py packages --max-steps 0     # the shipped student alone

Shares of right drawings (of all emoji, the asked one is the nearest to the drawn one) and errors (root of the mean
square, in 32 x 32 RGB of 0..1) at 1, 2, 4 and 8 steps, from the codes of the emoji themselves, so that no error is
the language model's. A pass is one image of one forward, the teacher's and the student's, with a gradient or without.
"""

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, Features, Image
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, ZImageTransformer2DModel
from transformers import PrinterCallback

from diffusers_llada_uni import embedded_checkpoint
from diffusers_llada_uni.decoders import SCHEDULER_SETTINGS
from diffusers_llada_uni.training import (
    LLaDAUniDistillationConfig,
    LLaDAUniDistillationTrainer,
    prepare_decoder_dataset,
)


sys.path.insert(0, str(Path(__file__).parent.parent / "examples" / "emoji"))
from emoji_table import Emoji, load_emoji
from nearest_emoji import NearestEmoji


STEPS = (1, 2, 4, 8)
BATCH = 64


SETTINGS = {
    "per_device_train_batch_size": 15,
    "ema_decay": 0.99,
    "learning_rate": 3e-4,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 10,
    "adam_beta2": 0.98,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "logging_steps": 20,
    "use_cpu": True,
    "bf16": True,
}


class PassCounter:
    """Images that have gone through any of some transformers."""

    def __init__(self, *transformers: ZImageTransformer2DModel):
        self.count = 0
        for transformer in transformers:
            transformer.register_forward_pre_hook(self._add)

    def _add(self, module: torch.nn.Module, arguments: tuple[Any, ...]) -> None:
        self.count += len(arguments[0])


class Drawings:
    """Draws some emoji from their codes, and compares."""

    def __init__(self, pipe: DiffusionPipeline, table: list[Emoji], subjects: list[tuple[Emoji, dict[str, Any]]]):
        self.pipe, self.nearest, self.subjects = pipe, NearestEmoji(table), subjects

    def __call__(self, decoder: str, num_inference_steps: int) -> str:
        """Share and error of drawings."""
        right, error = 0, 0.0
        for start in range(0, len(self.subjects), BATCH):
            emoji, rows = zip(*self.subjects[start : start + BATCH], strict=True)
            codes = torch.tensor([row["codes"] for row in rows]).unflatten(1, rows[0]["grid"])
            generator = torch.Generator().manual_seed(start)
            with torch.autocast("cpu", torch.bfloat16):
                images = self.pipe.decode_codes(codes, decoder, num_inference_steps, generator=generator)
            right += sum(one.key in found for one, found in zip(emoji, self.nearest(images), strict=True))
            drawn = torch.stack([self.nearest._small(image) for image in images])
            wanted = torch.stack([self.nearest._small(one.picture) for one in emoji])
            error += (drawn - wanted).square().mean(dim=1).sum().item()
        return f"{100 * right / len(self.subjects):.1f}% / {(error / len(self.subjects)) ** 0.5:.4f}"


def distil(max_steps: int, dataset: Dataset, seed: int) -> tuple[ZImageTransformer2DModel, int, float]:
    """The student, the passes it took, and the seconds."""
    pipe = load_pipeline(model=None, processor=None)
    with tempfile.TemporaryDirectory() as folder:
        trainer = LLaDAUniDistillationTrainer(
            pipe.transformer,
            pipe.semantic_embedder,
            args=LLaDAUniDistillationConfig(folder, max_steps=max_steps, seed=seed, **SETTINGS),
            train_dataset=dataset,
        )
        trainer.remove_callback(PrinterCallback)  # its lines would stand in the table
        counter = PassCounter(pipe.transformer, trainer.model.transformer)
        start = time.perf_counter()
        trainer.train()
        return trainer.trained_model().transformer.eval(), counter.count, time.perf_counter() - start


def load_pipeline(**components: Any) -> DiffusionPipeline:
    pipe = DiffusionPipeline.from_pretrained(embedded_checkpoint(), dtype=torch.float32, **components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", type=Path, help="The folder of the npm packages, see examples/emoji/packages.py.")
    parser.add_argument("--max-steps", type=int, default=84, help="of the training")
    parser.add_argument("--subjects", type=int, default=256, help="emoji to draw")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    table = load_emoji(arguments.packages)
    trained = [emoji for emoji in table if not emoji.is_held_out]
    pipe = load_pipeline()
    encoders = (pipe.model, pipe.processor.image_processor, pipe.vae)
    images = Dataset.from_dict({"image": [emoji.picture for emoji in trained]}, features=Features(image=Image()))
    dataset = prepare_decoder_dataset(images, *encoders, batch_size=BATCH)
    chosen = random.Random(arguments.seed).sample(range(len(trained)), arguments.subjects)
    drawings = Drawings(pipe, table, [(trained[number], dataset[number]) for number in chosen])

    print(f"{arguments.subjects} emoji, {torch.get_num_threads()} threads\n")
    print(f"| student | passes | seconds | {' | '.join(f'steps: {steps}' for steps in STEPS)} |")
    print("|---" * (3 + len(STEPS)) + "|")

    jumping = FlowMatchEulerDiscreteScheduler(**SCHEDULER_SETTINGS["turbo"])

    def add(name: str, passes: str, seconds: str, student: ZImageTransformer2DModel, scheduler: Any = jumping) -> None:
        pipe.register_modules(transformer_turbo=student, scheduler_turbo=scheduler)
        cells = [name, passes, seconds, *(drawings("turbo", steps) for steps in STEPS)]
        print(f"| {' | '.join(cells)} |", flush=True)

    add("none: the teacher, sampled so", "", "", pipe.transformer)
    shipped = load_pipeline(model=None, processor=None)
    add("the shipped one", "", "", shipped.transformer_turbo, shipped.scheduler_turbo)
    if arguments.max_steps:
        student, passes, seconds = distil(arguments.max_steps, dataset, arguments.seed)
        add("a new one", f"{passes:,}", f"{seconds:.0f}", student)


if __name__ == "__main__":
    main()
