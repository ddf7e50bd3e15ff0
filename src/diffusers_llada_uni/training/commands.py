"""
What `llada-uni train <stage>` runs. Each stage is a pair: the dataclasses that its options come from, and a function
that takes their instances, trains, saves, and writes a model card.
"""

import functools
import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import trl.rewards
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMultimodalLM, AutoProcessor, AutoTokenizer
from transformers.distributed import DistributedConfig
from transformers.utils import cached_file
from trl import (
    DatasetMixtureConfig,
    ModelConfig,
    ScriptArguments,
    get_dataset,
    get_peft_config,
    get_quantization_config,
)
from trl.scripts.grpo import GRPOScriptArguments

from transformers_llada_uni import training


def load_data(script_args: ScriptArguments, dataset_args: DatasetMixtureConfig | None, wants_evaluation: bool):
    """
    The training split and, if wanted, the evaluation split: of a dataset of the Hub, of a folder or file that
    `datasets.load_dataset` reads, of a folder written by `save_to_disk`, or of a mixture (`datasets:`).
    """
    name = script_args.dataset_name
    if dataset_args is not None and dataset_args.datasets:
        if name is not None:
            raise ValueError("Give `dataset_name` or a mixture in `datasets`, not both.")
        data = get_dataset(dataset_args)
    elif name is None:
        raise ValueError("Give `dataset_name` (or a mixture in `datasets`): there is nothing to train on.")
    elif any(Path(name, marker).exists() for marker in ("dataset_dict.json", "dataset_info.json")):
        data = datasets.load_from_disk(name)
        data = {script_args.dataset_train_split: data} if isinstance(data, datasets.Dataset) else data
    else:
        data = datasets.load_dataset(name, name=script_args.dataset_config, streaming=script_args.dataset_streaming)
    splits = [script_args.dataset_train_split]
    splits += [script_args.dataset_test_split] if wants_evaluation else []
    for split in splits:
        if split not in data:
            raise ValueError(f"The data has no split {split!r}, only {sorted(data)}.")
    return data[splits[0]], data[splits[1]] if wants_evaluation else None


def load_language_model(model_args: ModelConfig, model_init_kwargs: dict[str, Any] | None):
    """
    The language model and its processor (text-only checkpoints: tokenizer), from a pipeline's folder or repository,
    from its `model/`, or from the released layout.
    """
    path = model_args.model_name_or_path
    if path is None:
        raise ValueError("Give `model_name_or_path`.")
    found = functools.partial(
        cached_file, path, revision=model_args.model_revision, _raise_exceptions_for_missing_entries=False
    )
    is_pipeline = found("model_index.json") is not None
    location = {"revision": model_args.model_revision, **({"subfolder": "model"} if is_pipeline else {})}
    config = AutoConfig.from_pretrained(path, **location)
    model_class = AutoModelForMultimodalLM if config.model_type == "llada_uni" else AutoModelForCausalLM
    settings = {"dtype": model_args.dtype, "attn_implementation": model_args.attn_implementation}
    settings |= model_init_kwargs or {}
    if isinstance(settings.get("distributed_config"), dict):
        settings["distributed_config"] = DistributedConfig(**settings["distributed_config"])
    quantization_config = get_quantization_config(model_args)
    if quantization_config is not None:
        settings["quantization_config"] = quantization_config
    model = model_class.from_pretrained(path, **location, **settings)

    location["subfolder"] = "processor" if is_pipeline else ""
    has_processor = is_pipeline or found("processor_config.json") is not None
    processor_class = AutoProcessor if has_processor else AutoTokenizer
    return model, processor_class.from_pretrained(path, **location)


def reward_functions(script_args: GRPOScriptArguments) -> list[Callable | str]:
    """trl's rewards by name, others by the path `module.function`, seen from the working directory."""
    rewards = [script_args.reward_model_name_or_path] if script_args.reward_model_name_or_path else []
    for name in script_args.reward_funcs or []:
        module_name, _, function = name.rpartition(".")
        if not module_name:
            if name not in trl.rewards.__all__:
                raise ValueError(f"`reward_funcs`: {name!r} is no reward of trl, and no path `module.function`.")
            rewards.append(getattr(trl.rewards, name))
            continue
        if os.getcwd() not in sys.path:
            sys.path.insert(0, os.getcwd())
        rewards.append(getattr(importlib.import_module(module_name), function))
    if not rewards:
        raise ValueError("Give `reward_funcs` or `reward_model_name_or_path`: there is nothing to reward.")
    return rewards


def finish(trainer, script_args: ScriptArguments) -> None:
    """Trains (or goes on), saves, writes the card, and pushes if that was asked for."""
    args = trainer.args
    resume = args.resume_from_checkpoint
    trainer.train(resume_from_checkpoint=True if str(resume).lower() == "true" else resume)
    trainer.save_model(args.output_dir)
    trainer.create_model_card(dataset_name=script_args.dataset_name)
    trainer.accelerator.print(f"Saved to {args.output_dir}.")
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)
    trainer.end()


def train_language_model(trainer_name: str, script_args, training_args, model_args, dataset_args) -> None:
    """Supervised fine-tuning, DPO and GRPO, which differ in the trainer and in GRPO's rewards."""
    further = {"reward_funcs": reward_functions(script_args)} if trainer_name == "LLaDAUniGRPOTrainer" else {}
    wants_evaluation = training_args.eval_strategy != "no"
    train_dataset, eval_dataset = load_data(script_args, dataset_args, wants_evaluation)
    model, processor = load_language_model(model_args, training_args.model_init_kwargs)
    training_args.model_init_kwargs = None  # used up
    trainer = getattr(training, trainer_name)(
        model=model,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=processor,
        peft_config=get_peft_config(model_args),
        **further,
    )
    finish(trainer, script_args)


def stages() -> dict[str, tuple[tuple[type, ...], Callable[..., None]]]:
    """Per stage the dataclasses of its options and what to do with them."""
    language_model = {}
    for stage, script_arguments in {
        "sft": ScriptArguments,
        "dpo": ScriptArguments,
        "grpo": GRPOScriptArguments,
    }.items():
        name = f"LLaDAUni{stage.upper()}"
        options = (script_arguments, getattr(training, f"{name}Config"), ModelConfig, DatasetMixtureConfig)
        language_model[stage] = (options, functools.partial(train_language_model, f"{name}Trainer"))
    return language_model
