"""
What `llada-uni train <stage>` runs. Each stage is a pair: the dataclasses that its options come from, and a function
that takes their instances, trains, saves, and writes a model card.
"""

import functools
import importlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import trl.rewards
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImageTransformer2DModel
from transformers import AutoModel, AutoTokenizer
from trl import (
    DatasetMixtureConfig,
    ModelConfig,
    ScriptArguments,
    get_dataset,
    get_peft_config,
    get_quantization_config,
)
from trl.scripts.grpo import GRPOScriptArguments

from diffusers_llada_uni.semantic_embedder import LLaDAUniSemanticEmbedder
from diffusers_llada_uni.training.autoencoder_config import LLaDAUniAutoencoderConfig
from diffusers_llada_uni.training.autoencoder_trainer import LLaDAUniAutoencoderTrainer
from diffusers_llada_uni.training.decoder_config import LLaDAUniDecoderConfig
from diffusers_llada_uni.training.decoder_data import prepare_decoder_dataset
from diffusers_llada_uni.training.decoder_trainer import LLaDAUniDecoderTrainer
from diffusers_llada_uni.training.distillation_config import LLaDAUniDistillationConfig
from diffusers_llada_uni.training.distillation_trainer import LLaDAUniDistillationTrainer
from transformers_llada_uni import training
from transformers_llada_uni.loading.model_loading import load_model, load_processor


@dataclass
class ImageTokenizerArguments:
    """
    Args:
        text_model_name_or_path (`str`, *optional*): The encoder of the captions; of a model of both, its text tower.
    """

    text_model_name_or_path: str | None = field(
        default=None, metadata={"help": "The encoder of the captions; of a model of both, its text tower."}
    )


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
    """The language model of `model_name_or_path` and its processor, as the options say."""
    path, revision = _path(model_args), model_args.model_revision
    settings = {"dtype": model_args.dtype, "attn_implementation": model_args.attn_implementation}
    quantization_config = get_quantization_config(model_args)
    if quantization_config is not None:
        settings["quantization_config"] = quantization_config
    model = load_model(path, revision, **{**settings, **(model_init_kwargs or {})})
    return model, load_processor(path, revision)


def adapter_of(model_args: ModelConfig):
    """With `use_peft`: what the options name, or without targets all layers, which peft's "all-linear" would miss."""
    if not model_args.use_peft:
        return None
    if model_args.lora_target_modules or model_args.lora_target_parameters:
        return get_peft_config(model_args)
    return training.lora_config(r=model_args.lora_r, lora_alpha=model_args.lora_alpha)


def _path(model_args: ModelConfig) -> str:
    if model_args.model_name_or_path is None:
        raise ValueError("Give `model_name_or_path`.")
    return model_args.model_name_or_path


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
        peft_config=adapter_of(model_args),
        **further,
    )
    finish(trainer, script_args)


def train_image_tokenizer(script_args, tokenizer_args, training_args, model_args) -> None:
    if tokenizer_args.text_model_name_or_path is None:
        raise ValueError("Give `text_model_name_or_path`, the encoder of the captions.")
    parts = load_data(script_args, None, training_args.eval_strategy != "no")
    model, processor = load_language_model(model_args, None)
    # Of a model of both, such as SigLIP, the text tower alone
    text_model = AutoModel.from_pretrained(tokenizer_args.text_model_name_or_path)
    trainer = training.LLaDAUniImageTokenizerTrainer(
        model,
        getattr(text_model, "text_model", text_model),
        training_args,
        *parts,
        processing_class=processor,
        text_tokenizer=AutoTokenizer.from_pretrained(tokenizer_args.text_model_name_or_path),
    )
    finish(trainer, script_args)


def _decoder_components(model_args: ModelConfig, classes: dict[str, type]) -> dict[str, Any]:
    path, revision = _path(model_args), model_args.model_revision
    return {
        name: component.from_pretrained(path, subfolder=name, revision=revision) for name, component in classes.items()
    }


def _decoder_data(script_args, training_args, model_args) -> list[Any]:
    """Both datasets as codes and latents; pictures need the rest of the pipeline for that."""
    parts = list(load_data(script_args, None, training_args.eval_strategy != "no"))
    if "codes" in (parts[0].column_names or []):
        return parts
    model, processor = load_language_model(model_args, None)
    vae = _decoder_components(model_args, {"vae": AutoencoderKL})["vae"]
    return [
        None if part is None else prepare_decoder_dataset(part, model, processor.image_processor, vae)
        for part in parts
    ]


def train_autoencoder(script_args, training_args, model_args) -> None:
    parts = load_data(script_args, None, training_args.eval_strategy != "no")
    vae = _decoder_components(model_args, {"vae": AutoencoderKL})["vae"]
    image_processor = load_processor(_path(model_args), model_args.model_revision).image_processor
    finish(LLaDAUniAutoencoderTrainer(vae, training_args, *parts, image_processor=image_processor), script_args)


def train_decoder(script_args, training_args, model_args) -> None:
    parts = _decoder_data(script_args, training_args, model_args)
    classes = {"transformer": ZImageTransformer2DModel, "semantic_embedder": LLaDAUniSemanticEmbedder}
    components = _decoder_components(model_args, classes)
    finish(LLaDAUniDecoderTrainer(*components.values(), training_args, *parts), script_args)


def distill_decoder(script_args, training_args, model_args) -> None:
    train_dataset, eval_dataset = _decoder_data(script_args, training_args, model_args)
    classes = {
        "transformer": ZImageTransformer2DModel,
        "semantic_embedder": LLaDAUniSemanticEmbedder,
        "scheduler": FlowMatchEulerDiscreteScheduler,
    }
    trainer = LLaDAUniDistillationTrainer(
        *_decoder_components(model_args, classes).values(),
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
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
    tokenizer_options = (
        ScriptArguments,
        ImageTokenizerArguments,
        training.LLaDAUniImageTokenizerConfig,
        ModelConfig,
    )
    return {
        **language_model,
        "tokenizer": (tokenizer_options, train_image_tokenizer),
        "autoencoder": ((ScriptArguments, LLaDAUniAutoencoderConfig, ModelConfig), train_autoencoder),
        "decoder": ((ScriptArguments, LLaDAUniDecoderConfig, ModelConfig), train_decoder),
        "distill": ((ScriptArguments, LLaDAUniDistillationConfig, ModelConfig), distill_decoder),
    }
