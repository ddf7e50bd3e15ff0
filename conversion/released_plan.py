"""A pipeline folder, or a saved model -> the released layout: what is to be written."""

from pathlib import Path
from typing import Any

import torch
from diffusers.models import AutoencoderKL, ZImageTransformer2DModel
from transformers import PreTrainedConfig

from diffusers_llada_uni.decoders import DECODERS
from llada_uni.conversion import block_fp8
from llada_uni.conversion import llada_uni_layout as layout
from llada_uni.conversion import tensor_files as files
from llada_uni.conversion.config_files import check_keys, check_settings, naming, read_json
from llada_uni.conversion.output_plan import Plan, by_source_file, main_dtype, plan_outputs
from transformers_llada_uni import LLaDAUniConfig, LLaDAUniImageProcessor, LLaDAUniProcessor


def plan_released(source: Path, decoder: str | None, dtype: torch.dtype | None) -> Plan:
    """Args as in [`convert_to_released`]."""
    plan = Plan()
    is_pipeline = (source / "model_index.json").is_file()
    config = _plan_model(plan, source / "model" if is_pipeline else source, dtype)
    _plan_processor(plan, source / "processor" if is_pipeline else source, config)
    if is_pipeline:
        available = [kind for kind in layout.DECODER_FOLDERS if (source / DECODERS[kind][0]).is_dir()]
        _plan_decoders(plan, source, layout.choose_decoders(decoder, available, source), dtype)
    elif decoder is not None:
        raise ValueError(f"`decoder` is {decoder!r}, but {source} is a saved model, without a decoder.")
    return plan


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


def _plan_model(plan: Plan, folder: Path, dtype: torch.dtype | None) -> LLaDAUniConfig:
    file = folder / "config.json"
    raw = read_json(file)
    if raw.get("model_type") != "llada_uni":
        raise ValueError(
            f"{file} has `model_type` {raw.get('model_type')!r}; converting to the released layout "
            "takes a pipeline folder or a saved LLaDAUniForConditionalGeneration ('llada_uni')."
        )
    with naming(file):
        for name, config_class in LLaDAUniConfig.sub_configs.items():
            if not isinstance(raw.get(name, {}), dict):
                raise ValueError(f"`{name}` should be an object, got {raw[name]!r:.80}")
            check_keys(raw.get(name, {}), config_class)
        check_settings(raw.get("vision_config", {}), layout.VISION_SETTINGS)
        check_keys(raw, LLaDAUniConfig)
        config = LLaDAUniConfig.from_pretrained(folder, local_files_only=True)
    if (folder / "adapter_config.json").is_file():
        raise ValueError(
            f"{folder} has an adapter beside its model, and the released layout no place for one. Merge it: "
            "`pipe.fuse_lora()`, then `pipe.unload_lora_weights()`, before the pipeline is saved."
        )
    refs = files.list_checkpoint(folder, "model")
    of_tokenizer = {name: ref for name, ref in refs.items() if name.startswith(layout.IMAGE_TOKENIZER_PREFIXES)}
    backbone = {name: ref for name, ref in refs.items() if name not in of_tokenizer}
    block_fp8.check_quantization_config(raw, backbone, file)
    shapes = layout.backbone_shapes(layout.sub_configs(config)[0], file, len(backbone))
    expected = {layout.backbone_name_to_ours(name): shape for name, shape in shapes.items()}
    expected |= block_fp8.scale_shapes(backbone, raw) | layout.image_tokenizer_shapes(config, file, len(of_tokenizer))
    files.check_tensors("the model", refs, expected)

    outputs = plan_outputs(backbone, dtype, layout.backbone_name_to_released)
    plan.add_checkpoint("", "model", by_source_file(outputs))
    plan.tensors["image_tokenizer/image_tokenizer.safetensors"] = plan_outputs(of_tokenizer, dtype)
    text_config, vision_config, vq_config = layout.sub_configs(config)
    released = _released_config(text_config, main_dtype(outputs))
    if raw.get("quantization_config") is not None:
        released["quantization_config"] = block_fp8.quantization_config_to_released(raw["quantization_config"])
    plan.add_json("config.json", released)
    tokenizer_config = {"vision_config": _without_generic(vision_config), "vq_config": _without_generic(vq_config)}
    plan.add_json("image_tokenizer/config.json", tokenizer_config)
    return config


def _plan_processor(plan: Plan, folder: Path, config: LLaDAUniConfig) -> None:
    patch_size = layout.sub_configs(config)[1].patch_size
    if not isinstance(patch_size, int):
        raise ValueError(f"The vision tower's `patch_size` should be an integer, got {patch_size!r:.80}.")
    image_processor = LLaDAUniImageProcessor(patch_size=patch_size)
    file = folder / "processor_config.json"
    if file.is_file():
        read_json(file)
        layout.load_tokenizer(folder)  # its errors are clearer than those of the processor
        with naming(file):
            processor = LLaDAUniProcessor.from_pretrained(folder, local_files_only=True)
        image_processor, tokenizer = processor.image_processor, processor.tokenizer
        if tokenizer.chat_template == processor.chat_template:  # loaded from the processor's file; not its own
            tokenizer.chat_template = None
        plan.small_files.append(("", tokenizer.save_pretrained))
    fields = {name: getattr(image_processor, name) for name in layout.IMAGE_PROCESSOR_FIELDS}
    with naming(file):
        layout.check_image_processor(fields)
    plan.add_json("image_tokenizer/preprocessor_config.json", {**fields, "temporal_patch_size": 1, "merge_size": 1})


def _plan_decoders(plan: Plan, source: Path, kinds: list[str], dtype: torch.dtype | None) -> None:
    folder = source / "semantic_embedder"
    embedding = files.list_checkpoint(folder, layout.COMPONENT_STEM)
    embedder = layout.semantic_embedder_model(embedding, folder)
    files.check_tensors("the semantic embedder", embedding, layout.module_shapes(embedder))
    plan.pickled["image_tokenizer/sigvq_embedding.pt"] = plan_outputs(embedding, dtype)

    # Each of these is one file in the release, whatever its size.
    for kind in kinds:
        folder, released_folder = source / DECODERS[kind][0], layout.DECODER_FOLDERS[kind]
        raw = read_json(folder / "config.json")
        refs = files.list_checkpoint(folder, layout.COMPONENT_STEM)
        transformer = layout.build_on_meta(ZImageTransformer2DModel, raw, len(refs), folder / "config.json")
        files.check_tensors(str(folder), refs, layout.module_shapes(transformer))
        outputs = plan_outputs(refs, dtype, layout.decoder_name_to_released)
        plan.tensors[f"{released_folder}/model.safetensors"] = outputs
        plan.add_json(f"{released_folder}/config.json", raw)

    folder = source / "vae"
    raw = read_json(folder / "config.json")
    refs = files.list_checkpoint(folder, layout.COMPONENT_STEM)
    vae = layout.build_on_meta(AutoencoderKL, raw, len(refs), folder / "config.json")
    files.check_tensors("the VAE", refs, layout.module_shapes(vae))
    plan.tensors[f"vae/{layout.COMPONENT_STEM}.safetensors"] = plan_outputs(refs, dtype)
    plan.add_json("vae/config.json", raw)
