"""What a LLaDA2.0-Uni checkpoint consists of, in the released layout and in ours: tensor names, shapes, token ids."""

import inspect
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers.models import ZImageTransformer2DModel
from diffusers.models.modeling_utils import ModelMixin
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.models.glm_image.configuration_glm_image import GlmImageVisionConfig, GlmImageVQVAEConfig
from transformers.models.glm_image.modeling_glm_image import GlmImageVisionModel, GlmImageVQVAE

from diffusers_llada_uni import LLaDAUniSemanticEmbedder
from llada_uni.conversion.config_files import building, check_settings, most_tensors, naming
from llada_uni.conversion.tensor_files import TensorRef
from transformers_llada_uni import LLaDA2MoeConfig, LLaDA2MoeForBlockDiffusion, LLaDAUniConfig


Shapes = dict[str, tuple[int, ...]]

ModelT = TypeVar("ModelT", bound=ModelMixin)

# Names of decoders -> their folder in the released layout
COMPONENT_STEM = "diffusion_pytorch_model"  # of the files that diffusers writes, in both layouts
DECODER_FOLDERS = {"normal": "decoder", "turbo": "decoder-turbo"}
IMAGE_TOKENIZER_PREFIXES = ("model.visual.", "model.vqmodel.")
SCALE_SUFFIX = "_scale_inv"  # of the scales of an FP8 weight
# Arguments of our image processor that the released preprocessor_config.json states, with examples. Its `merge_size`
# is left out: the release says 2, a slip, for patches are in raster order.
IMAGE_PROCESSOR_FIELDS: dict[str, Any] = {
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.0],
    "image_std": [0.5],
    "patch_size": 16,
}
# Examples of what no tensor of the vision tower tells
VISION_SETTINGS = {"num_heads": 16, "num_attention_heads": 16, "layer_norm_eps": 1e-6, "spatial_merge_size": 1}
# Length of the decoder's RoPE tables: positions of the 4*H*W features, and rows and columns of latent patches.
AXES_LENS = (32768, 1024, 1024)
# Examples of arguments of diffusers' models whose default is `None`
OPTIONAL_SETTINGS = {"shift_factor": 0.0, "latents_mean": [0.0], "latents_std": [1.0], "siglip_feat_dim": 1}


def backbone_name_to_ours(name: str) -> str:
    """`model.X` -> `model.language_model.X`; `lm_head.weight` keeps its name."""
    return re.sub(r"^model\.", "model.language_model.", name)


def backbone_name_to_released(name: str) -> str:
    return re.sub(r"^model\.language_model\.", "model.", name)


def decoder_name_to_ours(name: str) -> str:
    """The release calls the embedder of the image codes' features `semantic_embedder`, diffusers `cap_embedder`."""
    return re.sub(r"^semantic_embedder\.", "cap_embedder.", name)


def decoder_name_to_released(name: str) -> str:
    return re.sub(r"^cap_embedder\.", "semantic_embedder.", name)


def stored_dtype(name: str, dtype: torch.dtype, requested: torch.dtype | None) -> torch.dtype:
    """
    The dtype in which a tensor is written. The router adds its bias to float32 scores to choose experts, so a
    requested dtype does not apply to `expert_bias`; nor does it to integers, or to FP8 weights and their scales.
    """
    if requested is None or not dtype.is_floating_point or dtype.itemsize == 1 or name.endswith(SCALE_SUFFIX):
        return dtype
    return torch.float32 if name.endswith(".expert_bias") else requested


def module_shapes(module: torch.nn.Module, prefix: str = "") -> Shapes:
    return {prefix + name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def sub_configs(config: LLaDAUniConfig) -> tuple[LLaDA2MoeConfig, GlmImageVisionConfig, GlmImageVQVAEConfig]:
    """Those of the backbone, the vision tower and the codebook; the configuration has checked that they are such."""
    text, vision, vq = config.text_config, config.vision_config, config.vq_config
    assert isinstance(text, LLaDA2MoeConfig)
    assert isinstance(vision, GlmImageVisionConfig)
    assert isinstance(vq, GlmImageVQVAEConfig)
    return text, vision, vq


def backbone_shapes(text_config: LLaDA2MoeConfig, file: Path, num_tensors: int) -> Shapes:
    """
    Names, as released, and shapes of the backbone's tensors, every expert by itself.

    Args:
        text_config: Of the backbone.
        file: Where it was read, for errors.
        num_tensors: How many tensors the backbone's files hold: a config with far more is refused at once.

    Raises:
        ValueError: if the config does not fit together, or the files by far.
    """
    shapes: Shapes = {}
    with naming(file):
        with building(text_config.to_dict(), num_tensors):
            fused = module_shapes(LLaDA2MoeForBlockDiffusion(text_config))
        for name, shape in fused.items():
            stem, _, kind = name.rpartition(".")
            if not stem.endswith(".mlp.experts"):
                shapes[name] = shape
                continue
            if len(shapes) + shape[0] > most_tensors(num_tensors):
                raise ValueError(f"`num_experts` is {shape[0]}, but the files hold only {num_tensors} tensors")
            parts = {"gate_proj": (shape[1] // 2, shape[2]), "up_proj": (shape[1] // 2, shape[2])}
            if kind == "down_proj":
                parts = {"down_proj": (shape[1], shape[2])}
            shapes |= {f"{stem}.{e}.{part}.weight": size for e in range(shape[0]) for part, size in parts.items()}
    return shapes


def image_tokenizer_shapes(config: LLaDAUniConfig, file: Path, num_tensors: int) -> Shapes:
    """[`backbone_shapes`] of the image tokenizer, whose names are the same in both layouts."""
    _, vision_config, vq_config = sub_configs(config)
    with naming(file), building(vision_config.to_dict(), num_tensors):
        vision, vq = GlmImageVisionModel(vision_config), GlmImageVQVAE(vq_config)
    return module_shapes(vision, "model.visual.") | module_shapes(vq, "model.vqmodel.")


def build_on_meta(model_class: type[ModelT], config: Mapping[str, Any], num_tensors: int, file: Path) -> ModelT:
    """
    A diffusers model without data, from the content of a `config.json`.

    Args:
        model_class: Its class.
        config: Settings; those that the class does not know are left out.
        num_tensors, file: As in [`backbone_shapes`].

    Raises:
        ValueError: if the class does not take these values.
    """
    defaults = {name: parameter.default for name, parameter in inspect.signature(model_class).parameters.items()}
    settings = {name: value for name, value in config.items() if name in defaults}
    with naming(file, what=f"does not fit {model_class.__name__}"):
        stated = {name: value for name, value in settings.items() if value is not None or defaults[name] is not None}
        check_settings(stated, {**OPTIONAL_SETTINGS, **{k: v for k, v in defaults.items() if v is not None}})
        with building(settings, num_tensors):
            return model_class(**settings)


def decoder_model(
    config: Mapping[str, Any], feature_dim: int, num_tensors: int, file: Path
) -> ZImageTransformer2DModel:
    """The diffusion decoder for features of width `feature_dim`, without data, from the released `config.json`."""
    lens = config.get("axes_lens", AXES_LENS)
    with naming(file):
        check_settings({"axes_lens": lens}, {"axes_lens": AXES_LENS})
        if len(lens) != len(AXES_LENS):
            raise ValueError(f"`axes_lens` should be {len(AXES_LENS)} lengths, got {lens!r:.80}")
    # The released config describes the text-conditioned ancestor in these three; the length of the RoPE tables does
    # not change their entries.
    longest = [max(pair) for pair in zip(lens, AXES_LENS, strict=True)]
    mended = {"cap_feat_dim": feature_dim, "axes_lens": longest, "siglip_feat_dim": None}
    return build_on_meta(ZImageTransformer2DModel, {**config, **mended}, num_tensors, file)


def semantic_embedder_model(tensors: Mapping[str, TensorRef], file: Path) -> LLaDAUniSemanticEmbedder:
    """
    The embedder whose sizes are those of the tensors: the release has no config for it.

    Raises:
        ValueError: if a tensor that tells a size is missing.
    """
    names = ("prior_token_embedding.weight", "prior_projector.net.0.proj.weight", "prior_projector.net.2.weight")
    shapes = [tensors[name].shape if name in tensors else () for name in names]
    missing = [name for name, shape in zip(names, shapes, strict=True) if len(shape) != 2]
    if missing:
        raise ValueError(f"{file}: tensors are missing or no matrices: {', '.join(missing)}.")
    (codebook_size, embedding_dim), (hidden_dim, _), (out_dim, _) = shapes
    with naming(file), building({}, len(tensors)):
        return LLaDAUniSemanticEmbedder(codebook_size, embedding_dim, hidden_dim, out_dim)


def check_image_processor(fields: Mapping[str, Any]) -> None:
    """Raises a `ValueError` if one of `IMAGE_PROCESSOR_FIELDS` is not as it should be."""
    check_settings(fields, IMAGE_PROCESSOR_FIELDS)
    for name in ("image_mean", "image_std"):
        if len(fields.get(name, "RGB")) != 3:
            raise ValueError(f"`{name}` should be three numbers, got {fields[name]!r:.80}")


def choose_decoders(choice: str | None, available: list[str], source: Path) -> list[str]:
    """The decoders to convert. Raises a `FileNotFoundError` if one that is wanted is not available, or none is."""
    wanted = list(DECODER_FOLDERS) if choice == "both" else [choice] if choice else available
    missing = [kind for kind in wanted if kind not in available]
    if missing or not wanted:
        raise FileNotFoundError(
            f"{source} has no {' and no '.join(missing or DECODER_FOLDERS)} decoder"
            + (f", only the {available[0]} one; give `decoder={available[0]!r}`." if available else ".")
        )
    return wanted


def load_tokenizer(folder: Path, tokenizer_class: Any = AutoTokenizer) -> PreTrainedTokenizerBase:
    """Raises a `FileNotFoundError` or `ValueError` that names the folder if there is none, or it cannot be read."""
    if not (folder / "tokenizer.json").is_file():
        raise FileNotFoundError(f"{folder / 'tokenizer.json'} is missing.")
    with naming(folder / "tokenizer.json", folder / "tokenizer_config.json"):
        return tokenizer_class.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def look_up_tokens(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> dict[str, Any]:
    """
    The ids that `LLaDAUniConfig` and the generation config need, looked up in the tokenizer.

    Args:
        tokenizer: The released tokenizer.
        vocab_size: Ids below this are text; an id that is not is a mismatch of tokenizer and checkpoint.

    Returns:
        `image_start_token_id`, `image_end_token_id`, `begin_of_image_token_id`, `mask_token_id`, `eos_token_id`,
        `pad_token_id`, `role_end_token_id`, `image_token_id`, and `grid_token_ids`, a list.

    Raises:
        ValueError: if a token is absent, the reserved tokens have a gap, or an id lies outside the text vocabulary.
    """
    vocab = tokenizer.get_vocab()
    tokens = {
        "image_start_token_id": "<|image|>",
        "image_end_token_id": "<|/image|>",
        "begin_of_image_token_id": "<boi>",
        "mask_token_id": "<|mask|>",
        "eos_token_id": "<|endoftext|>",
        "pad_token_id": tokenizer.pad_token or "<|endoftext|>",
        "role_end_token_id": "<|role_end|>",
    }
    absent = [token for token in dict.fromkeys(tokens.values()) if token not in vocab]
    if absent:
        raise ValueError(f"The tokenizer has no {', '.join(absent)}; it does not belong to a LLaDA2.0-Uni checkpoint.")
    pattern = re.compile(r"<\|reserved_token_(\d+)\|>")
    reserved = {int(match[1]): index for token, index in vocab.items() if (match := pattern.fullmatch(token))}
    gaps = sorted(set(range(max(reserved, default=0) + 1)) - set(reserved))
    if gaps:
        raise ValueError(
            "The tokenizer has no " + ", ".join(f"<|reserved_token_{n}|>" for n in gaps[:4]) + "; headers of images "
            "need the reserved tokens from 0 on without a gap."
        )
    ids: dict[str, Any] = {name: vocab[token] for name, token in tokens.items()}
    ids["grid_token_ids"] = [reserved[n] for n in range(len(reserved))]
    ids["image_token_id"] = ids["grid_token_ids"][0]
    for name, value in ids.items():
        if max(value if isinstance(value, list) else [value]) >= vocab_size:
            raise ValueError(
                f"The tokenizer's `{name}` {value} lies outside the {vocab_size} text ids of the backbone."
            )
    return ids
