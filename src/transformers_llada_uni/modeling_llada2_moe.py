"""The LLaDA2 backbone: a mixture-of-experts transformer with block-causal attention that fills in masked tokens."""

import functools
import os
from typing import Any, Self

import torch
from torch import nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.modeling_utils import PreTrainedModel, slice_logits_to_keep
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeExperts, Glm4MoeRotaryEmbedding
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .attention import LLaDA2MoeAttention, LLaDA2MoeRMSNorm, take_positions
from .checkpoint_stub import CodeStaysHere
from .configuration_llada2_moe import LLaDA2MoeConfig
from .exact_buffers import ExactBuffers
from .generation.block_diffusion import BlockDiffusionGenerationMixin
from .generation.configuration import BlockDiffusionGenerationConfig, check_generation_config
from .hub_card import PushedWithCard
from .input_checks import check_forward_inputs, check_labels
from .kernels import (
    HAS_TRITON,
    can_fuse,
    experts_triton,  # noqa: F401 registers `experts_implementation="triton"`
)
from .kernels.experts_fused_gather import fused_gather_experts_forward
from .loading import released_layout  # noqa: F401  tells transformers how the release names and splits weights
from .loading.damaged_weights import named_when_damaged
from .loading.quantization_groupwise import METHOD  # noqa: F401  makes the method known to transformers
from .loading.quantization_torchao import compute_torchao_experts_eagerly
from .masking_block_causal import PrefixMask, create_block_causal_mask
from .mixture_of_experts import LLaDA2MoeMLP, LLaDA2MoeSparseMoeBlock, LLaDA2MoeTopkRouter


ALL_EXPERTS_FUNCTIONS.register("fused_gather", fused_gather_experts_forward)


class LLaDA2MoeDecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: LLaDA2MoeConfig, layer_idx: int):
        super().__init__()
        self.attention = LLaDA2MoeAttention(config, layer_idx)
        is_dense = layer_idx < config.first_k_dense_replace
        self.mlp = LLaDA2MoeMLP(config) if is_dense else LLaDA2MoeSparseMoeBlock(config)
        self.input_layernorm = LLaDA2MoeRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LLaDA2MoeRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | BlockMask | PrefixMask | None = None,
        past_key_values: Cache | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        positions_to_keep: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        residual = hidden_states if positions_to_keep is None else take_positions(hidden_states, positions_to_keep)
        hidden_states, _ = self.attention(
            hidden_states=self.input_layernorm(hidden_states),
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_embeddings=position_embeddings,
            positions_to_keep=positions_to_keep,
            **kwargs,
        )
        hidden_states, residual = self.post_attention_layernorm(hidden_states, residual)
        return residual + self.mlp(hidden_states)


class LLaDA2MoePreTrainedModel(PushedWithCard, CodeStaysHere, PreTrainedModel):  # type: ignore[misc]  # its arguments pass on
    config: LLaDA2MoeConfig
    base_model_prefix = "model"
    _input_embed_layer = "word_embeddings"
    generation_config_class = BlockDiffusionGenerationConfig
    supports_gradient_checkpointing = True
    _no_split_modules = ["LLaDA2MoeDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {
        "hidden_states": LLaDA2MoeDecoderLayer,
        "attentions": LLaDA2MoeAttention,
        "router_logits": OutputRecorder(LLaDA2MoeTopkRouter, index=0),
    }
    _keep_in_fp32_modules_strict = ["expert_bias"]

    # diffusers reads in the signature what it may pass on.
    @functools.wraps(PreTrainedModel.save_pretrained)
    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]  # mypy: names are lost
        return super().save_pretrained(*args, **kwargs)

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        # transformers looks for the decorator in the source of this file; ours is on the class that we import.
        return True

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        if requested_experts is None and torch.cuda.is_available() and HAS_TRITON:
            requested_experts = "triton"
        return super().get_correct_experts_implementation(requested_experts)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike | None, *model_args: Any, **kwargs: Any
    ) -> Self:
        """
        As any model's; `output_loading_info=True` gives `(model, info)`.

        Raises:
            OSError: if a file is missing or damaged. RuntimeError: if tensors do not fit the configuration; the report
                that is logged before names them. TypeError: for a `generation_config` that is not a
                [`BlockDiffusionGenerationConfig`].
        """
        check_generation_config(kwargs.get("generation_config"))
        with named_when_damaged(pretrained_model_name_or_path):
            loaded = super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)
        compute_torchao_experts_eagerly(loaded[0] if isinstance(loaded, tuple) else loaded)
        return loaded

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        """
        As any model's, for a text-only checkpoint.

        Raises:
            ValueError: if the checkpoint has image codes: these are the last ids of its vocabulary, as many as the
                codebook has entries, so that it can neither grow nor shrink.
        """
        text_config = self.config.get_text_config()
        size = text_config.vocab_size if new_num_tokens is None else new_num_tokens
        size += -size % (pad_to_multiple_of or 1)
        if text_config.image_token_offset is not None and size != text_config.vocab_size:
            raise ValueError(
                f"`new_num_tokens` or `pad_to_multiple_of` asks for {size} embeddings, but the last ids of the "
                f"vocabulary of {text_config.vocab_size} are the image codes, from {text_config.image_token_offset} "
                "on: it cannot be resized. New words may take ids below them that the tokenizer does not use."
            )
        return super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)

    def _predict(
        self,
        outputs: MoeModelOutputWithPast,
        labels: torch.Tensor | None,
        logits_to_keep: int | torch.Tensor,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MoeCausalLMOutputWithPast:
        """Of a model with an `lm_head`: logits of what the backbone gives, and the loss where there are labels."""
        hidden_states: Any = outputs.last_hidden_state  # upstream's type allows for None
        logits = self.lm_head(slice_logits_to_keep(hidden_states, logits_to_keep))
        loss = None
        if labels is not None:
            vocab_size = self.config.get_text_config().vocab_size
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=vocab_size, **kwargs)
        return MoeCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
        )

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.get_text_config().initializer_range
        if isinstance(module, LLaDA2MoeTopkRouter):
            init.normal_(module.weight, mean=0.0, std=std)
            init.zeros_(module.expert_bias)
        elif isinstance(module, Glm4MoeExperts):
            init.normal_(module.gate_up_proj, mean=0.0, std=std)
            init.normal_(module.down_proj, mean=0.0, std=std)


class LLaDA2MoeRotaryEmbedding(ExactBuffers, Glm4MoeRotaryEmbedding):
    """Upstream's, whose frequencies keep their digits."""


class LLaDA2MoeModel(LLaDA2MoePreTrainedModel):
    """The backbone without a head: ids to hidden states."""

    def __init__(self, config: LLaDA2MoeConfig):
        super().__init__(config)
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            [LLaDA2MoeDecoderLayer(config, layer_idx) for layer_idx in range(config.num_hidden_layers)]
        )
        self.norm = LLaDA2MoeRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LLaDA2MoeRotaryEmbedding(config)  # type: ignore[arg-type]  # it reads what both have
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(  # type: ignore[misc]  # TransformersKwargs too names `position_ids`
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | BlockMask | PrefixMask | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        block_length: int | None = None,
        positions_to_keep: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MoeModelOutputWithPast:
        r"""
        Args:
            input_ids: `(batch, length)`.
            attention_mask: `(batch, past + length)`, 0 for padding; or a ready 4-D mask or `BlockMask`; or a
                [`PrefixMask`], with a cache whose buffers are static.
            position_ids: `(batch, length)`. Default: counted from each row's first token that is not padding. Where
                they start again, without a mask and a cache, another document begins that does not see the others.
            past_key_values: A cache that ends at a block boundary.
            inputs_embeds: `(batch, length, hidden_size)` in place of `input_ids`.
            use_cache: Whether to make a cache where none is given.
            block_length: Tokens of an attention block. Default: `config.block_length`.
            positions_to_keep: `(batch, kept)`, the positions of each row that hidden states are wanted of, counted
                from the first of this call. The cache still takes in all positions; of those not kept the last layer
                computes nothing beyond attention's inputs. Default: all.

        Returns:
            `last_hidden_state` `(batch, length or kept, hidden_size)`, after the final norm.

        Raises:
            ValueError, TypeError: unless exactly one of `input_ids` and `inputs_embeds` is given; for a shape that
                does not fit the others, or a `block_length` below 1.
        """
        block_length = self.config.block_length if block_length is None else block_length
        if past_key_values is not None and not isinstance(past_key_values, Cache):
            raise TypeError(f"`past_key_values` must be a Cache, got {type(past_key_values).__name__}.")
        start = past_key_values.get_seq_length() if past_key_values is not None else 0
        plain_mask = None if isinstance(attention_mask, PrefixMask) else attention_mask
        hidden_size = self.config.hidden_size
        check_forward_inputs(
            input_ids, inputs_embeds, plain_mask, position_ids, block_length, hidden_size, start, positions_to_keep
        )
        if inputs_embeds is None:
            inputs_embeds = self.word_embeddings(input_ids)
        length = inputs_embeds.shape[1]
        given_positions = position_ids
        if position_ids is None:
            position_ids = torch.arange(length, device=inputs_embeds.device)[None] + start
            if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2:
                padding = attention_mask.to(torch.long).argmax(dim=-1, keepdim=True)
                position_ids = (position_ids - padding).clamp(min=0)

        if isinstance(attention_mask, PrefixMask) and not self._attends_by_kernel(inputs_embeds):
            if past_key_values is None:
                raise ValueError("A `PrefixMask` as `attention_mask` needs `past_key_values` with static buffers.")
            buffer_length, _ = past_key_values.get_mask_sizes(length, 0)
            attention_mask = attention_mask.dense(self.config, length, buffer_length, inputs_embeds.dtype)
        attention_mask = create_block_causal_mask(
            self.config, inputs_embeds, attention_mask, past_key_values, block_length, position_ids=given_positions
        )
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        position_embeddings = self.rotary_emb(inputs_embeds, position_ids)
        hidden_states = inputs_embeds
        # Only masks with a row per query can be narrowed: with those of flash attention (2-D) and flex attention the
        # last layer computes all positions.
        is_narrow = not isinstance(attention_mask, BlockMask) and getattr(attention_mask, "ndim", 4) == 4
        for layer_idx, layer in enumerate(self.layers):
            is_last = layer_idx + 1 == len(self.layers)
            hidden_states = layer(
                hidden_states,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                position_embeddings=position_embeddings,
                positions_to_keep=positions_to_keep if is_last and is_narrow else None,
                **kwargs,
            )
        if positions_to_keep is not None and not is_narrow:
            hidden_states = take_positions(hidden_states, positions_to_keep.to(hidden_states.device))
        return MoeModelOutputWithPast(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)

    def _attends_by_kernel(self, inputs_embeds: torch.Tensor) -> bool:
        """Whether Triton's kernel takes the place of sdpa under a [`PrefixMask`]."""
        config = self.config
        if config._attn_implementation != "sdpa" or not can_fuse(inputs_embeds, self.word_embeddings.weight):
            return False
        from .kernels.prefix_attention import can_attend_to_prefix

        num_heads, num_key_value_heads = config.num_attention_heads, config.num_key_value_heads
        head_dim = config.head_dim or config.hidden_size // num_heads
        return can_attend_to_prefix(inputs_embeds.dtype, head_dim, num_heads, num_key_value_heads)


class LLaDA2MoeForBlockDiffusion(  # type: ignore[misc]  # the mixin serves both configurations
    LLaDA2MoePreTrainedModel, BlockDiffusionGenerationMixin
):
    """The backbone with its head: predicts the token under every mask. Loads the released layout as it is."""

    _tied_weights_keys = {"lm_head.weight": "model.word_embeddings.weight"}
    _keys_to_ignore_on_load_unexpected = [r"^model\.(visual|vqmodel)\."]  # of a checkpoint with a vision tower
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}  # type: ignore[dict-item]  # as upstream's own
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: LLaDA2MoeConfig):
        super().__init__(config)
        self.model = LLaDA2MoeModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.loss_type = "ForMaskedLM"
        self.post_init()

    @can_return_tuple
    @merge_with_config_defaults
    def forward(  # type: ignore[misc]  # TransformersKwargs too names `position_ids`
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        block_length: int | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MoeCausalLMOutputWithPast:
        r"""
        See [`LLaDA2MoeModel.forward`] for what is not described here.

        Args:
            labels: `(batch, length)`, the clean ids where the loss is taken and -100 elsewhere. Position i predicts
                token i: nothing is shifted.
            logits_to_keep: Positions to compute logits for: the last n (0: all), or their indices.

        Returns:
            `logits` `(batch, positions, vocab_size)` and, with `labels`, the mean cross-entropy as `loss`.
        """
        check_labels(labels, input_ids if inputs_embeds is None else inputs_embeds, logits_to_keep)
        outputs: MoeModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            block_length=block_length,
            **kwargs,
        )
        return self._predict(outputs, labels, logits_to_keep, **kwargs)
