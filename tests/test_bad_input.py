"""
The table of bad input: every public entry refuses it with a ValueError, TypeError or OSError that names the argument
and what was wrong, before it has worked or written anything. Tensors that do not fit are transformers' to refuse.

The processors', the pipeline's and the converter's own tests hold more of the kind.
"""

import copy
import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, GenerationConfig, TextStreamer

from diffusers_llada_uni import LLaDAUniPipeline, LLaDAUniSemanticEmbedder
from llada_uni.conversion.convert_llada_uni_checkpoint import convert_to_diffusers, convert_to_released
from transformers_llada_uni import (
    BlockDiffusionGenerationConfig,
    LLaDA2MoeConfig,
    LLaDA2MoeForBlockDiffusion,
    LLaDAUniConfig,
    LLaDAUniForConditionalGeneration,
)


NAN, INF = float("nan"), float("inf")
IDS = torch.tensor([[1, 2, 3]])
TWO = torch.tensor([[1, 2, 3], [4, 5, 6]])
FULL = torch.ones(1, 2048, dtype=torch.long)
PLACEHOLDERS = torch.tensor([[1, *[448] * 6, 2]])
PATCHES = torch.zeros(6, 768)
GRID_THW = torch.tensor([[1, 2, 3]])
CODES = torch.zeros(1, 4, dtype=torch.long)
REGENERATE = torch.ones(1, 4, dtype=torch.bool)
SMALL_CONFIG = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 16,
    "moe_intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "num_experts": 4,
    "num_experts_per_tok": 1,
    "n_group": 2,
    "topk_group": 1,
}
SHARD = "model-00002-of-00003.safetensors"


class Settings(SimpleNamespace):
    """What the rows call, made once: `uni`, `backbone`, `text_only`, `pipe`; per row: `folder`, an empty one."""


@pytest.fixture(scope="module")
def settings(official_tiny, converted_dir):
    pipe = LLaDAUniPipeline.from_pretrained(converted_dir)
    backbone = LLaDA2MoeForBlockDiffusion.from_pretrained(official_tiny)
    text_only = LLaDA2MoeForBlockDiffusion(LLaDA2MoeConfig(**SMALL_CONFIG)).eval()

    def no_work(*args, **kwargs):
        pytest.fail("work was done before the refusal")

    workers = [pipe.model.model.visual.blocks[0], pipe.semantic_embedder, pipe.transformer, pipe.transformer_turbo]
    workers += [pipe.vae.decoder, *(m.get_decoder().layers[0] for m in (pipe.model, backbone, text_only))]
    for module in workers:
        module.register_forward_pre_hook(no_work)
    return Settings(
        pipe=pipe,
        uni=pipe.model,
        backbone=backbone,
        text_only=text_only,
        released=official_tiny,
        converted=converted_dir,
    )


Row = tuple[str, Callable[[Settings], Any], type[Exception], list[str]]
ROWS: list[Row] = []


def rows(prefix: str, call: Callable[..., Any], *cases: tuple[dict[str, Any], type[Exception], list[str]]) -> None:
    """A row for each case: `call(settings, **arguments)`."""
    for number, (arguments, error, words) in enumerate(cases):
        name = ", ".join(f"{key}={str(value)[:28]}" for key, value in arguments.items())
        ROWS.append((f"{prefix} {number}: {name}", lambda s, a=arguments: call(s, **a), error, words))


# ------------------------------------------------------------------------------------------------- configurations

rows(
    "backbone config",
    lambda s, **changed: LLaDA2MoeConfig(**{**SMALL_CONFIG, **changed}),
    ({"vocab_size": 0}, ValueError, ["`vocab_size`", "at least 1", "0"]),
    ({"hidden_size": -4}, ValueError, ["`hidden_size`", "-4"]),
    ({"hidden_size": "wide"}, TypeError, ["hidden_size", "wide"]),
    ({"num_hidden_layers": True}, TypeError, ["num_hidden_layers", "bool"]),
    ({"num_hidden_layers": 0}, ValueError, ["`num_hidden_layers`", "at least 1"]),
    ({"num_key_value_heads": 0}, ValueError, ["`num_key_value_heads`", "0"]),
    ({"num_attention_heads": 3, "num_key_value_heads": 2}, ValueError, ["`num_attention_heads` (3)", "multiple"]),
    ({"head_dim": 0}, ValueError, ["`head_dim`", "0"]),
    ({"head_dim": 7}, ValueError, ["`partial_rotary_factor`", "`head_dim` (7)", "even"]),
    ({"n_group": 0}, ValueError, ["`n_group`", "0"]),
    ({"num_experts": 5}, ValueError, ["`num_experts` (5)", "`n_group`"]),
    ({"topk_group": 3}, ValueError, ["`topk_group`", "3"]),
    ({"num_experts_per_tok": 9}, ValueError, ["`num_experts_per_tok`", "9"]),
    ({"image_token_offset": 64}, ValueError, ["`image_token_offset`", "64"]),
    ({"block_length": 2.5}, TypeError, ["block_length", "2.5"]),
    ({"block_length": 0}, ValueError, ["`block_length`", "0"]),
    ({"rms_norm_eps": NAN}, ValueError, ["`rms_norm_eps`", "nan"]),
    ({"attention_dropout": 1.5}, ValueError, ["`attention_dropout`", "1.5"]),
    ({"initializer_range": -1.0}, ValueError, ["`initializer_range`", "-1"]),
    ({"max_position_embeddings": -1}, ValueError, ["`max_position_embeddings`", "-1"]),
    ({"hidden_act": "sillu"}, ValueError, ["`hidden_act`", "sillu"]),
    ({"rope_parameters": {"rope_type": "ntk", "rope_theta": 1e4}}, ValueError, ["`rope_type`", "ntk"]),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": -1.0}}, ValueError, ["`rope_theta`", "-1"]),
)

UNI_CONFIG = {
    "text_config": {**SMALL_CONFIG, "image_token_offset": 32},
    "vision_config": {"hidden_size": 16, "depth": 1, "num_heads": 2, "intermediate_size": 16, "image_size": 64},
    "vq_config": {"num_embeddings": 32, "embed_dim": 8, "latent_channels": 16},
    "image_token_id": 1,
    "image_start_token_id": 2,
    "image_end_token_id": 3,
    "begin_of_image_token_id": 4,
    "grid_token_ids": [1, 5, 6],
}
rows(
    "composite config",
    lambda s, **changed: LLaDAUniConfig(**{**UNI_CONFIG, **changed}),
    ({"text_config": 3}, TypeError, ["text_config", "3"]),
    ({"text_config": LLaDAUniConfig()}, TypeError, ["`text_config`", "LLaDA2MoeConfig", "LLaDAUniConfig"]),
    ({"vision_config": LLaDA2MoeConfig()}, TypeError, ["`vision_config`", "GlmImageVisionConfig"]),
    ({"vq_config": {"num_embeddings": 16, "latent_channels": 16}}, ValueError, ["`vq_config.num_embeddings` is 16"]),
    ({"vq_config": {"num_embeddings": 32, "latent_channels": 20}}, ValueError, ["latent_channels` (20)", "(16)"]),
    ({"image_token_id": -1}, ValueError, ["`image_token_id`", "-1"]),
    ({"image_token_id": 40}, ValueError, ["`image_token_id`", "40", "32"]),
    ({"image_token_id": 2}, ValueError, ["`image_token_id` (2)", "frame"]),
    ({"image_end_token_id": True}, TypeError, ["image_end_token_id", "True"]),
    ({"grid_token_ids": [1.5]}, TypeError, ["grid_token_ids", "1.5"]),
    ({"grid_token_ids": [5, 99]}, ValueError, ["`grid_token_ids`", "99"]),
    ({"grid_token_ids": [5, 5]}, ValueError, ["`grid_token_ids`", "differ"]),
)

SPRINT = {"cache_implementation": "sprint"}
SETTINGS_CASES = (
    ({"max_new_tokens": -1}, ValueError, ["`max_new_tokens`", "-1"]),
    ({"max_new_tokens": 2.5}, TypeError, ["`max_new_tokens`", "2.5"]),
    ({"max_new_tokens": True}, TypeError, ["`max_new_tokens`", "True"]),
    ({"max_length": 0}, ValueError, ["`max_length`", "0"]),
    ({"block_length": 0}, ValueError, ["`block_length`", "0"]),
    ({"block_length": 2.5}, TypeError, ["`block_length`", "2.5"]),
    ({"num_steps_per_block": -3}, ValueError, ["`num_steps_per_block`", "-3"]),
    ({"threshold": NAN}, ValueError, ["`threshold`", "nan"]),
    ({"threshold": 1.5}, ValueError, ["`threshold`", "at most 1", "1.5"]),
    ({"max_time": 0}, ValueError, ["`max_time`", "above 0"]),
    ({"stop_strings": ["a", ""]}, ValueError, ["`stop_strings`", "not empty"]),
    ({"stop_strings": 5}, TypeError, ["`stop_strings`", "5"]),
    ({"temperature": INF}, ValueError, ["`temperature`", "finite", "inf"]),
    ({"temperature": -1.0}, ValueError, ["`temperature`", "-1"]),
    ({"top_p": 0.0}, ValueError, ["`top_p`", "above 0"]),
    ({"top_p": NAN}, ValueError, ["`top_p`", "nan"]),
    ({"top_k": 0}, ValueError, ["`top_k`", "at least 1"]),
    ({"do_sample": "yes"}, TypeError, ["`do_sample`", "yes"]),
    ({"use_cache": 0}, TypeError, ["`use_cache`", "0"]),
    ({"cache_implementation": "paged"}, ValueError, ["`cache_implementation`", "'paged'"]),
    ({"cache_implementation": "sprint", "use_cache": False}, ValueError, ["sprint", "`use_cache=True`"]),
    ({"cache_implementation": "static"}, ValueError, ["`cache_implementation`", "'static'"]),
    ({"use_cuda_graphs": "yes"}, TypeError, ["`use_cuda_graphs`", "'yes'"]),
    ({"use_cuda_graphs": 1}, TypeError, ["`use_cuda_graphs`", "got 1"]),
    ({"use_cuda_graphs": True, "cache_implementation": "sprint"}, ValueError, ["`use_cuda_graphs=True`"]),
    ({"use_cuda_graphs": True, "use_cache": False}, ValueError, ["`use_cuda_graphs=True`"]),
    ({"cache_config": {"keep_ratio": 0.5}}, ValueError, ["`cache_config`", "sprint", "not set"]),
    ({**SPRINT, "use_cache": False}, ValueError, ["sprint", "`use_cache=True`"]),
    ({**SPRINT, "cache_config": "half"}, ValueError, ["`cache_config`", "dict", "half"]),
    ({**SPRINT, "cache_config": {"keep": 1}}, ValueError, ["`cache_config`", "`keep`"]),
    ({**SPRINT, "cache_config": {"keep_ratio": 0}}, ValueError, ["`keep_ratio` of `cache_config`", "above 0"]),
    ({**SPRINT, "cache_config": {"keep_ratio": True}}, TypeError, ["`keep_ratio` of `cache_config`", "True"]),
    ({**SPRINT, "cache_config": {"cache_warmup_steps": 0}}, ValueError, ["`cache_warmup_steps`", "0"]),
    ({**SPRINT, "cache_config": {"importance_alpha": NAN}}, ValueError, ["`importance_alpha`", "nan"]),
    ({**SPRINT, "cache_config": {"confidence": "high"}}, ValueError, ["`confidence`", "'high'"]),
    ({"mask_token_id": 2.5}, TypeError, ["`mask_token_id`", "2.5"]),
    ({"mask_token_id": [441]}, ValueError, ["`mask_token_id`", "one id"]),
    ({"eos_token_id": -1}, ValueError, ["`eos_token_id`", "-1"]),
    ({"eos_token_id": [True]}, TypeError, ["`eos_token_id`", "True"]),
    ({"pad_token_id": "x"}, TypeError, ["`pad_token_id`", "'x'"]),
    ({"max_new_token": 4}, TypeError, ["`max_new_token`", "max_new_tokens"]),
    ({"num_beams": 4}, TypeError, ["`num_beams`", "beams that grow from left to right"]),
)
rows("generation config", lambda s, **arguments: BlockDiffusionGenerationConfig(**arguments), *SETTINGS_CASES)

# ------------------------------------------------------------------------------------------------------ generation

SHORT = {"block_length": 4, "max_new_tokens": 4}
rows(
    "generate to a length",
    lambda s, **arguments: s.uni.generate(IDS, **arguments),
    ({"max_length": 2}, ValueError, ["`max_length` is 2", "3 tokens"]),
)
rows("generate", lambda s, **a: s.uni.generate(**{"input_ids": IDS, **SHORT, **a}), *SETTINGS_CASES[::5])
rows(
    "generate",
    lambda s, **arguments: s.uni.generate(**{"input_ids": IDS, **SHORT, **arguments}),
    ({"input_ids": None}, ValueError, ["`input_ids`", "`bos_token_id`"]),
    ({"input_ids": [[1, 2]]}, TypeError, ["`input_ids`", "list"]),
    ({"input_ids": "hello"}, TypeError, ["`input_ids`", "str"]),
    ({"input_ids": IDS.float()}, ValueError, ["`input_ids`", "float32"]),
    ({"input_ids": IDS.bool()}, ValueError, ["`input_ids`", "bool"]),
    ({"input_ids": IDS[0]}, ValueError, ["`input_ids`", "(3,)"]),
    ({"input_ids": IDS[:0]}, ValueError, ["`input_ids`", "batch is empty"]),
    ({"input_ids": IDS[:, :0]}, ValueError, ["Row 0", "`input_ids`", "empty"]),
    ({"input_ids": IDS + 768}, ValueError, ["`input_ids`", "vocabulary of 768"]),
    ({"input_ids": IDS - 2}, ValueError, ["`input_ids`", "vocabulary of 768"]),
    ({"input_ids": FULL}, ValueError, ["2048 tokens", "`max_new_tokens`", "`max_position_embeddings` (2048)"]),
    ({"input_ids": PLACEHOLDERS}, ValueError, ["`input_ids`", "6 places", "0 patches"]),
    ({"attention_mask": [[1, 1, 1]]}, TypeError, ["`attention_mask` of `input_ids`", "list"]),
    ({"attention_mask": torch.ones(1, 4)}, ValueError, ["`attention_mask` of `input_ids`", "(1, 3)", "(1, 4)"]),
    ({"attention_mask": torch.tensor([[1, 1, 0]])}, ValueError, ["`input_ids`", "padded on the left"]),
    ({"attention_mask": torch.tensor([[1, 0, 1]])}, ValueError, ["`input_ids`", "padded on the left"]),
    ({"attention_mask": torch.tensor([[0, 2, 1]])}, ValueError, ["`attention_mask`", "0 (padding) and 1 only"]),
    ({"attention_mask": torch.tensor([[NAN, 1, 1]])}, ValueError, ["`attention_mask`", "0 (padding) and 1 only"]),
    ({"attention_mask": torch.zeros(1, 3)}, ValueError, ["Row 0", "`input_ids`", "empty"]),
    (
        {"input_ids": TWO, "attention_mask": torch.tensor([[1, 1, 1], [0, 0, 0]])},
        ValueError,
        ["Row 1", "`input_ids`", "empty"],
    ),
    ({"max_new_tokens": 0}, ValueError, ["`max_new_tokens` is 0", "nothing to generate"]),
    ({"max_new_tokens": 2046}, ValueError, ["`max_new_tokens`", "2046", "at most 2045"]),
    ({"block_length": 4096}, ValueError, ["`block_length` (4096)", "`max_position_embeddings`"]),
    ({"mask_token_id": 768}, ValueError, ["`mask_token_id`", "768"]),
    ({"eos_token_id": [440, 9999]}, ValueError, ["`eos_token_id`", "9999"]),
    ({"pad_token_id": 768}, ValueError, ["`pad_token_id`", "768"]),
    ({"generation_config": GenerationConfig(num_beams=4)}, TypeError, ["`num_beams`", "left to right"]),
    ({"generation_config": GenerationConfig(guidance_scale=3.0)}, TypeError, ["`guidance_scale`", "image codes"]),
    ({"inputs": IDS}, ValueError, ["`inputs`", "`input_ids`"]),
    ({"stop_strings": "."}, ValueError, ["`stop_strings`", "`tokenizer`"]),
    ({"tokenizer": "emoji"}, TypeError, ["`tokenizer`", "str"]),
    ({"stopping_criteria": len}, TypeError, ["`stopping_criteria`", "list"]),
    ({"stopping_criteria": [5]}, TypeError, ["`stopping_criteria`", "[5]"]),
    ({"generation_config": {"max_new_tokens": 4}}, TypeError, ["`generation_config`", "dict"]),
    ({"generator": 7}, TypeError, ["`generator`", "int", "manual_seed(7)"]),
    ({"generator": [None]}, TypeError, ["`generator`", "NoneType"]),
    ({"generator": [torch.Generator()] * 2}, ValueError, ["`generator` has 2 generators for 1 rows"]),
    ({"streamer": print}, TypeError, ["`streamer`", "`put`"]),
    ({"streamer": TextStreamer(None), "input_ids": TWO}, ValueError, ["`streamer`", "one row", "2"]),
    ({"image_grid_thw": GRID_THW}, ValueError, ["`image_grid_thw`", "without `pixel_values`"]),
    ({"pixel_values": PATCHES}, ValueError, ["`pixel_values`", "`image_grid_thw`", "None"]),
    ({"pixel_values": PATCHES, "image_grid_thw": GRID_THW}, ValueError, ["0 places", "`pixel_values` has 6 patches"]),
    (
        {"input_ids": PLACEHOLDERS[:, :-2], "pixel_values": PATCHES, "image_grid_thw": GRID_THW},
        ValueError,
        ["5 places", "6 patches", "do not cut"],
    ),
)
ROWS += [
    (
        "pictures for a backbone",
        lambda s: s.backbone.generate(IDS, pixel_values=PATCHES, mask_token_id=441, **SHORT),
        ValueError,
        ["`pixel_values`", "no vision tower"],
    ),
    (
        "grids for a backbone",
        lambda s: s.backbone.generate(IDS, image_grid_thw=GRID_THW, mask_token_id=441, **SHORT),
        ValueError,
        ["`image_grid_thw`", "no vision tower"],
    ),
    ("no mask token", lambda s: s.text_only.generate(IDS), ValueError, ["`mask_token_id`", "not known"]),
    (
        "text-only checkpoint asked for a picture",
        lambda s: s.text_only.generate_image_codes(IDS, (2, 2), mask_token_id=5),
        ValueError,
        ["no image codes", "`image_token_offset` is None"],
    ),
]

COMPANIONS = {"negative_input_ids": IDS, "negative_image_input_ids": IDS, "image_guidance_scale": 1.0}
rows(
    "image codes",
    lambda s, **arguments: s.uni.generate_image_codes(**{"input_ids": IDS, "grid": (2, 2), **COMPANIONS, **arguments}),
    ({"grid": (0, 3)}, ValueError, ["`grid`", "(0, 3)"]),
    ({"grid": (1, 2, 3)}, ValueError, ["`grid`", "(1, 2, 3)"]),
    ({"grid": (2.0, 2.0)}, ValueError, ["`grid`", "2.0"]),
    ({"grid": (True, 2)}, ValueError, ["`grid`", "True"]),
    ({"grid": "22"}, ValueError, ["`grid`", "'22'"]),
    ({"grid": (64, 64)}, ValueError, ["`grid`", "4096 new ones", "`max_position_embeddings`"]),
    ({"guidance_scale": NAN}, ValueError, ["`guidance_scale`", "finite", "nan"]),
    ({"guidance_scale": INF}, ValueError, ["`guidance_scale`", "finite", "inf"]),
    ({"guidance_scale": -1.0}, ValueError, ["`guidance_scale`", "-1"]),
    ({"guidance_scale": "2"}, TypeError, ["`guidance_scale`", "'2'"]),
    ({"image_guidance_scale": None}, TypeError, ["`image_guidance_scale`", "None"]),
    ({"image_guidance_scale": NAN}, ValueError, ["`image_guidance_scale`", "nan"]),
    ({"guidance_rescale": 1.5}, ValueError, ["`guidance_rescale`", "at most 1", "1.5"]),
    ({"guidance_rescale": NAN}, ValueError, ["`guidance_rescale`", "nan"]),
    ({"negative_input_ids": None, "guidance_scale": 2.0}, ValueError, ["`negative_input_ids` are not given"]),
    ({"negative_image_input_ids": None}, ValueError, ["`image_guidance_scale`", "`negative_image_input_ids`"]),
    ({"negative_input_ids": TWO}, ValueError, ["`negative_input_ids` has 2 rows", "`input_ids` has 1"]),
    ({"negative_image_input_ids": TWO}, ValueError, ["`negative_image_input_ids` has 2 rows"]),
    ({"negative_input_ids": IDS.float()}, ValueError, ["`negative_input_ids`", "float32"]),
    ({"negative_input_ids": FULL}, ValueError, ["`grid`", "2048 tokens"]),
    ({"negative_input_ids": PLACEHOLDERS}, ValueError, ["`negative_input_ids`", "6 places"]),
    (
        {"negative_attention_mask": torch.ones(1, 4)},
        ValueError,
        ["`attention_mask` of `negative_input_ids`", "(1, 4)"],
    ),
    ({"negative_attention_mask": "x"}, TypeError, ["`attention_mask` of `negative_input_ids`", "str"]),
    ({"num_steps_per_block": 0}, ValueError, ["`num_steps_per_block`", "0"]),
    ({"image_codes": CODES}, ValueError, ["`image_codes` and `image_codes_mask`", "both or neither"]),
    ({"image_codes_mask": REGENERATE}, ValueError, ["`image_codes` and `image_codes_mask`", "both or neither"]),
    ({"image_codes": CODES[:, :3], "image_codes_mask": REGENERATE}, ValueError, ["`image_codes`", "(1, 4)", "(1, 3)"]),
    ({"image_codes": CODES + 256, "image_codes_mask": REGENERATE}, ValueError, ["`image_codes`", "255"]),
    ({"image_codes": CODES.float(), "image_codes_mask": REGENERATE}, ValueError, ["`image_codes`", "float32"]),
    ({"image_codes": [[0] * 4], "image_codes_mask": REGENERATE}, TypeError, ["`image_codes`", "list"]),
    ({"image_codes": CODES, "image_codes_mask": CODES}, ValueError, ["`image_codes_mask`", "torch.bool", "int64"]),
    ({"callback": "print"}, TypeError, ["`callback`", "str"]),
    ({"max_new_tokens": 5}, TypeError, ["`max_new_tokens`", "`grid`"]),
    ({"self_speculation": True}, TypeError, ["`self_speculation`", "no order"]),
    (
        {"guidance_ramp": (0.0, 1.0), "guidance_scale": 1.0, "image_guidance_scale": 0.0},
        ValueError,
        ["`guidance_ramp`", "`guidance_scale` is 1"],
    ),
    ({"guidance": 2.0}, TypeError, ["`guidance`"]),
    ({"generator": [torch.Generator()] * 2}, ValueError, ["`generator` has 2 generators"]),
)
ROWS.append(
    (
        "image codes: mask of an absent companion",
        lambda s: s.uni.generate_image_codes(IDS, (2, 2), negative_attention_mask=torch.ones(1, 3)),
        ValueError,
        ["`negative_input_ids`", "without"],
    )
)

rows(
    "interleaved",
    lambda s, **arguments: s.uni.generate_interleaved(
        **{"input_ids": IDS, "negative_input_ids": IDS, "uncondition_ids": IDS, **SHORT, **arguments}
    ),
    ({"input_ids": TWO}, ValueError, ["one prompt", "`input_ids` has 2 rows"]),
    ({"input_ids": FULL}, ValueError, ["`max_position_embeddings`", "at most 0"]),
    ({"max_images": 0}, ValueError, ["`max_images`", "0"]),
    ({"max_images": True}, TypeError, ["`max_images`", "True"]),
    ({"max_new_tokens": 0}, ValueError, ["`max_new_tokens`", "at least 1"]),
    ({"max_length": 20}, TypeError, ["`max_length`", "`max_new_tokens`"]),
    ({"stop_strings": "."}, ValueError, ["`generate_interleaved`", "`stop_strings`"]),
    ({"return_dict_in_generate": True}, ValueError, ["`generate_interleaved`", "`return_dict_in_generate`"]),
    ({"grid": (1, 2, 3)}, ValueError, ["`grid`", "(1, 2, 3)"]),
    ({"grid": (64, 1)}, ValueError, ["`grid`", "between 1 and 63"]),
    ({"grid": (63, 63)}, ValueError, ["`grid`", "3974 new ones"]),
    ({"guidance_scale": NAN}, ValueError, ["`guidance_scale`", "nan"]),
    ({"image_guidance_scale": "2"}, TypeError, ["`image_guidance_scale`", "'2'"]),
    ({"guidance_rescale": -1}, ValueError, ["`guidance_rescale`", "-1"]),
    ({"guidance_ramp": (0.0, 1.0), "guidance_scale": 1}, ValueError, ["`guidance_ramp`", "no guidance"]),
    ({"num_image_steps_per_block": 0}, ValueError, ["`num_image_steps_per_block`", "0"]),
    ({"negative_input_ids": None, "guidance_scale": 2.0}, ValueError, ["needs `negative_input_ids`"]),
    ({"negative_input_ids": TWO}, ValueError, ["`negative_input_ids`", "one row"]),
    ({"uncondition_ids": None}, ValueError, ["needs `uncondition_ids`"]),
    ({"uncondition_ids": IDS[0]}, ValueError, ["`uncondition_ids`", "(3,)"]),
    ({"generator": 3}, TypeError, ["`generator`", "int"]),
)

# --------------------------------------------------------------------------------------------- pictures and forward

rows(
    "get_image_codes",
    lambda s, **arguments: s.uni.get_image_codes(**{"pixel_values": PATCHES, "image_grid_thw": GRID_THW, **arguments}),
    ({"pixel_values": PATCHES.tolist()}, TypeError, ["`pixel_values`", "list"]),
    ({"pixel_values": PATCHES[:, :700]}, ValueError, ["`pixel_values`", "(6, 768)", "(6, 700)"]),
    ({"pixel_values": PATCHES[:5]}, ValueError, ["`pixel_values` holds 5", "`image_grid_thw` speaks of 6"]),
    ({"pixel_values": PATCHES.long()}, ValueError, ["`pixel_values`", "floating-point", "int64"]),
    ({"pixel_values": PATCHES + NAN}, ValueError, ["`pixel_values`", "finite"]),
    ({"pixel_values": PATCHES[None]}, ValueError, ["`pixel_values`", "(1, 6, 768)"]),
    ({"image_grid_thw": None}, ValueError, ["`image_grid_thw`", "None"]),
    ({"image_grid_thw": [[1, 2, 3]]}, TypeError, ["`image_grid_thw`", "list"]),
    ({"image_grid_thw": GRID_THW.float()}, ValueError, ["`image_grid_thw`", "float32"]),
    ({"image_grid_thw": GRID_THW[0]}, ValueError, ["`image_grid_thw`", "(images, 3)", "(3,)"]),
    ({"image_grid_thw": torch.tensor([[2, 1, 3]])}, ValueError, ["`image_grid_thw`", "[[2, 1, 3]]"]),
    ({"image_grid_thw": torch.tensor([[1, -2, -3]])}, ValueError, ["`image_grid_thw`", "-2"]),
)
rows(
    "forward",
    lambda s, **arguments: s.uni(**arguments),
    ({}, ValueError, ["exactly one", "`input_ids`", "`inputs_embeds`"]),
    ({"input_ids": IDS, "inputs_embeds": torch.zeros(1, 3, 64)}, ValueError, ["exactly one", "`inputs_embeds`"]),
    ({"input_ids": IDS.float()}, ValueError, ["`input_ids`", "float32"]),
    ({"input_ids": IDS[0]}, ValueError, ["`input_ids`", "(3,)"]),
    ({"inputs_embeds": torch.zeros(1, 3, 65)}, ValueError, ["`inputs_embeds`", "(1, 3, 64)"]),
    ({"input_ids": IDS, "attention_mask": torch.ones(1, 5)}, ValueError, ["`attention_mask`", "(1, 3)", "(1, 5)"]),
    ({"input_ids": IDS, "attention_mask": [[1, 1, 1]]}, TypeError, ["`attention_mask`", "list"]),
    ({"input_ids": IDS, "position_ids": torch.zeros(1, 5)}, ValueError, ["`position_ids`", "(1, 3)"]),
    ({"input_ids": IDS, "past_key_values": ((1, 2),)}, TypeError, ["`past_key_values`", "tuple"]),
    ({"input_ids": IDS, "block_length": 2.5}, TypeError, ["`block_length`", "2.5"]),
    ({"input_ids": IDS, "positions_to_keep": [[1]]}, TypeError, ["`positions_to_keep`", "list"]),
    ({"input_ids": IDS, "positions_to_keep": IDS.float()}, ValueError, ["`positions_to_keep`", "float32"]),
    ({"input_ids": IDS, "positions_to_keep": TWO}, ValueError, ["`positions_to_keep`", "(1, 3)", "(2, 3)"]),
    ({"input_ids": IDS, "labels": IDS.float()}, ValueError, ["`labels`", "float32"]),
    ({"input_ids": IDS, "labels": TWO}, ValueError, ["`labels`", "(1, 3)", "(2, 3)"]),
    (
        {"inputs_embeds": torch.zeros(1, 3, 64), "pixel_values": PATCHES, "image_grid_thw": GRID_THW},
        ValueError,
        ["`pixel_values`", "`input_ids`", "`inputs_embeds`"],
    ),
)

# --------------------------------------------------------------------------------------------------------- pipeline

rows(
    "chat",
    lambda s, **arguments: s.pipe.chat([{"role": "user", "content": "hello"}], **arguments),
    ({"max_new_tokens": -2}, ValueError, ["`max_new_tokens`", "-2"]),
    ({"max_tokens": 8}, TypeError, ["`max_tokens`"]),
    ({"threshold": 2}, ValueError, ["`threshold`", "2"]),
)
rows(
    "pipeline",
    lambda s, **arguments: s.pipe(**{"prompt": "a cat", "height": 64, "width": 64, **arguments}),
    ({"prompt": ""}, ValueError, ["`prompt`", "empty"]),
    ({"height": 100}, ValueError, ["`height`", "multiple of 32", "100"]),
    ({"guidance_scale": NAN}, ValueError, ["`guidance_scale`", "nan"]),
    ({"generation_kwargs": {"block_length": 4096}}, ValueError, ["`block_length` (4096)"]),
    ({"generation_kwargs": {"max_new_tokens": 5}}, TypeError, ["`max_new_tokens`", "`height`"]),
)
rows(
    "decode_codes",
    lambda s, **arguments: s.pipe.decode_codes(**{"codes": torch.zeros(1, 2, 2, dtype=torch.long), **arguments}),
    ({"codes": torch.full((1, 2, 2), 256)}, ValueError, ["`codes`", "0..255", "256"]),
    ({"num_inference_steps": -1}, ValueError, ["`num_inference_steps`", "-1"]),
)
rows(
    "interleave",
    lambda s, **arguments: s.pipe.interleave(**{"prompt": "a story", **arguments}),
    ({"max_images": 0}, ValueError, ["`max_images`", "0"]),
    ({"generation_kwargs": {"max_new_tokens": 0}}, ValueError, ["`max_new_tokens`", "at least 1"]),
)


# ------------------------------------------------------------------------------------------- folders, read and written


def edit_json(file: str, **changes: Any) -> Callable[[Path], None]:
    """Keys may name a place in depth: `text_config__hidden_size`."""

    def spoil(folder: Path) -> None:
        path = folder / file
        content = json.loads(path.read_text())
        for key, value in changes.items():
            *parents, last = key.split("__")
            inner = content
            for parent in parents:
                inner = inner[parent]
            inner[last] = value
        path.write_text(json.dumps(content))

    return spoil


def edit_tensors(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        for path in folder.glob("*.safetensors"):
            tensors = load_file(path)
            change(tensors)
            save_file(tensors, path, metadata={"format": "pt"})

    return spoil


def cut(end: str, length: int) -> Callable[[dict[str, torch.Tensor]], None]:
    """The first rows only of the tensors whose names end so."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors.update({name: tensor[:length].clone() for name, tensor in tensors.items() if name.endswith(end)})

    return change


def write(file: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / file).write_text(text)


def truncate(file: str, size: int) -> Callable[[Path], None]:
    return lambda folder: os.truncate(folder / file, size)


def remove(file: str) -> Callable[[Path], None]:
    return lambda folder: (folder / file).unlink()


def drop_expert(tensors: dict[str, torch.Tensor]) -> None:
    for name in [name for name in tensors if "layers.1.mlp.experts.3.up_proj" in name]:
        del tensors[name]


def broken(part: str, load: Callable[[Path], Any], *cases: tuple[str, Callable, type[Exception], list[str]]) -> None:
    """A row for each case: a copy of a part of the converted folder, spoilt, then loaded."""

    def call(settings: Settings, spoil: Callable[[Path], None]) -> None:
        shutil.copytree(settings.converted / part, settings.folder / "spoilt")
        spoil(settings.folder / "spoilt")
        settings.before = listing(settings.folder)
        load(settings.folder / "spoilt")

    for name, spoil, error, words in cases:
        ROWS.append((f"load {part or 'pipeline'}: {name}", lambda s, spoil=spoil: call(s, spoil), error, words))


def listing(folder: Path) -> list[tuple[Path, int]]:
    return sorted((path, path.stat().st_size) for path in folder.rglob("*"))


broken(
    "model",
    AutoModelForImageTextToText.from_pretrained,
    ("truncated shard", truncate(SHARD, 1000), OSError, ["spoilt", "truncated or damaged"]),
    ("empty shard", truncate(SHARD, 0), OSError, ["spoilt", "truncated or damaged"]),
    ("missing shard", remove(SHARD), OSError, [SHARD]),
    ("missing index", remove("model.safetensors.index.json"), OSError, ["no file named model.safetensors"]),
    ("empty index", write("model.safetensors.index.json", "{}"), ValueError, ["`weight_map`"]),
    ("broken config", write("config.json", "{"), OSError, ["config.json", "not a valid JSON"]),
    ("config without a type", write("config.json", "{}"), ValueError, ["`model_type`"]),
    ("codebook config", edit_json("config.json", vq_config__num_embeddings=128), ValueError, ["128", "256"]),
    (
        "codebook tensor",
        edit_tensors(cut("quantize.embedding.weight", 100)),
        RuntimeError,
        ["vqmodel.quantize.embedding.weight", "ckpt: torch.Size([100, 32]) vs model:torch.Size([256, 32])"],
    ),
    (
        "hidden size",
        edit_json("config.json", text_config__hidden_size=32),
        RuntimeError,
        ["lm_head.weight", "ckpt: torch.Size([768, 64]) vs model:torch.Size([768, 32])"],
    ),
    (
        "misshapen expert",
        edit_tensors(cut("experts.3.up_proj.weight", 4)),
        RuntimeError,
        ["mlp.experts.gate_up_proj", "conversion"],
    ),
    ("missing expert", edit_tensors(drop_expert), RuntimeError, ["mlp.experts.gate_up_proj", "conversion"]),
    ("bad groups", edit_json("config.json", text_config__n_group=5), ValueError, ["`n_group` (5)"]),
    ("generation typo", edit_json("generation_config.json", blok=3), TypeError, ["`blok`"]),
    ("generation range", edit_json("generation_config.json", threshold=3), ValueError, ["`threshold`", "3"]),
    ("generation broken", write("generation_config.json", "{"), OSError, ["generation_config.json", "JSON"]),
)
broken(
    "model",
    LLaDAUniForConditionalGeneration.from_pretrained,
    ("no config", remove("config.json"), OSError, ["no config.json"]),
    ("config of another", edit_json("config.json", model_type="bert"), ValueError, ["`model_type` 'bert'"]),
)
broken(
    "semantic_embedder",
    LLaDAUniSemanticEmbedder.from_pretrained,
    (
        "codebook size",
        edit_json("config.json", codebook_size=100),
        ValueError,
        ["prior_token_embedding", "100", "256"],
    ),
    ("truncated", truncate("diffusion_pytorch_model.safetensors", 100), OSError, ["diffusion_pytorch_model"]),
)
broken(
    "",
    DiffusionPipeline.from_pretrained,
    ("no index", remove("model_index.json"), OSError, ["model_index.json"]),
    ("no decoder weights", lambda folder: shutil.rmtree(folder / "vae"), OSError, ["diffusion_pytorch_model"]),
    ("truncated model", truncate(f"model/{SHARD}", 1000), OSError, ["model", "truncated or damaged"]),
    (
        "unknown class",
        edit_json("model_index.json", semantic_embedder=["diffusers_llada_uni", "Nope"]),
        ValueError,
        ["Nope"],
    ),
)
rows(
    "from_pretrained",
    lambda s, **arguments: AutoModelForCausalLM.from_pretrained(s.released, **arguments),
    ({"generation_config": {"a": 1}}, TypeError, ["`generation_config`", "BlockDiffusionGenerationConfig", "dict"]),
    ({"attn_implementation": "fast"}, ValueError, ["attn_implementation", "fast"]),
    ({"experts_implementation": "fast"}, ValueError, ["experts_implementation", "fast"]),
    ({"blok_length": 3}, TypeError, ["blok_length"]),
)
ROWS += [
    (
        "composite from the released folder",
        lambda s: LLaDAUniForConditionalGeneration.from_pretrained(s.released),
        ValueError,
        ["`model_type` 'llada2_moe'", "'llada_uni'"],
    ),
    (
        "save a generation config out of range",
        lambda s: spoilt_generation_config().save_pretrained(s.folder / "out"),
        ValueError,
        ["threshold"],
    ),
]


def spoilt_generation_config() -> BlockDiffusionGenerationConfig:
    config = BlockDiffusionGenerationConfig()
    config.threshold = 7
    return config


def convert_spoilt(settings: Settings, spoil: Callable[[Path], None], back: bool = False) -> None:
    source = settings.folder / "source"
    shutil.copytree(settings.converted if back else settings.released, source)
    spoil(source)
    settings.before = listing(settings.folder)
    convert = convert_to_released if back else convert_to_diffusers
    convert(source, settings.folder / "out", progress=False)


ROWS += [
    (
        "convert: truncated shard",
        lambda s: convert_spoilt(s, truncate("model-00002-of-00002.safetensors", 1000)),
        ValueError,
        ["model-00002-of-00002.safetensors", "truncated"],
    ),
    (
        "convert: dtype",
        lambda s: convert_to_diffusers(s.released, s.folder / "out", dtype="float12"),
        TypeError,
        ["dtype", "float12"],
    ),
    (
        "convert back: truncated shard",
        lambda s: convert_spoilt(s, truncate(f"model/{SHARD}", 1000), back=True),
        ValueError,
        [SHARD, "truncated"],
    ),
    (
        "convert back: no embedder",
        lambda s: convert_spoilt(s, lambda folder: shutil.rmtree(folder / "semantic_embedder"), back=True),
        OSError,
        ["semantic_embedder"],
    ),
]


@pytest.mark.parametrize("call, error, words", [row[1:] for row in ROWS], ids=[row[0] for row in ROWS])
def test_bad_input(settings, tmp_path, monkeypatch, caplog, call, error, words):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)  # to `caplog`
    settings = copy.copy(settings)
    settings.folder, settings.before = tmp_path, []
    with pytest.raises(error) as caught:
        call(settings)
    # Of tensors that do not fit, transformers raises "look at the above report", which it logs.
    said = str(caught.value) + (caplog.text if error is RuntimeError else "")
    for word in words:
        assert word in said
    assert listing(tmp_path) == settings.before, "something was left half written"
