"""
What each process of test_parallel.py does: a short training run whose losses and final weights are written down. With
`kill_at=N` the process dies by SIGKILL in step N.
"""

import json
import os
import signal
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from transformers.distributed import DistributedConfig

import transformers_llada_uni  # noqa: F401
from transformers_llada_uni.training import LLaDAUniSFTConfig, LLaDAUniSFTTrainer


class KillAt(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def train(checkpoint: str, output_dir: str, settings: tuple[str, ...]) -> None:
    sizes = {name: int(size) for name, size in (setting.split("=") for setting in settings)}
    kill_at, batch_size = sizes.pop("kill_at", None), sizes.pop("batch_size", 1)
    torch.manual_seed(0)
    distributed = {"distributed_config": DistributedConfig(**sizes)} if sizes else {}
    model = AutoModelForCausalLM.from_pretrained(checkpoint, **distributed)
    rows = torch.randint(0, 400, (16, 32), generator=torch.Generator().manual_seed(0))
    labels = rows.clone()
    for number, row in enumerate(labels):  # answers of three lengths
        row[: 8 * (1 + number % 3)] = -100
    trainer = LLaDAUniSFTTrainer(
        model=model,
        args=LLaDAUniSFTConfig(
            output_dir,
            max_steps=6,
            per_device_train_batch_size=batch_size,
            learning_rate=1e-3,
            lr_scheduler_type="constant",
            logging_steps=1,
            save_steps=2,
            block_length=8,
            weighting="none",
            complementary=True,
            editing_weight=1.0,
            draft_share=0.5,
            packing=False,
            bf16=False,
            gradient_checkpointing=False,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            seed=3,
        ),
        train_dataset=Dataset.from_dict({"input_ids": rows.tolist(), "labels": labels.tolist()}),
        processing_class=AutoTokenizer.from_pretrained(checkpoint),
        callbacks=[KillAt(kill_at)] if kill_at is not None else [],
    )
    trainer.train(resume_from_checkpoint=True)
    trainer.save_model(str(Path(output_dir) / "final"))
    if trainer.args.process_index == 0:
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        Path(output_dir, "losses.json").write_text(json.dumps(losses))
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
