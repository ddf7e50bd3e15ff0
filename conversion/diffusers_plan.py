"""Released layout -> a pipeline folder: what is to be written."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import __version__ as diffusers_version
from diffusers.models import AutoencoderKL
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from transformers import PreTrainedTokenizerBase
from transformers.models.glm_image.configuration_glm_image import GlmImageVisionConfig, GlmImageVQVAEConfig

from diffusers_llada_uni.decoders import DECODERS, SCHEDULER_SETTINGS
from diffusers_llada_uni.pipeline_card import make_pipeline_card
from llada_uni.conversion import block_fp8
from llada_uni.conversion import llada_uni_layout as layout
from llada_uni.conversion import tensor_files as files
from llada_uni.conversion.config_files import check_keys, check_settings, naming, read_json
from llada_uni.conversion.output_plan import Plan, by_source_file, main_dtype, plan_outputs
from transformers_llada_uni import (
    BlockDiffusionGenerationConfig,
    LLaDA2MoeConfig,
    LLaDAUniConfig,
    LLaDAUniForConditionalGeneration,
    LLaDAUniImageProcessor,
    LLaDAUniProcessor,
)


def plan_diffusers(source: Path, model_name: str, decoder: str | None, dtype: torch.dtype | None) -> Plan:
    """
    Args:
        source: Folder in the released layout.
        model_name: Title of the model card.
        decoder, dtype: As in [`convert_to_diffusers`].
    """
    plan = Plan()
    config, tokenizer = _plan_model(plan, source, dtype)
    available = [kind for kind, folder in layout.DECODER_FOLDERS.items() if (source / folder).is_dir()]
    kinds = layout.choose_decoders(decoder, available, source)
    _plan_processor(plan, source, config, tokenizer)
    index = _plan_decoders(plan, source, kinds, config, dtype)
    for name, component in (("model", LLaDAUniForConditionalGeneration), ("processor", LLaDAUniProcessor)):
        index[name] = [component.__module__, component.__name__]
    plan.add_json(
        "model_index.json", {"_class_name": "LLaDAUniPipeline", "_diffusers_version": diffusers_version, **index}
    )
    dtype_name = str(config.dtype).removeprefix("torch.")
    card = make_pipeline_card(model_name, kinds, dtype_name, license="apache-2.0")  # the release's
    plan.small_files.append(("README.md", card.save))
    return plan


def _read_configs(source: Path) -> tuple[dict[str, Any], LLaDAUniConfig, PreTrainedTokenizerBase, dict[str, Any]]:
    """The released config.json, ours, the tokenizer, and the ids of its tokens."""
    file, tokenizer_file = source / "config.json", source / "image_tokenizer" / "config.json"
    raw = read_json(file)
    if raw.get("model_type") != "llada2_moe":
        raise ValueError(f"{file} has `model_type` {raw.get('model_type')!r}, a released checkpoint 'llada2_moe'.")
    if raw.get("image_token_offset") is None:
        raise ValueError(
            f"{source} is a text-only checkpoint (no `image_token_offset`): nothing to convert, "
            "AutoModelForCausalLM.from_pretrained loads it as it is."
        )
    dropped = ("auto_map", "architectures", "torch_dtype", "dtype", "transformers_version", "quantization_config")
    text_config = {name: value for name, value in raw.items() if name not in dropped}
    with naming(file):
        check_keys(text_config, LLaDA2MoeConfig)
        LLaDA2MoeConfig(**text_config)
    tokenizer = layout.load_tokenizer(source)
    tokens = layout.look_up_tokens(tokenizer, raw["image_token_offset"])
    text_config |= {name: tokens[name] for name in ("mask_token_id", "eos_token_id", "pad_token_id")}

    image_tokenizer = read_json(tokenizer_file)
    with naming(tokenizer_file):
        for name, config_class in (("vision_config", GlmImageVisionConfig), ("vq_config", GlmImageVQVAEConfig)):
            if not isinstance(image_tokenizer.get(name), dict):
                raise ValueError(f"it has no `{name}`")
            check_keys(image_tokenizer[name], config_class)
            check_settings(image_tokenizer[name], layout.VISION_SETTINGS)
            config_class(**image_tokenizer[name])
    names = ("image_token_id", "image_start_token_id", "image_end_token_id", "begin_of_image_token_id")
    with naming(file, tokenizer_file):
        config = LLaDAUniConfig(
            text_config=text_config,
            vision_config=image_tokenizer["vision_config"],
            vq_config=image_tokenizer["vq_config"],
            grid_token_ids=tokens["grid_token_ids"],
            architectures=[LLaDAUniForConditionalGeneration.__name__],
            **{name: tokens[name] for name in names},
        )
    return raw, config, tokenizer, tokens


def _plan_model(plan: Plan, source: Path, dtype: torch.dtype | None) -> tuple[LLaDAUniConfig, PreTrainedTokenizerBase]:
    raw, config, tokenizer, tokens = _read_configs(source)
    text_config, *_ = layout.sub_configs(config)

    file = source / "config.json"
    backbone = files.list_checkpoint(source, "model")
    block_fp8.check_quantization_config(raw, backbone, file)
    shapes = layout.backbone_shapes(text_config, file, len(backbone)) | block_fp8.scale_shapes(backbone, raw)
    files.check_tensors("the backbone", backbone, shapes)
    if raw.get("quantization_config") is not None:
        config.quantization_config = block_fp8.quantization_config_to_ours(raw["quantization_config"], backbone)
    image_tokenizer = files.list_tensors(source / "image_tokenizer" / "image_tokenizer.safetensors")
    file = source / "image_tokenizer" / "config.json"
    shapes = layout.image_tokenizer_shapes(config, file, len(image_tokenizer))
    files.check_tensors("the image tokenizer", image_tokenizer, shapes)

    outputs = plan_outputs(backbone, dtype, layout.backbone_name_to_ours)
    config.dtype = main_dtype(outputs)
    plan.add_checkpoint(
        "model", "model", by_source_file(outputs) + files.split_by_size(plan_outputs(image_tokenizer, dtype))
    )
    generation_config = BlockDiffusionGenerationConfig(
        eos_token_id=[tokens["eos_token_id"], tokens["role_end_token_id"]],
        pad_token_id=tokens["pad_token_id"],
        mask_token_id=tokens["mask_token_id"],
        block_length=text_config.block_length,
    )
    # The folder as a whole is a transformers checkpoint too: its index points into model/.
    plan.add_json("model.safetensors.index.json", files.index_of(plan.tensors))
    for folder in ("", "model"):
        plan.small_files += [(folder, config.save_pretrained), (folder, generation_config.save_pretrained)]
    return config, tokenizer


def _plan_processor(plan: Plan, source: Path, config: LLaDAUniConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    text_config, vision_config, vq_config = layout.sub_configs(config)
    file = source / "image_tokenizer" / "preprocessor_config.json"
    raw = read_json(file)
    fields = {name: raw[name] for name in layout.IMAGE_PROCESSOR_FIELDS if name in raw}
    with naming(file):
        layout.check_image_processor(fields)
        if fields.get("patch_size", vision_config.patch_size) != vision_config.patch_size:
            raise ValueError(f"`patch_size` is {fields['patch_size']}, the vision tower's {vision_config.patch_size}")
        processor = LLaDAUniProcessor(
            image_processor=LLaDAUniImageProcessor(**fields),
            tokenizer=tokenizer,
            image_token_offset=text_config.image_token_offset,
            codebook_size=vq_config.num_embeddings,
            max_position_embeddings=text_config.max_position_embeddings,
        )
    plan.small_files += [(folder, processor.save_pretrained) for folder in ("", "processor")]


def _plan_decoders(
    plan: Plan, source: Path, kinds: list[str], config: LLaDAUniConfig, dtype: torch.dtype | None
) -> dict[str, Any]:
    """Semantic embedder, decoders, their schedulers and the VAE; returns their entries in model_index.json."""
    index: dict[str, Any] = {name: [None, None] for names in DECODERS.values() for name in names}

    def plan_component(name: str, model: Any, refs: Mapping[str, files.TensorRef]) -> None:
        plan.add_checkpoint(name, layout.COMPONENT_STEM, files.split_by_size(plan_outputs(refs, dtype)))
        plan.small_files.append((name, model.save_config))
        library = "diffusers" if type(model).__module__.startswith("diffusers.") else type(model).__module__
        index[name] = [library, type(model).__name__]

    file = source / "image_tokenizer" / "sigvq_embedding.pt"
    embedding = files.list_tensors(file)
    embedder = layout.semantic_embedder_model(embedding, file)
    files.check_tensors("the semantic embedder", embedding, layout.module_shapes(embedder))
    codebook_size, num_codes = embedder.config["codebook_size"], layout.sub_configs(config)[2].num_embeddings
    if codebook_size != num_codes:
        raise ValueError(
            f"{file} embeds {codebook_size} codes, but the codebook (`vq_config.num_embeddings`) has {num_codes}."
        )
    plan_component("semantic_embedder", embedder, embedding)

    for kind in kinds:
        folder, (component, scheduler_component) = source / layout.DECODER_FOLDERS[kind], DECODERS[kind]
        refs = files.list_checkpoint(folder, "model")
        file = folder / "config.json"
        transformer = layout.decoder_model(read_json(file), embedder.config["out_dim"], len(refs), file)
        named = {layout.decoder_name_to_ours(name): ref for name, ref in refs.items()}
        files.check_tensors(str(folder), named, layout.module_shapes(transformer))
        plan_component(component, transformer, named)
        scheduler = FlowMatchEulerDiscreteScheduler(**SCHEDULER_SETTINGS[kind])
        plan.small_files.append((scheduler_component, scheduler.save_pretrained))
        index[scheduler_component] = ["diffusers", FlowMatchEulerDiscreteScheduler.__name__]

    file = source / "vae" / "config.json"
    content = read_json(file)
    refs = files.list_checkpoint(source / "vae", layout.COMPONENT_STEM)
    vae = layout.build_on_meta(AutoencoderKL, content, len(refs), file)
    files.check_tensors("the VAE", refs, layout.module_shapes(vae))
    plan_component("vae", vae, refs)
    return index
