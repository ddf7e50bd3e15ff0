"""The LLaDA2 backbone: a mixture-of-experts transformer with block-causal attention that fills in masked tokens."""

import os
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel, slice_logits_to_keep
from transformers.models.glm4_moe.modeling_glm4_moe import (
    Glm4MoeExperts,
    Glm4MoeMLP,
    Glm4MoeRMSNorm,
    Glm4MoeRotaryEmbedding,
    apply_rotary_pos_emb,
    eager_attention_forward,
)
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .attention_shared_key_value import can_share_key_value_heads, shared_key_value_attention_forward
from .configuration_llada2_moe import LLaDA2MoeConfig
from .generation.block_diffusion import BlockDiffusionGenerationMixin
from .generation.configuration import BlockDiffusionGenerationConfig, check_generation_config
from .input_checks import check_columns_to_keep, check_forward_inputs, check_labels
from .kernels import (
    can_fuse,
    experts_triton,  # noqa: F401 registers `experts_implementation="triton"`
    has_triton,
)
from .kernels.experts_fused_gather import fused_gather_experts_forward
from .loading.quantization_groupwise import METHOD  # noqa: F401  makes the method known to transformers
from .loading.quantization_torchao import compute_torchao_experts_eagerly
from .masking_block_causal import PrefixMask, create_block_causal_mask
from .weight_hooks import is_hooked


# The release stores every expert by itself; in memory the experts of a layer are two fused tensors.
register_checkpoint_conversion_mapping(
    LLaDA2MoeConfig.model_type,
    [
        WeightConverter(
            source_patterns=["mlp.experts.*.gate_proj.weight", "mlp.experts.*.up_proj.weight"],
            target_patterns="mlp.experts.gate_up_proj",
            operations=[MergeModulelist(dim=0), Concatenate(dim=1)],
        ),
        WeightConverter(
            source_patterns="mlp.experts.*.down_proj.weight",
            target_patterns="mlp.experts.down_proj",
            operations=[MergeModulelist(dim=0)],
        ),
    ],
    overwrite=True,
)

ALL_EXPERTS_FUNCTIONS.register("fused_gather", fused_gather_experts_forward)


def take_columns(states: torch.Tensor, columns: torch.LongTensor) -> torch.Tensor:
    """
    Of states `(batch, ..., length, width)`, where the batch may be 1 for all rows, the columns of each row,
    `(batch, kept)`: `(batch, ..., kept, width)`.
    """
    rows, num_kept = columns.shape
    index = columns.view(rows, *[1] * (states.ndim - 3), num_kept, 1)
    # Not `take_along_dim`: its broadcasting would tie a compiled graph to the length of the prefix.
    index = index.expand(-1, *states.shape[1:-2], -1, states.shape[-1])
    return states.expand(rows, *states.shape[1:]).gather(-2, index)


class LLaDA2MoeRMSNorm(Glm4MoeRMSNorm):
    """With the addition to the residual stream that goes before it; on a GPU without gradients one kernel."""

    def forward(
        self, hidden_states: torch.Tensor, residual: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            hidden_states: `(..., hidden_size)`.
            residual: As `hidden_states`, added to them first.

        Returns:
            The normed states; with `residual`, these and the sum.
        """
        if can_fuse(hidden_states, self.weight):
            from .kernels.normalization import rms_norm

            return rms_norm(hidden_states, self.weight, self.variance_epsilon, residual)
        if residual is None:
            return super().forward(hidden_states)
        hidden_states = residual + hidden_states
        return super().forward(hidden_states), hidden_states


class LLaDA2MoeMLP(Glm4MoeMLP):
    """The dense MLP; also the shared expert."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_proj(hidden_states), self.up_proj(hidden_states)
        if self.config.hidden_act == "silu" and can_fuse(gate):
            from .kernels.normalization import silu_multiply

            return self.down_proj(silu_multiply(gate, up))
        return self.down_proj(self.act_fn(gate) * up)


class LLaDA2MoeAttention(nn.Module):
    """Grouped-query attention with RMSNorm on query and key heads and rotary embedding on the first channels."""

    def __init__(self, config: LLaDA2MoeConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_heads = config.num_attention_heads
        self.num_key_value_heads = config.num_key_value_heads
        self.num_key_value_groups = self.num_heads // self.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = False

        self.query_key_value = nn.Linear(
            config.hidden_size, (self.num_heads + 2 * self.num_key_value_heads) * self.head_dim, bias=False
        )
        self.query_layernorm = LLaDA2MoeRMSNorm(self.head_dim, eps=config.rms_norm_eps)
        self.key_layernorm = LLaDA2MoeRMSNorm(self.head_dim, eps=config.rms_norm_eps)
        self.dense = nn.Linear(self.num_heads * self.head_dim, config.hidden_size, bias=False)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | PrefixMask | None,
        past_key_values: Cache | None = None,
        columns_to_keep: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Args:
            attention_mask: With a [`PrefixMask`] keys and values go into the static buffers of `past_key_values` and
                are attended to there.
            columns_to_keep: `(batch, kept)`, the columns that attend; all of them are attended to. Default: all.

        Returns:
            `(batch, kept, hidden_size)` and, where the implementation has them, the attention weights.
        """
        query_key_value = self.query_key_value(hidden_states)
        if isinstance(attention_mask, PrefixMask):
            layer = past_key_values.layers[self.layer_idx]
            attn_output = self._attend_to_prefix(query_key_value, position_embeddings, attention_mask, layer)
            if columns_to_keep is not None:
                attn_output = take_columns(attn_output, columns_to_keep)
            return self.dense(attn_output), None

        heads = query_key_value.view(*hidden_states.shape[:-1], -1, self.head_dim)
        query_states, key_states, value_states = heads.split(
            [self.num_heads, self.num_key_value_heads, self.num_key_value_heads], dim=-2
        )
        query_states = self.query_layernorm(query_states).transpose(1, 2)
        key_states = self.key_layernorm(key_states).transpose(1, 2)
        value_states = value_states.transpose(1, 2)

        query_states, key_states = apply_rotary_pos_emb(query_states, key_states, *position_embeddings)
        if past_key_values is not None:
            # A cache that weighs keys by how much they are looked at needs the queries too.
            key_states, value_states = past_key_values.update(
                key_states, value_states, self.layer_idx, query_states=query_states
            )
        if columns_to_keep is not None:
            query_states = take_columns(query_states, columns_to_keep)
            if attention_mask is not None:
                attention_mask = take_columns(attention_mask, columns_to_keep)

        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        if can_share_key_value_heads(self.config._attn_implementation, query_states, attention_mask):
            attention_interface = shared_key_value_attention_forward
        length = query_states.shape[-2]
        is_flex = self.config._attn_implementation == "flex_attention" and query_states.is_cuda
        if is_flex and length < 128 < length * self.num_key_value_groups:
            # inductor's kernel for short queries takes all of a key head's in one block, of at most 128
            kwargs.setdefault("kernel_options", {"FORCE_USE_FLEX_ATTENTION": True})
        attn_output, attn_weights = attention_interface(
            self,
            query_states,
            key_states,
            value_states,
            attention_mask,
            dropout=0.0 if not self.training else self.attention_dropout,
            scaling=self.scaling,
            is_causal=False,
            **kwargs,
        )
        attn_output = attn_output.flatten(-2).contiguous()
        return self.dense(attn_output), attn_weights

    def _attend_to_prefix(
        self,
        query_key_value: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        mask: PrefixMask,
        layer: CacheLayerMixin,
    ) -> torch.Tensor:
        """Norms, rotary embedding, cache and attention in two kernels (three where few programs share the keys)."""
        from .kernels.prefix_attention import prefix_attention
        from .kernels.rotary import rotate_and_store

        query = rotate_and_store(
            query_key_value,
            self.query_layernorm.weight,
            self.key_layernorm.weight,
            self.query_layernorm.variance_epsilon,
            *position_embeddings,
            layer.keys,
            layer.values,
            mask.first_column,
            self.num_heads,
            self.num_key_value_heads,
        )
        return prefix_attention(
            query, layer.keys, layer.values, mask.first_column, mask.padding, mask.block_length, self.scaling
        )


class LLaDA2MoeTopkRouter(nn.Module):
    """
    Sigmoid router with group-limited choice (DeepSeek-V3, arXiv 2412.19437, section 2.1.2).

    Experts are chosen by biased scores, first the best groups (sum of a group's two best), then the best experts in
    them; they are weighted by the unbiased scores. `expert_bias` balances the load and takes no gradient.
    """

    def __init__(self, config: LLaDA2MoeConfig):
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        self.expert_bias = nn.Buffer(torch.zeros(config.num_experts, dtype=torch.float32))

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Args:
            hidden_states: `(tokens, hidden_size)`.

        Returns:
            Router logits `(tokens, num_experts)`, weights and indices of the chosen experts `(tokens, top_k)`.
        """
        config = self.config
        if can_fuse(hidden_states, self.weight):
            from .kernels.router import choose_experts, router_logits

            logits = router_logits(hidden_states, self.weight)
            settings = (config.n_group, config.topk_group, config.num_experts_per_tok, config.routed_scaling_factor)
            return logits, *choose_experts(logits, self.expert_bias, *settings)
        dtype = torch.promote_types(hidden_states.dtype, torch.float32)  # half precision would tie scores
        router_logits = F.linear(hidden_states.to(dtype), self.weight.to(dtype))
        scores = router_logits.sigmoid()
        grouped = (scores + self.expert_bias).unflatten(-1, (config.n_group, -1))  # (tokens, groups, experts of group)
        best_groups = grouped.topk(2, dim=-1).values.sum(dim=-1).topk(config.topk_group, dim=-1, sorted=False).indices
        dropped = torch.ones_like(grouped[..., 0], dtype=torch.bool).scatter(-1, best_groups, False)
        choice = grouped.masked_fill(dropped[..., None], float("-inf")).flatten(-2)
        top_k_index = choice.topk(config.num_experts_per_tok, dim=-1, sorted=False).indices
        top_k_weights = scores.gather(-1, top_k_index)
        top_k_weights = top_k_weights / (top_k_weights.sum(dim=-1, keepdim=True) + 1e-20)
        return router_logits, top_k_weights * config.routed_scaling_factor, top_k_index


class LLaDA2MoeSparseMoeBlock(nn.Module):
    """Routed experts plus a shared expert that every token passes."""

    def __init__(self, config: LLaDA2MoeConfig):
        super().__init__()
        self.gate = LLaDA2MoeTopkRouter(config)
        self.experts = Glm4MoeExperts(config)
        self.shared_experts = LLaDA2MoeMLP(
            config, intermediate_size=config.moe_intermediate_size * config.num_shared_experts
        )

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        _, top_k_weights, top_k_index = self.gate(tokens)
        if self._sums_in_kernel():
            shared = self.shared_experts(tokens)
            return self.experts(tokens, top_k_index, top_k_weights, addend=shared).view_as(hidden_states)
        routed = self.experts(tokens, top_k_index, top_k_weights.to(tokens.dtype)).view_as(hidden_states)
        return routed + self.shared_experts(hidden_states)

    def _sums_in_kernel(self) -> bool:
        """Whether the experts add what the shared expert gives: not where a hook sums them up over processes."""
        return self.gate.config._experts_implementation == "triton" and not is_hooked(self.experts)


class LLaDA2MoeDecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: LLaDA2MoeConfig, layer_idx: int):
        super().__init__()
        self.attention = LLaDA2MoeAttention(config, layer_idx)
        if layer_idx < config.first_k_dense_replace:
            self.mlp = LLaDA2MoeMLP(config)
        else:
            self.mlp = LLaDA2MoeSparseMoeBlock(config)
        self.input_layernorm = LLaDA2MoeRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LLaDA2MoeRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        columns_to_keep: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        residual = hidden_states if columns_to_keep is None else take_columns(hidden_states, columns_to_keep)
        hidden_states, _ = self.attention(
            hidden_states=self.input_layernorm(hidden_states),
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_embeddings=position_embeddings,
            columns_to_keep=columns_to_keep,
            **kwargs,
        )
        hidden_states, residual = self.post_attention_layernorm(hidden_states, residual)
        return residual + self.mlp(hidden_states)


class LLaDA2MoePreTrainedModel(PreTrainedModel):
    config: LLaDA2MoeConfig
    base_model_prefix = "model"
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

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        # transformers looks for the decorator in the source of this file; ours is on the class that we import.
        return True

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        if requested_experts is None and torch.cuda.is_available() and has_triton():
            requested_experts = "triton"
        return super().get_correct_experts_implementation(requested_experts)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike | None, *model_args: Any, **kwargs: Any
    ) -> "LLaDA2MoePreTrainedModel | tuple[LLaDA2MoePreTrainedModel, dict]":
        """
        As any model's; errors name what does not fit.

        Raises:
            OSError: if a file is missing or damaged. ValueError: if the tensors do not fit the configuration.
            TypeError: for a `generation_config` that is not a [`BlockDiffusionGenerationConfig`].
        """
        check_generation_config(kwargs.get("generation_config"))
        wants_info = kwargs.pop("output_loading_info", False)
        may_mismatch = kwargs.pop("ignore_mismatched_sizes", False)
        try:
            # transformers would only log which tensors are misshapen, and raise an error that does not say.
            model, info = super().from_pretrained(
                pretrained_model_name_or_path,
                *model_args,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **kwargs,
            )
        except SafetensorError as error:
            raise OSError(
                f"A weights file in {pretrained_model_name_or_path} is truncated or damaged: {error}"
            ) from error
        except KeyError as error:
            if error.args != ("weight_map",):
                raise
            raise ValueError(
                f"The index of the weights in {pretrained_model_name_or_path} has no `weight_map`."
            ) from error
        except RuntimeError as error:
            if "conversion of the weights" not in str(error) or kwargs.get("quantization_config") is not None:
                raise
            raise ValueError(
                f"Experts in {pretrained_model_name_or_path} are missing or misshapen; the report above names them."
            ) from error
        if info["mismatched_keys"] and not may_mismatch:
            misshapen = [
                f"{name} is {list(found)} instead of {list(wanted)}"
                for name, found, wanted in sorted(info["mismatched_keys"])[:4]
            ]
            raise ValueError(
                f"{len(info['mismatched_keys'])} tensors in {pretrained_model_name_or_path} do not fit the "
                f"configuration: {'; '.join(misshapen)}."
            )
        compute_torchao_experts_eagerly(model)
        return (model, info) if wants_info else model

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


class LLaDA2MoeModel(LLaDA2MoePreTrainedModel):
    """The backbone without a head: ids to hidden states."""

    def __init__(self, config: LLaDA2MoeConfig):
        super().__init__(config)
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            [LLaDA2MoeDecoderLayer(config, layer_idx) for layer_idx in range(config.num_hidden_layers)]
        )
        self.norm = LLaDA2MoeRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = Glm4MoeRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.word_embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.word_embeddings = value

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        block_length: int | None = None,
        block_start: torch.LongTensor | None = None,
        columns_to_keep: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MoeModelOutputWithPast:
        r"""
        Args:
            input_ids: `(batch, length)`.
            attention_mask: `(batch, past + length)`, 0 for padding; or a ready 4-D mask or `BlockMask`; or a
                [`PrefixMask`], with a cache whose buffers are static.
            position_ids: `(batch, length)`. Default: counted from each row's first token that is not padding.
            past_key_values: A cache that ends at a block boundary.
            inputs_embeds: `(batch, length, hidden_size)` in place of `input_ids`.
            use_cache: Whether to make a cache where none is given.
            block_length: Tokens of an attention block. Default: `config.block_length`.
            block_start: `(batch,)`, see [`create_block_causal_mask`].
            columns_to_keep: `(batch, kept)`, the columns of each row that hidden states are wanted of, counted from
                the first of this call. The cache still takes in all columns; of those not kept the last layer
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
        check_forward_inputs(
            input_ids, inputs_embeds, plain_mask, position_ids, block_length, self.config.hidden_size, start
        )
        check_columns_to_keep(columns_to_keep, input_ids if inputs_embeds is None else inputs_embeds)
        if inputs_embeds is None:
            inputs_embeds = self.word_embeddings(input_ids)
        if isinstance(attention_mask, PrefixMask) and not self._attends_by_kernel(inputs_embeds):
            buffer_length, _ = past_key_values.get_mask_sizes(inputs_embeds.shape[1], 0)
            attention_mask = attention_mask.dense(
                self.config, inputs_embeds.shape[1], buffer_length, inputs_embeds.dtype
            )
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            position_ids = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device)[None] + start
            if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2:
                padding = attention_mask.to(torch.long).argmax(dim=-1, keepdim=True)
                position_ids = (position_ids - padding).clamp(min=0)

        attention_mask = create_block_causal_mask(
            self.config, inputs_embeds, attention_mask, past_key_values, block_length, block_start
        )
        position_embeddings = self.rotary_emb(inputs_embeds, position_ids)
        hidden_states = inputs_embeds
        # Only masks with a row per query can be narrowed: with those of flash and flex attention the last layer
        # computes all columns.
        is_narrow = attention_mask is None or isinstance(attention_mask, PrefixMask)
        is_narrow = is_narrow or (isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 4)
        for layer_idx, layer in enumerate(self.layers):
            is_last = layer_idx + 1 == len(self.layers)
            hidden_states = layer(
                hidden_states,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                position_embeddings=position_embeddings,
                columns_to_keep=columns_to_keep if is_last and is_narrow else None,
                **kwargs,
            )
        if columns_to_keep is not None and not is_narrow:
            hidden_states = take_columns(hidden_states, columns_to_keep.to(hidden_states.device))
        return MoeModelOutputWithPast(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)

    def _attends_by_kernel(self, inputs_embeds: torch.Tensor) -> bool:
        """Whether Triton's kernel takes the place of sdpa under a [`PrefixMask`]."""
        config = self.config
        if config._attn_implementation != "sdpa" or not can_fuse(inputs_embeds, self.word_embeddings.weight):
            return False
        from .kernels.prefix_attention import can_attend_to_prefix

        return can_attend_to_prefix(
            inputs_embeds.dtype, config.head_dim, config.num_attention_heads, config.num_key_value_heads
        )


class LLaDA2MoeForBlockDiffusion(LLaDA2MoePreTrainedModel, BlockDiffusionGenerationMixin):
    """The backbone with its head: predicts the token under every mask. Loads the released layout as it is."""

    _tied_weights_keys = {"lm_head.weight": "model.word_embeddings.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: LLaDA2MoeConfig):
        super().__init__(config)
        self.model = LLaDA2MoeModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.loss_type = "ForMaskedLM"
        self.post_init()

    def get_decoder(self) -> LLaDA2MoeModel:
        return self.model

    @can_return_tuple
    @merge_with_config_defaults
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
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
        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return MoeCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
        )


__all__ = ["LLaDA2MoeForBlockDiffusion", "LLaDA2MoeModel", "LLaDA2MoePreTrainedModel"]
