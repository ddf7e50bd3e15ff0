"""The section that trains LoRA on the released shape, alone on the card."""

import gc
import statistics
import tempfile
import time
from typing import Any

import torch
from datasets import Dataset
from gpu_machine import Machine
from gpu_model import RELEASED, TINY, make_model
from gpu_report import Section, free_memory, synchronize
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast, PrinterCallback, TrainerCallback

from transformers_llada_uni import LLaDA2MoeForBlockDiffusion
from transformers_llada_uni.training import LLaDAUniSFTConfig, LLaDAUniSFTTrainer, lora_config


NUM_STEPS = 4


class StepClock(TrainerCallback):
    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        synchronize()
        self.start = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        synchronize()
        self.seconds.append(time.perf_counter() - self.start)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """The trainer wants one; rows come as ids."""
    words = {"<end>": 0, "<mask>": 1, "<unknown>": 2}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="<unknown>")),
        eos_token="<end>",
        pad_token="<end>",
        mask_token="<mask>",
        unk_token="<unknown>",
    )


def report_training(section: Section, machine: Machine) -> None:
    cases = {
        "lora_config(r=16, mlps=False, experts=False)": {"r": 16, "mlps": False, "experts": False},
        "lora_config(r=8)": {"r": 8},
    }
    length = 128 if machine.is_tiny else 2048
    for what, settings in cases.items():
        if not section.has_time(20):
            section.add(what, failed="no time left")
            continue
        with section.guarded(what):
            report_lora(section, machine, what, settings, length)
        free_memory()
    section.note(f"One row of {length} tokens a step, gradient checkpointing, no other model on the card.")


def report_lora(section: Section, machine: Machine, what: str, settings: dict[str, Any], length: int) -> None:
    free_memory()
    held = torch.cuda.memory_allocated() / 1e9 if machine.device == "cuda" else None
    shape, dtype = (TINY, torch.float32) if machine.is_tiny else (RELEASED, torch.bfloat16)
    values = train_lora(make_model(shape, machine.device, dtype), machine, settings, length)
    section.add(what, **{"held before, GB": held, **values})
    gc.collect()


def train_lora(
    model: LLaDA2MoeForBlockDiffusion, machine: Machine, settings: dict[str, Any], length: int
) -> dict[str, Any]:
    """Columns of a table: four steps with an adapter of `lora_config(**settings)`, of one random row each."""
    is_cuda = machine.device == "cuda"
    weights = torch.cuda.memory_allocated() / 1e9 if is_cuda else None
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 700 if machine.is_tiny else 6000, (NUM_STEPS, length), generator=generator).tolist()
    prompt = length // 4  # carries no loss
    rows = Dataset.from_dict({"input_ids": ids, "labels": [[-100] * prompt + row[prompt:] for row in ids]})
    with tempfile.TemporaryDirectory() as folder:
        arguments = LLaDAUniSFTConfig(
            folder,
            max_steps=NUM_STEPS,
            per_device_train_batch_size=1,
            bf16=is_cuda,
            use_cpu=not is_cuda,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            max_length=length,
            disable_tqdm=True,
            gradient_checkpointing=True,
        )
        clock = StepClock()
        trainer = LLaDAUniSFTTrainer(
            model=model,
            args=arguments,
            train_dataset=rows,
            processing_class=make_tokenizer(),
            peft_config=lora_config(**settings),
            callbacks=[clock],
        )
        trainer.remove_callback(PrinterCallback)  # its lines would stand in the table
        trained = sum(parameter.numel() for parameter in trainer.model.parameters() if parameter.requires_grad)
        if is_cuda:
            torch.cuda.reset_peak_memory_stats()
        loss = trainer.train().training_loss
        peak = torch.cuda.max_memory_allocated() / 1e9 if is_cuda else None
    return {
        "trained, million": trained / 1e6,
        "first step, s": clock.seconds[0],
        "a step, s": statistics.median(clock.seconds[1:]),
        "with the weights, GB": weights,
        "peak, GB": peak,
        "loss": loss,
    }
