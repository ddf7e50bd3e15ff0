"""
Converts a LLaDA2.0-Uni checkpoint from the released layout to a diffusers pipeline folder, and back.

    python conversion/convert_llada_uni_checkpoint.py SRC DST [--decoder turbo|normal|both] [--dtype bfloat16]
    python conversion/convert_llada_uni_checkpoint.py SRC DST --to-released

All files are checked before anything is written, the data is copied one tensor at a time, compared with its source
afterwards, and DST appears only when all of it is right.
"""

import argparse
import os
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImageTransformer2DModel
from diffusers import __version__ as diffusers_version
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase


if not __package__:  # run as a script: the repository is not on the path, but this folder is
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from llada_uni.conversion import block_fp8
from llada_uni.conversion import llada_uni_layout as layout
from llada_uni.conversion import tensor_files as files
from llada_uni.conversion.output_plan import Plan, by_source_file, carry_out, main_dtype, plan_outputs
from transformers_llada_uni import (
    BlockDiffusionGenerationConfig,
    LLaDA2MoeConfig,
    LLaDAUniConfig,
    LLaDAUniForConditionalGeneration,
    LLaDAUniImageProcessor,
    LLaDAUniProcessor,
)


MODEL_CARD_TEMPLATE = Path(__file__).resolve().parents[1] / "model_cards" / "llada_uni.md"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DECODER_CHOICES = ("turbo", "normal", "both")


def _choose_decoders(choice: str | None, available: list[str], source: Path) -> list[str]:
    wanted = list(layout.DECODERS) if choice == "both" else [choice] if choice else available
    missing = [kind for kind in wanted if kind not in available]
    if missing or not wanted:
        raise FileNotFoundError(
            f"{source} has no {' and no '.join(missing or layout.DECODERS)} decoder"
            + (f", only the {available[0]} one; give `decoder={available[0]!r}`." if available else ".")
        )
    return wanted


@contextmanager
def _naming(*config_files: Path) -> Iterator[None]:
    """Config classes raise errors of many kinds; here they become a ValueError that names the files."""
    try:
        yield
    except (StrictDataclassError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{' or '.join(map(str, config_files))} is not a valid config: {error}") from error


def _load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    if not (folder / "tokenizer.json").is_file():
        raise FileNotFoundError(f"{folder / 'tokenizer.json'} is missing.")
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the tokenizers library raises bare Exceptions
        raise ValueError(f"The tokenizer in {folder} cannot be read: {error}") from error


# Released layout -> ours


def _text_config(raw: Mapping[str, Any]) -> dict[str, Any]:
    dropped = ("auto_map", "architectures", "torch_dtype", "dtype", "transformers_version", "quantization_config")
    return {name: value for name, value in raw.items() if name not in dropped}


def _read_released_config(source: Path, tokens: Mapping[str, Any], raw: Mapping[str, Any]) -> LLaDAUniConfig:
    tokenizer_config = files.read_json(source / "image_tokenizer" / "config.json")
    for name in ("vision_config", "vq_config"):
        if not isinstance(tokenizer_config.get(name), dict):
            raise ValueError(f"{source / 'image_tokenizer' / 'config.json'} has no `{name}`.")
    text_config = _text_config(raw)
    text_config |= {name: tokens[name] for name in ("mask_token_id", "eos_token_id", "pad_token_id")}
    names = ("image_token_id", "image_start_token_id", "image_end_token_id", "begin_of_image_token_id")
    with _naming(source / "config.json", source / "image_tokenizer" / "config.json"):
        return LLaDAUniConfig(
            text_config=text_config,
            vision_config=tokenizer_config["vision_config"],
            vq_config=tokenizer_config["vq_config"],
            grid_token_ids=tokens["grid_token_ids"],
            architectures=[LLaDAUniForConditionalGeneration.__name__],
            **{name: tokens[name] for name in names},
        )


def _plan_model(plan: Plan, source: Path, dtype: torch.dtype | None) -> tuple[LLaDAUniConfig, PreTrainedTokenizerBase]:
    raw = files.read_json(source / "config.json")
    if raw.get("model_type") != "llada2_moe":
        raise ValueError(
            f"{source / 'config.json'} has `model_type` {raw.get('model_type')!r}, a released checkpoint 'llada2_moe'."
        )
    if raw.get("image_token_offset") is None:
        raise ValueError(
            f"{source} is a text-only checkpoint (no `image_token_offset`): nothing to convert, "
            "AutoModelForCausalLM.from_pretrained loads it as it is."
        )
    with _naming(source / "config.json"):
        LLaDA2MoeConfig(**_text_config(raw))
    tokenizer = _load_tokenizer(source)
    tokens = layout.look_up_tokens(tokenizer, raw["image_token_offset"])
    config = _read_released_config(source, tokens, raw)

    backbone = files.list_checkpoint(source, "model")
    block_fp8.check_quantization_config(raw, backbone, source / "config.json")
    files.check_tensors(
        "the backbone", backbone, layout.backbone_shapes(config) | block_fp8.scale_shapes(backbone, raw)
    )
    if raw.get("quantization_config") is not None:
        config.quantization_config = block_fp8.quantization_config_to_ours(raw["quantization_config"], backbone)
    image_tokenizer = files.list_tensors(source / "image_tokenizer" / "image_tokenizer.safetensors")
    files.check_tensors("the image tokenizer", image_tokenizer, layout.image_tokenizer_shapes(config))

    outputs = plan_outputs(backbone, dtype, layout.backbone_name_to_ours)
    config.dtype = main_dtype(outputs)
    plan.add_checkpoint(
        "model", "model", by_source_file(outputs) + files.split_by_size(plan_outputs(image_tokenizer, dtype))
    )
    generation_config = BlockDiffusionGenerationConfig(
        eos_token_id=[tokens["eos_token_id"], tokens["role_end_token_id"]],
        pad_token_id=tokens["pad_token_id"],
        mask_token_id=tokens["mask_token_id"],
        block_length=config.text_config.block_length,
    )
    # The folder as a whole is a transformers checkpoint too: its index points into model/.
    index = files.index_of(plan.tensors)
    plan.add_json("model.safetensors.index.json", index)
    for folder_name in ("", "model"):
        plan.small_files.append(lambda folder, name=folder_name: config.save_pretrained(folder / name))
        plan.small_files.append(lambda folder, name=folder_name: generation_config.save_pretrained(folder / name))
    return config, tokenizer


def _plan_processor(plan: Plan, source: Path, config: LLaDAUniConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    path = source / "image_tokenizer" / "preprocessor_config.json"
    raw = files.read_json(path)
    fields = {name: raw[name] for name in layout.IMAGE_PROCESSOR_FIELDS if name in raw}
    if fields.get("patch_size", config.vision_config.patch_size) != config.vision_config.patch_size:
        raise ValueError(
            f"{path} has `patch_size` {fields['patch_size']}, the vision tower {config.vision_config.patch_size}."
        )
    processor = LLaDAUniProcessor(
        image_processor=LLaDAUniImageProcessor(**fields),
        tokenizer=tokenizer,
        image_token_offset=config.text_config.image_token_offset,
        codebook_size=config.vq_config.num_embeddings,
        max_position_embeddings=config.text_config.max_position_embeddings,
    )
    for folder_name in ("", "processor"):
        plan.small_files.append(lambda folder, name=folder_name: processor.save_pretrained(folder / name))


def _plan_decoders(
    plan: Plan, source: Path, kinds: list[str], config: LLaDAUniConfig, dtype: torch.dtype | None
) -> dict[str, list[str | None]]:
    """Semantic embedder, decoders, their schedulers and the VAE; returns their entries in model_index.json."""
    stem = "diffusion_pytorch_model"

    embedding = files.list_tensors(source / "image_tokenizer" / "sigvq_embedding.pt")
    embedder = layout.semantic_embedder_model({name: ref.shape for name, ref in embedding.items()})
    files.check_tensors("the semantic embedder", embedding, layout.module_shapes(embedder))
    if embedder.config.codebook_size != config.vq_config.num_embeddings:
        raise ValueError(
            f"{source / 'image_tokenizer' / 'sigvq_embedding.pt'} embeds {embedder.config.codebook_size} codes, but "
            f"the codebook (`vq_config.num_embeddings`) has {config.vq_config.num_embeddings}."
        )
    plan.add_checkpoint("semantic_embedder", stem, files.split_by_size(plan_outputs(embedding, dtype)))
    plan.small_files.append(lambda folder: embedder.save_config(folder / "semantic_embedder"))
    index: dict[str, list[str | None]] = {
        "semantic_embedder": [type(embedder).__module__, type(embedder).__name__],
        **{name: [None, None] for _, *names, _ in layout.DECODERS.values() for name in names},
        "vae": ["diffusers", AutoencoderKL.__name__],
    }

    for kind in kinds:
        folder_name, component, scheduler_component, scheduler_arguments = layout.DECODERS[kind]
        refs = files.list_checkpoint(source / folder_name, "model")
        transformer = layout.decoder_model(
            files.read_json(source / folder_name / "config.json"), feature_dim=embedder.config.out_dim
        )
        named = {layout.decoder_name_to_ours(name): ref for name, ref in refs.items()}
        files.check_tensors(f"{source / folder_name}", named, layout.module_shapes(transformer))
        plan.add_checkpoint(component, stem, files.split_by_size(plan_outputs(named, dtype)))
        scheduler = FlowMatchEulerDiscreteScheduler(**scheduler_arguments)
        plan.small_files.append(lambda folder, model=transformer, name=component: model.save_config(folder / name))
        plan.small_files.append(
            lambda folder, scheduler=scheduler, name=scheduler_component: scheduler.save_pretrained(folder / name)
        )
        index[component] = ["diffusers", ZImageTransformer2DModel.__name__]
        index[scheduler_component] = ["diffusers", FlowMatchEulerDiscreteScheduler.__name__]

    vae = layout.vae_model(files.read_json(source / "vae" / "config.json"))
    refs = files.list_checkpoint(source / "vae", stem)
    files.check_tensors("the VAE", refs, layout.module_shapes(vae))
    plan.add_checkpoint("vae", stem, files.split_by_size(plan_outputs(refs, dtype)))
    plan.small_files.append(lambda folder: vae.save_config(folder / "vae"))
    return index


def make_model_card(model_name: str, decoders: list[str], dtype: str, **details: Any) -> ModelCard:
    """
    A model card from `model_cards/llada_uni.md`.

    Args:
        model_name: Title of the card, and what the examples load.
        decoders: `"turbo"`, `"normal"` or both.
        dtype: The dtype of the weights.
        details: Other placeholders of the template: `base_model`, `summary`, `training`, `evaluation` (Markdown).
    """
    card_data = ModelCardData(
        license="apache-2.0",
        library_name="diffusers",
        pipeline_tag="any-to-any",
        base_model=details.pop("base_model", None),
        tags=["llada-uni", "masked-diffusion", "text-to-image", "image-text-to-text", "image-to-image"],
    )
    values = {"summary": None, "training": None, "evaluation": None, **details}
    return ModelCard.from_template(
        card_data,
        template_path=str(MODEL_CARD_TEMPLATE),
        model_name=model_name,
        decoders=decoders,
        dtype=dtype,
        **values,
    )


def convert_to_diffusers(
    source: str | os.PathLike,
    destination: str | os.PathLike,
    decoder: str | None = None,
    dtype: torch.dtype | None = None,
    progress: bool = True,
) -> Path:
    """
    Converts a checkpoint in the released layout to a folder that `DiffusionPipeline.from_pretrained` loads.

    Args:
        source: Folder in the released layout.
        destination: Folder to create; must not exist.
        decoder: `"turbo"`, `"normal"`, or `"both"`. Default: those that are there.
        dtype: Cast the weights to this dtype (the router's `expert_bias` to float32). Default: keep them as they are.
        progress: Show a progress bar (on a terminal).

    Returns:
        `destination`.

    Raises:
        FileExistsError: if `destination` exists.
        FileNotFoundError: if a file or shard of `source` is missing.
        ValueError: if a file is truncated, tensors are missing, extra or misshapen, codebooks differ, the tokenizer
            lacks a token, or a value does not fit into `dtype`. In all cases nothing is left behind.
    """
    source, destination = _check_folders(source, destination)
    _check_decoder(decoder)
    _check_dtype(dtype)
    plan = Plan()
    config, tokenizer = _plan_model(plan, source, dtype)
    available = [kind for kind, (folder, *_) in layout.DECODERS.items() if (source / folder).is_dir()]
    kinds = _choose_decoders(decoder, available, source)
    _plan_processor(plan, source, config, tokenizer)
    index = _plan_decoders(plan, source, kinds, config, dtype)
    model_class, processor_class = LLaDAUniForConditionalGeneration, LLaDAUniProcessor
    plan.add_json(
        "model_index.json",
        {
            "_class_name": "LLaDAUniPipeline",
            "_diffusers_version": diffusers_version,
            "model": [model_class.__module__, model_class.__name__],
            "processor": [processor_class.__module__, processor_class.__name__],
            **index,
        },
    )
    card = make_model_card(destination.name, kinds, str(config.dtype).removeprefix("torch."))
    plan.small_files.append(lambda folder: card.save(folder / "README.md"))
    return carry_out(plan, destination, progress)


# Our layout -> released


def _without_generic(config: PreTrainedConfig) -> dict[str, Any]:
    """Every setting of the model, default or not (the released code has its own defaults), but not transformers'."""
    generic = PreTrainedConfig().to_dict()
    dropped = ("_name_or_path", "dtype", "transformers_version")
    return {
        name: value
        for name, value in config.to_dict().items()
        if name not in dropped and (name not in generic or value != generic[name])
    }


def _released_config(config: PreTrainedConfig, dtype: str) -> dict[str, Any]:
    """The released `config.json`: the text config, with what the released code reads at top level."""
    released = _without_generic(config)
    rope = released.get("rope_parameters") or {}
    released |= {name: rope[name] for name in ("rope_theta", "partial_rotary_factor") if name in rope}
    # `auto_map` stays out: the modules it would name are not in the folder.
    return {**released, "architectures": ["LLaDA2MoeModelLM"], "model_type": "llada2_moe", "torch_dtype": dtype}


def _plan_released_model(plan: Plan, folder: Path, dtype: torch.dtype | None) -> LLaDAUniConfig:
    raw = files.read_json(folder / "config.json")
    if raw.get("model_type") != "llada_uni":
        raise ValueError(
            f"{folder / 'config.json'} has `model_type` {raw.get('model_type')!r}; converting to the released layout "
            "takes a pipeline folder or a saved LLaDAUniForConditionalGeneration ('llada_uni')."
        )
    with _naming(folder / "config.json"):
        config = LLaDAUniConfig.from_pretrained(folder, local_files_only=True)
    refs = files.list_checkpoint(folder, "model")
    of_tokenizer = {name: ref for name, ref in refs.items() if name.startswith(layout.IMAGE_TOKENIZER_PREFIXES)}
    backbone = {name: ref for name, ref in refs.items() if name not in of_tokenizer}
    block_fp8.check_quantization_config(raw, backbone, folder / "config.json")
    expected = {layout.backbone_name_to_ours(name): s for name, s in layout.backbone_shapes(config).items()}
    expected |= block_fp8.scale_shapes(backbone, raw) | layout.image_tokenizer_shapes(config)
    files.check_tensors("the model", refs, expected)

    outputs = plan_outputs(backbone, dtype, layout.backbone_name_to_released)
    plan.add_checkpoint("", "model", by_source_file(outputs))
    plan.tensors["image_tokenizer/image_tokenizer.safetensors"] = plan_outputs(of_tokenizer, dtype)
    released = _released_config(config.text_config, main_dtype(outputs))
    if raw.get("quantization_config") is not None:
        released["quantization_config"] = block_fp8.quantization_config_to_released(raw["quantization_config"])
    plan.add_json("config.json", released)
    tokenizer_config = {name: _without_generic(getattr(config, name)) for name in ("vision_config", "vq_config")}
    plan.add_json("image_tokenizer/config.json", tokenizer_config)
    return config


def _plan_released_processor(plan: Plan, folder: Path, config: LLaDAUniConfig) -> None:
    image_processor = LLaDAUniImageProcessor(patch_size=config.vision_config.patch_size)
    if (folder / "processor_config.json").is_file():
        _load_tokenizer(folder)  # its errors are clearer than those of the processor
        processor = LLaDAUniProcessor.from_pretrained(folder, local_files_only=True)
        image_processor, tokenizer = processor.image_processor, processor.tokenizer
        if tokenizer.chat_template == processor.chat_template:  # loaded from the processor's file; not its own
            tokenizer.chat_template = None
        plan.small_files.append(tokenizer.save_pretrained)
    fields = {name: getattr(image_processor, name) for name in layout.IMAGE_PROCESSOR_FIELDS}
    plan.add_json("image_tokenizer/preprocessor_config.json", {**fields, "temporal_patch_size": 1, "merge_size": 1})


def _plan_released_decoders(plan: Plan, source: Path, kinds: list[str], dtype: torch.dtype | None) -> None:
    stem = "diffusion_pytorch_model"
    embedding = files.list_checkpoint(source / "semantic_embedder", stem)
    embedder = layout.semantic_embedder_model({name: ref.shape for name, ref in embedding.items()})
    files.check_tensors("the semantic embedder", embedding, layout.module_shapes(embedder))
    plan.pickled["image_tokenizer/sigvq_embedding.pt"] = plan_outputs(embedding, dtype)

    # Each of these is one file in the release, whatever its size.
    for kind in kinds:
        folder_name, component, *_ = layout.DECODERS[kind]
        raw = files.read_json(source / component / "config.json")
        refs = files.list_checkpoint(source / component, stem)
        transformer = layout.build_on_meta(ZImageTransformer2DModel, raw)
        files.check_tensors(f"{source / component}", refs, layout.module_shapes(transformer))
        plan.tensors[f"{folder_name}/model.safetensors"] = plan_outputs(refs, dtype, layout.decoder_name_to_released)
        plan.add_json(f"{folder_name}/config.json", raw)

    raw = files.read_json(source / "vae" / "config.json")
    refs = files.list_checkpoint(source / "vae", stem)
    files.check_tensors("the VAE", refs, layout.module_shapes(layout.vae_model(raw)))
    plan.tensors[f"vae/{stem}.safetensors"] = plan_outputs(refs, dtype)
    plan.add_json("vae/config.json", raw)


def convert_to_released(
    source: str | os.PathLike,
    destination: str | os.PathLike,
    decoder: str | None = None,
    dtype: torch.dtype | None = None,
    progress: bool = True,
) -> Path:
    """
    Converts our layout to the released one.

    Args:
        source: A pipeline folder (written by [`convert_to_diffusers`] or by the pipeline's `save_pretrained`), or a
            folder that `LLaDAUniForConditionalGeneration.save_pretrained` wrote; the latter gives the backbone, the
            image tokenizer and, where the processor was saved to the same folder, the tokenizer.
        destination, decoder, dtype, progress: As in [`convert_to_diffusers`].

    Returns:
        `destination`.

    Raises:
        FileExistsError, FileNotFoundError, ValueError: As in [`convert_to_diffusers`].
    """
    source, destination = _check_folders(source, destination)
    _check_decoder(decoder)
    _check_dtype(dtype)
    plan = Plan()
    is_pipeline = (source / "model_index.json").is_file()
    config = _plan_released_model(plan, source / "model" if is_pipeline else source, dtype)
    _plan_released_processor(plan, source / "processor" if is_pipeline else source, config)
    if is_pipeline:
        available = [kind for kind, (_, component, *_) in layout.DECODERS.items() if (source / component).is_dir()]
        _plan_released_decoders(plan, source, _choose_decoders(decoder, available, source), dtype)
    elif decoder is not None:
        raise ValueError(f"`decoder` is {decoder!r}, but {source} is a saved model, without a decoder.")
    return carry_out(plan, destination, progress)


# Both ways


def _check_folders(source: str | os.PathLike, destination: str | os.PathLike) -> tuple[Path, Path]:
    source, destination = Path(source), Path(destination).absolute()
    if not source.is_dir():
        raise FileNotFoundError(f"The source {source} is not a folder.")
    if os.path.lexists(destination):
        raise FileExistsError(f"The destination {destination} exists already; remove it or name another.")
    return source, destination


def _check_dtype(dtype: torch.dtype | None) -> None:
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"`dtype` must be a floating-point torch.dtype or None, got {dtype!r}.")


def _check_decoder(decoder: str | None) -> None:
    if decoder not in (None, *DECODER_CHOICES):
        raise ValueError(f"`decoder` must be one of {', '.join(DECODER_CHOICES)}, got {decoder!r}.")


def _parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="SRC", help="folder to convert")
    parser.add_argument("destination", metavar="DST", help="folder to create; must not exist")
    parser.add_argument("--decoder", choices=DECODER_CHOICES, help="decoders to convert (default: those in SRC)")
    parser.add_argument(
        "--dtype", choices=list(DTYPES), help="dtype of the weights (default: as in SRC; the router's bias is float32)"
    )
    parser.add_argument("--to-released", action="store_true", help="from our layout to the released one")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = _parse_arguments(arguments)
    convert = convert_to_released if args.to_released else convert_to_diffusers
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the temporary folder is removed
    try:
        path = convert(args.source, args.destination, args.decoder, DTYPES.get(args.dtype))
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
