"""
What `llada-uni train <stage>` runs. Each stage is a pair: the dataclasses that its options come from, and a function
that makes its trainer of their instances. [`finish`] trains, saves, and writes a model card.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from inspect import signature
from pathlib import Path
from typing import Any

import torch
import trl.rewards
from diffusers import AutoencoderKL, ZImageTransformer2DModel
from peft import PeftConfig
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, TrainingArguments
from transformers.utils import logging
from trl import (
    DatasetMixtureConfig,
    DPOConfig,
    GRPOConfig,
    ModelConfig,
    ScriptArguments,
    SFTConfig,
    get_dataset,
    get_peft_config,
    get_quantization_config,
)
from trl.data_utils import get_dataset_column_names
from trl.scripts.grpo import GRPOScriptArguments

from diffusers_llada_uni.embedded_checkpoints import embedded_checkpoint, names_of_embedded_checkpoints
from diffusers_llada_uni.semantic_embedder import LLaDAUniSemanticEmbedder
from diffusers_llada_uni.training.autoencoder_config import LLaDAUniAutoencoderConfig
from diffusers_llada_uni.training.autoencoder_trainer import LLaDAUniAutoencoderTrainer
from diffusers_llada_uni.training.decoder_config import LLaDAUniDecoderConfig
from diffusers_llada_uni.training.decoder_data import is_prepared, prepare_decoder_dataset
from diffusers_llada_uni.training.decoder_trainer import LLaDAUniDecoderTrainer
from diffusers_llada_uni.training.distillation_config import LLaDAUniDistillationConfig
from diffusers_llada_uni.training.distillation_trainer import LLaDAUniDistillationTrainer
from transformers_llada_uni import LLaDAUniForConditionalGeneration, training
from transformers_llada_uni.loading.model_loading import load_model, load_processor, quantization_of
from transformers_llada_uni.loading.quantization_groupwise import METHOD
from transformers_llada_uni.training.base_trainer import BaseTrainer
from transformers_llada_uni.training.checkpointing import last_complete_checkpoint
from transformers_llada_uni.training.data.dataset_loading import AnyDataset, load_training_dataset, split_of

from ..pipeline_loading import is_model
from ..trained_parts import is_adapter, parts_in
from .user_functions import user_function


logger = logging.get_logger(__name__)
Reward = Callable[..., Any] | str
Built = tuple[BaseTrainer, ScriptArguments]


@dataclass
class ImageTokenizerArguments:
    """
    Args:
        text_model_name_or_path (`str`, *optional*): The encoder of the captions; of a model of both, its text tower.
    """

    text_model_name_or_path: str | None = field(
        default=None, metadata={"help": "The encoder of the captions; of a model of both, its text tower."}
    )


@dataclass
class ModelArguments(ModelConfig):
    """trl's options of the model."""

    # peft cannot drop out what goes into routed experts, which adapters reach by default.
    lora_dropout: float = field(
        default=0.0, metadata={"help": "Dropout of what adapters see; 0 where they reach routed experts."}
    )


def check_run(script_args: ScriptArguments, *other_args: Any) -> None:
    """
    Args: what a stage's options have been parsed to.

    Raises:
        ValueError: for settings that would be told once all is loaded, or never.
    """
    args = next(args for args in other_args if isinstance(args, TrainingArguments))
    resume, output_dir = args.resume_from_checkpoint, args.output_dir
    if resume is not None and _resumed(resume) not in (True, None) and not Path(str(resume)).is_dir():
        raise ValueError(f"`resume_from_checkpoint` must be true, false or a checkpoint's folder, got {resume!r}.")
    data = script_args.dataset_name
    if data is not None and Path(data).is_dir() and Path(data).resolve() == Path(str(output_dir)).resolve():
        raise ValueError(f"`output_dir` is the folder of the data, {data!r}: what is trained must lie elsewhere.")


def check_trains_all_weights(model_args: ModelConfig) -> None:
    """
    Raises:
        ValueError: for options that only the stages of the language model have.
    """
    for name in ("use_peft", "load_in_4bit", "load_in_8bit"):
        if getattr(model_args, name):
            raise ValueError(f"`{name}` is for sft, dpo and grpo; this stage trains all weights.")


def load_data(
    trainer_class: type[BaseTrainer],
    script_args: ScriptArguments,
    training_args: TrainingArguments,
    dataset_args: DatasetMixtureConfig | None = None,
) -> tuple[AnyDataset, AnyDataset | None]:
    """
    The training split and, if wanted, the evaluation split, of [`load_training_dataset`] or a mixture, with the
    columns that the trainer needs: what is missing is told before a model is loaded.
    """
    name = script_args.dataset_name
    if dataset_args is not None and dataset_args.datasets:
        if name is not None:
            raise ValueError("Give `dataset_name` or a mixture in `datasets`, not both.")
        data = get_dataset(dataset_args)
    elif name is None:
        raise ValueError("Give `dataset_name` (or a mixture in `datasets`): there is nothing to train on.")
    else:
        data = load_training_dataset(name, script_args.dataset_config, script_args.dataset_streaming)
    train_dataset, eval_dataset = split_of(data, script_args.dataset_train_split, "dataset_train_split"), None
    if training_args.eval_strategy != "no":
        eval_dataset = split_of(data, script_args.dataset_test_split, "dataset_test_split")
    for dataset in (train_dataset, eval_dataset):
        if dataset is not None:
            trainer_class.check_columns("dataset_name" if name is not None else "datasets", dataset)
    return train_dataset, eval_dataset


def load_language_model(
    model_args: ModelConfig, training_args: TrainingArguments, model_init_kwargs: dict[str, Any] | None = None
) -> tuple[PreTrainedModel, Any]:
    """The language model of `model_name_or_path` and its processor, as the options say."""
    path, revision = _path(model_args), model_args.model_revision
    settings: dict[str, Any] = {"dtype": model_args.dtype, "attn_implementation": model_args.attn_implementation}
    if (model_args.load_in_4bit or model_args.load_in_8bit) and find_spec("bitsandbytes") is None:
        raise ModuleNotFoundError("`load_in_4bit` and `load_in_8bit` need bitsandbytes: pip install bitsandbytes")
    quantization_config = get_quantization_config(model_args)
    if quantization_config is not None:
        settings["quantization_config"] = quantization_config
    settings |= model_init_kwargs or {}
    if settings["attn_implementation"] == "flex_attention" and training_args.device.type == "cpu":
        settings["attn_implementation"] = "sdpa"
        logger.warning("`attn_implementation`: flex_attention does not train on a CPU; sdpa takes its place.")
    return load_model(path, revision, **settings), load_processor(path, revision)


def _is_in_few_bits(model_args: ModelConfig) -> bool:
    """Whether the weights are stored so that routed experts cannot be adapted."""
    try:
        return quantization_of(_path(model_args), model_args.model_revision) == METHOD
    except OSError:  # there is no such model, as loading it will say
        return False


def adapter_of(model_args: ModelConfig, experts: bool = True) -> PeftConfig | None:
    """
    With `use_peft`: what the options name, or without targets all layers, which peft's "all-linear" would miss; of
    routed experts only if they can be adapted.
    """
    if not model_args.use_peft:
        return None
    if model_args.lora_task_type != ModelConfig.lora_task_type:
        raise ValueError("`lora_task_type` cannot be chosen: adapters here are of no task of peft's.")
    if model_args.lora_target_modules or model_args.lora_target_parameters:
        config = get_peft_config(model_args)
        assert config is not None  # as `use_peft` says
        config.task_type = None  # of a causal language model, peft would look for one's way to generate
        return config
    return training.lora_config(
        experts=experts,
        r=model_args.lora_r,
        lora_alpha=model_args.lora_alpha,
        lora_dropout=model_args.lora_dropout,
        use_rslora=model_args.use_rslora,
        use_dora=model_args.use_dora,
        modules_to_save=model_args.lora_modules_to_save,
    )


def _path(model_args: ModelConfig) -> str:
    name = model_args.model_name_or_path
    if name is None:
        raise ValueError("Give `model_name_or_path`.")
    if is_adapter(Path(name).expanduser()):
        raise ValueError(
            f"`model_name_or_path` {name!r} is an adapter. To go on with its run: its options, with "
            "`--resume_from_checkpoint true`. To train upon it: `llada-uni assemble ADAPTER --output FOLDER` first."
        )
    if name in names_of_embedded_checkpoints() and not (is_model(Path(name), True) or parts_in(Path(name))):
        return str(embedded_checkpoint(name))
    return name


def reward_functions(script_args: GRPOScriptArguments) -> list[Reward]:
    """trl's rewards by name, others by the path `module.function`, seen from the working directory."""
    rewards: list[Reward] = []
    if script_args.reward_model_name_or_path:
        rewards.append(script_args.reward_model_name_or_path)
    for name in script_args.reward_funcs or []:
        if "." not in name:
            if not hasattr(trl.rewards, name):
                raise ValueError(f"`reward_funcs`: {name!r} is no reward of trl, and no path `module.function`.")
            rewards.append(getattr(trl.rewards, name))
            continue
        rewards.append(user_function(name, "reward_funcs"))
    if not rewards:
        raise ValueError("Give `reward_funcs` or `reward_model_name_or_path`: there is nothing to reward.")
    return rewards


def image_decoder(
    rewards: list[Reward], model_args: ModelConfig, device: torch.device
) -> Callable[[list[torch.Tensor]], list[Any]] | None:
    """Makes images of codes, with the decoder of the pipeline, if a reward has an argument `generated_images`."""
    if not any(callable(reward) and "generated_images" in signature(reward).parameters for reward in rewards):
        return None
    from diffusers_llada_uni import LLaDAUniPipeline

    # Codes are decoded without the language model, most of the weights, which the trainer holds.
    pipe = LLaDAUniPipeline.from_pretrained(_path(model_args), revision=model_args.model_revision, model=None)
    pipe.to(device)
    pipe.set_progress_bar_config(disable=True)
    return lambda grids: [pipe.decode_codes(codes[None].to(device))[0] for codes in grids]


def _resumed(value: bool | str | None) -> bool | str | None:
    """The option, which is a text, as transformers takes it."""
    return {"true": True, "false": None}.get(str(value).lower(), value)


def check_resumes(trainer: BaseTrainer) -> None:
    """
    Raises:
        ValueError: if the run shall go on from what it cannot go on from.
    """
    checkpoint = _resumed(trainer.args.resume_from_checkpoint)
    if checkpoint is True:
        checkpoint = last_complete_checkpoint(str(trainer.args.output_dir))
    if isinstance(checkpoint, str):
        trainer.check_checkpoint(checkpoint)


def finish(trainer: BaseTrainer, script_args: ScriptArguments) -> None:
    """Trains (or goes on), saves, writes the card, and pushes if that was asked for."""
    args = trainer.args
    trainer.train(resume_from_checkpoint=_resumed(args.resume_from_checkpoint))
    trainer.save_model(args.output_dir)
    trainer.create_model_card(dataset_name=script_args.dataset_name)
    trainer.accelerator.print(f"Saved to {args.output_dir}.")
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)
    trainer.end()


# The stages


def language_model_trainer(
    trainer_class: Any,
    script_args: ScriptArguments,
    training_args: SFTConfig | DPOConfig | GRPOConfig,
    model_args: ModelConfig,
    dataset_args: DatasetMixtureConfig,
) -> Built:
    """Supervised fine-tuning, DPO and GRPO, which differ in the trainer and in GRPO's rewards."""
    further: dict[str, Any] = {}
    if isinstance(script_args, GRPOScriptArguments):
        further["reward_funcs"] = reward_functions(script_args)
    train_dataset, eval_dataset = load_data(trainer_class, script_args, training_args, dataset_args)
    assert not isinstance(training_args.model_init_kwargs, str)  # parsed by the configuration
    adapter = None
    if model_args.use_peft:
        adapter = adapter_of(model_args, experts=not _is_in_few_bits(model_args))
    model, processor = load_language_model(model_args, training_args, training_args.model_init_kwargs)
    training_args.model_init_kwargs = None  # used up
    if "reward_funcs" in further and "grid" in get_dataset_column_names(train_dataset):
        further["decode_images"] = image_decoder(further["reward_funcs"], model_args, training_args.device)
    trainer = trainer_class(
        model=model,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=processor,
        peft_config=adapter,
        **further,
    )
    return trainer, script_args


def image_tokenizer_trainer(
    script_args: ScriptArguments,
    tokenizer_args: ImageTokenizerArguments,
    training_args: training.LLaDAUniImageTokenizerConfig,
    model_args: ModelConfig,
) -> Built:
    check_trains_all_weights(model_args)
    if tokenizer_args.text_model_name_or_path is None:
        raise ValueError("Give `text_model_name_or_path`, the encoder of the captions.")
    train_dataset, eval_dataset = load_data(training.LLaDAUniImageTokenizerTrainer, script_args, training_args)
    text_tokenizer = AutoTokenizer.from_pretrained(tokenizer_args.text_model_name_or_path)
    model, processor = load_language_model(model_args, training_args)
    # Of a model of both, such as SigLIP, the text tower alone
    text_model = AutoModel.from_pretrained(tokenizer_args.text_model_name_or_path)
    trainer = training.LLaDAUniImageTokenizerTrainer(
        model,
        getattr(text_model, "text_model", text_model),
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=processor,
        text_tokenizer=text_tokenizer,
    )
    return trainer, script_args


def image_tokenizer_alignment_trainer(
    script_args: ScriptArguments,
    training_args: training.LLaDAUniImageTokenizerAlignmentConfig,
    model_args: ModelConfig,
) -> Built:
    check_trains_all_weights(model_args)
    train_dataset, eval_dataset = load_data(
        training.LLaDAUniImageTokenizerAlignmentTrainer, script_args, training_args
    )
    model, processor = load_language_model(model_args, training_args)
    trainer = training.LLaDAUniImageTokenizerAlignmentTrainer(
        model, training_args, train_dataset=train_dataset, eval_dataset=eval_dataset, processing_class=processor
    )
    return trainer, script_args


def _component(component_class: Any, name: str, model_args: ModelConfig) -> Any:
    return component_class.from_pretrained(_path(model_args), subfolder=name, revision=model_args.model_revision)


def _decoder_data(
    script_args: ScriptArguments, training_args: TrainingArguments, model_args: ModelConfig
) -> dict[str, AnyDataset | None]:
    """Both datasets as codes and latents; images need the rest of the pipeline for that."""
    loaded = load_data(LLaDAUniDecoderTrainer, script_args, training_args)
    data = dict(zip(("train_dataset", "eval_dataset"), loaded, strict=True))
    images = {name: rows for name, rows in data.items() if rows is not None and not is_prepared("dataset_name", rows)}
    if images:
        model, processor = load_language_model(model_args, training_args)
        if not isinstance(model, LLaDAUniForConditionalGeneration):
            raise ValueError(f"`model_name_or_path` {_path(model_args)!r} has no image tokenizer.")
        rest = (model, processor.image_processor, _component(AutoencoderKL, "vae", model_args))
        data |= {name: prepare_decoder_dataset(rows, *rest) for name, rows in images.items()}
    return data


def autoencoder_trainer(
    script_args: ScriptArguments, training_args: LLaDAUniAutoencoderConfig, model_args: ModelConfig
) -> Built:
    check_trains_all_weights(model_args)
    train_dataset, eval_dataset = load_data(LLaDAUniAutoencoderTrainer, script_args, training_args)
    trainer = LLaDAUniAutoencoderTrainer(
        _component(AutoencoderKL, "vae", model_args),
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        image_processor=load_processor(_path(model_args), model_args.model_revision).image_processor,
    )
    return trainer, script_args


def decoder_trainer(
    script_args: ScriptArguments, training_args: LLaDAUniDecoderConfig, model_args: ModelConfig
) -> Built:
    check_trains_all_weights(model_args)
    data = _decoder_data(script_args, training_args, model_args)
    transformer = _component(ZImageTransformer2DModel, "transformer", model_args)
    semantic_embedder = _component(LLaDAUniSemanticEmbedder, "semantic_embedder", model_args)
    return LLaDAUniDecoderTrainer(transformer, semantic_embedder, args=training_args, **data), script_args


def distillation_trainer(
    script_args: ScriptArguments, training_args: LLaDAUniDistillationConfig, model_args: ModelConfig
) -> Built:
    check_trains_all_weights(model_args)
    data = _decoder_data(script_args, training_args, model_args)
    transformer = _component(ZImageTransformer2DModel, "transformer", model_args)
    semantic_embedder = _component(LLaDAUniSemanticEmbedder, "semantic_embedder", model_args)
    return LLaDAUniDistillationTrainer(transformer, semantic_embedder, args=training_args, **data), script_args


def stages() -> dict[str, tuple[tuple[type, ...], Callable[..., Built]]]:
    """Per stage the dataclasses of its options and what makes its trainer of them."""
    sft, dpo, grpo = (
        functools.partial(language_model_trainer, trainer)
        for trainer in (training.LLaDAUniSFTTrainer, training.LLaDAUniDPOTrainer, training.LLaDAUniGRPOTrainer)
    )
    image_tokenizer = (ImageTokenizerArguments, training.LLaDAUniImageTokenizerConfig)
    return {
        "sft": ((ScriptArguments, training.LLaDAUniSFTConfig, ModelArguments, DatasetMixtureConfig), sft),
        "dpo": ((ScriptArguments, training.LLaDAUniDPOConfig, ModelArguments, DatasetMixtureConfig), dpo),
        "grpo": ((GRPOScriptArguments, training.LLaDAUniGRPOConfig, ModelArguments, DatasetMixtureConfig), grpo),
        "image_tokenizer": ((ScriptArguments, *image_tokenizer, ModelArguments), image_tokenizer_trainer),
        "image_tokenizer_alignment": (
            (ScriptArguments, training.LLaDAUniImageTokenizerAlignmentConfig, ModelArguments),
            image_tokenizer_alignment_trainer,
        ),
        "autoencoder": ((ScriptArguments, LLaDAUniAutoencoderConfig, ModelArguments), autoencoder_trainer),
        "decoder": ((ScriptArguments, LLaDAUniDecoderConfig, ModelArguments), decoder_trainer),
        "distill": ((ScriptArguments, LLaDAUniDistillationConfig, ModelArguments), distillation_trainer),
    }
