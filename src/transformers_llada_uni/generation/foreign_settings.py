"""What transformers' `generate` takes and block diffusion has no use for: refused by name, with the reason."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from transformers import GenerationConfig


# Of each reason the names, with the value, besides None and False, that asks for nothing.
_REASONS: dict[str, dict[str, Any]] = {
    "all tokens of a block are predicted at once, so there are no beams that grow from left to right": {
        "num_beams": 1,
        "num_beam_groups": 1,
        "early_stopping": False,
        "length_penalty": 1.0,
        "diversity_penalty": 0.0,
        "constraints": None,
        "force_words_ids": None,
        "low_memory": None,
    },
    "all tokens of a block are predicted at once, so nobody needs to guess them beforehand": {
        "assistant_model": None,
        "assistant_tokenizer": None,
        "is_assistant": False,
        "num_assistant_tokens": 20,
        "num_assistant_tokens_schedule": "constant",
        "assistant_confidence_threshold": 0.4,
        "assistant_early_exit": None,
        "assistant_ensemble_weight": None,
        "assistant_lookbehind": 10,
        "target_lookbehind": 10,
        "prompt_lookup_num_tokens": None,
        "max_matching_ngram_size": None,
        "speculation_type": None,
        "use_mtp": False,
    },
    "processors of logits take one token at a time, to whose left all is known; in a block it is not": {
        "logits_processor": None,
        "prefix_allowed_tokens_fn": None,
        "repetition_penalty": 1.0,
        "encoder_repetition_penalty": 1.0,
        "no_repeat_ngram_size": 0,
        "encoder_no_repeat_ngram_size": 0,
        "bad_words_ids": None,
        "sequence_bias": None,
        "suppress_tokens": None,
        "begin_suppress_tokens": None,
        "forced_bos_token_id": None,
        "forced_eos_token_id": None,
        "min_length": 0,
        "min_new_tokens": 0,
        "exponential_decay_length_penalty": None,
        "watermarking_config": None,
        "token_healing": False,
        "penalty_alpha": None,
        "dola_layers": None,
    },
    "what is sampled from is shaped by `temperature`, `top_k` and `top_p` alone": {
        "min_p": None,
        "top_h": None,
        "typical_p": 1.0,
        "epsilon_cutoff": 0.0,
        "eta_cutoff": 0.0,
        "renormalize_logits": False,
        "remove_invalid_values": False,
    },
    "a token is predicted in several steps, so there is no one score or hidden state of it; call the model itself": {
        "output_scores": False,
        "output_logits": False,
        "output_attentions": False,
        "output_hidden_states": False,
        "logits_to_keep": None,
    },
    "text is not guided; of image codes it is `negative_input_ids` in `generate_image_codes`": {
        "negative_prompt_ids": None,
        "negative_prompt_attention_mask": None,
    },
    "the loop of block diffusion is the model's own; write one around `model(...)` instead": {
        "custom_generate": None,
        "trust_remote_code": None,
    },
    "each process ends by itself; gather the weights before it, or shard them with `tp_plan`": {"synced_gpus": False},
    "`generate` makes its cache, and says where the tokens are, by itself": {
        "past_key_values": None,
        "inputs_embeds": None,
        "position_ids": None,
        "cache_position": None,
        "token_type_ids": None,
        "mm_token_type_ids": None,
        "max_cache_len": None,
        "prefill_chunk_size": None,
        "return_legacy_cache": None,
        "continuous_batching_config": None,
    },
    "there is no encoder": {"encoder_outputs": None, "decoder_input_ids": None, "decoder_start_token_id": None},
    "steps are recorded (`use_cuda_graphs`); `model.get_decoder().compile()` compiles them besides": {
        "compile_config": None,
        "disable_compile": True,
    },
    "`generate` gives text; pictures come from the pipeline of diffusers": {"generation_mode": "text"},
    "a call goes by the model's settings wherever it says none": {"use_model_defaults": True},
}
REASONS = {name: reason for reason, names in _REASONS.items() for name in names}
_ASKS_FOR_NOTHING = {name: value for names in _REASONS.values() for name, value in names.items()}


def without_neutral(settings: Mapping[str, Any]) -> dict[str, Any]:
    """
    The settings of a call without those that block diffusion does not have and that ask for nothing, such as
    `num_beams=1`.

    Raises:
        TypeError: for one that asks for something; the message names it and says why it cannot be had.
    """
    kept = {name: value for name, value in settings.items() if name not in REASONS or not _is_neutral(name, value)}
    refuse(kept)
    return kept


def refuse(names: Iterable[str]) -> None:
    """Raises TypeError for the first name that block diffusion is known not to have, with the reason."""
    for name in names:
        if name in REASONS:
            raise TypeError(f"`{name}` is not supported by block diffusion: {REASONS[name]}.")


def settings_of(config: GenerationConfig) -> dict[str, Any]:
    """What a configuration of transformers sets; what it leaves open is `None` there."""
    return {
        name: value
        for name, value in vars(config).items()
        if value is not None and not name.startswith("_") and name != "transformers_version"
    }


def _is_neutral(name: str, value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return name.endswith("token_type_ids") and not bool(value.any())  # all of one kind
    return value is None or value is False or value == _ASKS_FOR_NOTHING[name] or value == []
