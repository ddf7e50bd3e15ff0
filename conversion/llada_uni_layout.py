"""What a LLaDA2.0-Uni checkpoint consists of, in the released layout and in ours: tensor names, shapes, token ids."""

import inspect
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import AutoencoderKL, ZImageTransformer2DModel
from diffusers.models.modeling_utils import ModelMixin
from transformers import PreTrainedTokenizerBase
from transformers.models.glm_image.modeling_glm_image import GlmImageVisionModel, GlmImageVQVAE

from diffusers_llada_uni import LLaDAUniSemanticEmbedder
from transformers_llada_uni import LLaDA2MoeForBlockDiffusion, LLaDAUniConfig


Shapes = dict[str, tuple[int, ...]]

# folder in the released layout -> component of the pipeline, component of its scheduler, arguments of the scheduler
DECODERS = {
    "normal": ("decoder", "transformer", "scheduler", {"shift": 6.0}),
    "turbo": ("decoder-turbo", "transformer_turbo", "scheduler_turbo", {"shift": 1.0, "stochastic_sampling": True}),
}
IMAGE_TOKENIZER_PREFIXES = ("model.visual.", "model.vqmodel.")
SCALE_SUFFIX = "_scale_inv"  # of the scales of an FP8 weight
# Arguments of our image processor that the released preprocessor_config.json states. Its `merge_size` is left out: the
# release says 2, a slip, for patches are in raster order.
IMAGE_PROCESSOR_FIELDS = ("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std", "patch_size")
# Length of the decoder's RoPE tables: positions of the 4*H*W features, and rows and columns of latent patches.
AXES_LENS = (32768, 1024, 1024)


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


@contextmanager
def _building(what: str) -> Iterator[None]:
    """On the meta device; an error of a class that is not ours (asserts, KeyErrors, ...) becomes a ValueError."""
    try:
        with torch.device("meta"):
            yield
    except Exception as error:
        raise ValueError(f"The config of {what} does not fit together: {error!r}.") from error


def module_shapes(module: torch.nn.Module, prefix: str = "") -> Shapes:
    return {prefix + name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def backbone_shapes(config: LLaDAUniConfig) -> Shapes:
    """Names, as released, and shapes of the backbone's tensors, every expert by itself."""
    with _building("the backbone"):
        fused = module_shapes(LLaDA2MoeForBlockDiffusion(config.text_config))
    shapes: Shapes = {}
    for name, shape in fused.items():
        if name.endswith(".mlp.experts.gate_up_proj"):
            parts = {"gate_proj": (shape[1] // 2, shape[2]), "up_proj": (shape[1] // 2, shape[2])}
        elif name.endswith(".mlp.experts.down_proj"):
            parts = {"down_proj": shape[1:]}
        else:
            shapes[name] = shape
            continue
        stem = name.rpartition(".")[0]
        shapes |= {f"{stem}.{e}.{part}.weight": size for e in range(shape[0]) for part, size in parts.items()}
    return shapes


def image_tokenizer_shapes(config: LLaDAUniConfig) -> Shapes:
    """Names (the same in both layouts) and shapes of the image tokenizer's tensors."""
    with _building("the image tokenizer"):
        vision, vq = GlmImageVisionModel(config.vision_config), GlmImageVQVAE(config.vq_config)
    return module_shapes(vision, "model.visual.") | module_shapes(vq, "model.vqmodel.")


def _own_arguments(model_class: type[ModelMixin], config: Mapping[str, Any]) -> dict[str, Any]:
    names = set(inspect.signature(model_class.__init__).parameters) - {"self"}
    return {name: value for name, value in config.items() if name in names}


def build_on_meta(model_class: type[ModelMixin], config: Mapping[str, Any]) -> ModelMixin:
    """
    A diffusers model without data, from the content of a `config.json`.

    Raises:
        ValueError: if the class does not take these values.
    """
    with _building(model_class.__name__):
        return model_class(**_own_arguments(model_class, config))


def decoder_model(config: Mapping[str, Any], feature_dim: int) -> ZImageTransformer2DModel:
    """The diffusion decoder for features of width `feature_dim`, without data, from the released `config.json`."""
    lens = [max(*pair) for pair in zip(config.get("axes_lens", AXES_LENS), AXES_LENS, strict=True)]
    # The released config describes the text-conditioned ancestor in these three; the length of the RoPE tables does
    # not change their entries.
    mended = {"cap_feat_dim": feature_dim, "axes_lens": lens, "siglip_feat_dim": None}
    return build_on_meta(ZImageTransformer2DModel, {**config, **mended})


def vae_model(config: Mapping[str, Any]) -> AutoencoderKL:
    return build_on_meta(AutoencoderKL, config)


def semantic_embedder_model(shapes: Mapping[str, tuple[int, ...]]) -> LLaDAUniSemanticEmbedder:
    """
    The embedder whose sizes are those of the tensors: the release has no config for it.

    Raises:
        ValueError: if a tensor that tells a size is missing.
    """
    names = ("prior_token_embedding.weight", "prior_projector.net.0.proj.weight", "prior_projector.net.2.weight")
    missing = [name for name in names if len(shapes.get(name, ())) != 2]
    if missing:
        raise ValueError(f"The semantic embedder's tensors are missing or not matrices: {', '.join(missing)}.")
    embedding, hidden, out = (shapes[name] for name in names)
    sizes = {"codebook_size": embedding[0], "embedding_dim": embedding[1], "hidden_dim": hidden[0], "out_dim": out[0]}
    return build_on_meta(LLaDAUniSemanticEmbedder, sizes)


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
            "The tokenizer has no " + ", ".join(f"<|reserved_token_{n}|>" for n in gaps[:4]) + "; headers of pictures "
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
