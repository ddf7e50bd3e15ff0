"""Configuration of the LLaDA2 mixture-of-experts backbone."""

import functools
import os
from typing import Any, ClassVar, TypeVar

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassClassValidationError, StrictDataclassFieldValidationError
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, RopeParameters

from .checkpoint_stub import SavedWithStub
from .input_checks import check_integer, check_number


ConfigClass = TypeVar("ConfigClass", bound=PreTrainedConfig)


def raises_builtin_errors(config_class: type[ConfigClass]) -> type[ConfigClass]:
    """`@strict` wraps what its checks raise in errors that are no ValueError or TypeError: this unwraps them."""
    strict_init = vars(config_class)["__init__"]

    @functools.wraps(strict_init)
    def __init__(self: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        try:
            strict_init(self, *args, **kwargs)
        except (StrictDataclassClassValidationError, StrictDataclassFieldValidationError) as error:
            wrapped = TypeError if isinstance(error.__cause__, TypeError) else ValueError
            raise wrapped(str(error)) from error

    setattr(config_class, "__init__", __init__)  # noqa: B010  to a type checker the signature stays that of the fields
    return config_class


class CheckedFileConfig(SavedWithStub, PreTrainedConfig):
    """Refuses a folder without a `config.json`, or with that of another model, where upstream takes the defaults."""

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if not config_dict:
            raise OSError(f"{pretrained_model_name_or_path} has no config.json, or an empty one.")
        own = config_dict.get(cls.base_config_key, config_dict)
        if own.get("model_type", cls.model_type) != cls.model_type:
            raise ValueError(
                f"config.json of {pretrained_model_name_or_path} has the `model_type` {own['model_type']!r}; "
                f"{cls.__name__} reads {cls.model_type!r}."
            )
        return config_dict, kwargs


@raises_builtin_errors
@strict
class LLaDA2MoeConfig(CheckedFileConfig):
    r"""
    Configuration of [`LLaDA2MoeModel`]. The defaults are those of the released LLaDA2.0-Uni backbone; text-only
    LLaDA2.0 and LLaDA2.1 checkpoints use the same class with `image_token_offset=None`.

    Args:
        vocab_size (`int`, defaults to 173568): Text ids followed by image codes.
        image_token_offset (`int`, *optional*): Image code `c` is token `image_token_offset + c`. `None` for a
            text-only checkpoint.
        hidden_size (`int`, defaults to 2048): Width of the residual stream.
        intermediate_size (`int`, defaults to 5120): Width of the dense MLPs (first `first_k_dense_replace` layers).
        moe_intermediate_size (`int`, defaults to 512): Width of one routed expert.
        num_experts (`int`, defaults to 256): Routed experts of a layer.
        num_shared_experts (`int`, defaults to 1): The shared expert is `moe_intermediate_size` times this wide.
        num_experts_per_tok (`int`, defaults to 8): Experts chosen for each token.
        n_group (`int`, defaults to 8): Groups the experts are divided into for routing.
        topk_group (`int`, defaults to 4): Groups a token may choose experts from.
        routed_scaling_factor (`float`, defaults to 2.5): Factor on the normalised expert weights.
        first_k_dense_replace (`int`, defaults to 1): Leading layers with a dense MLP.
        rope_parameters (`dict`, *optional*): `rope_type`, `rope_theta` and `partial_rotary_factor`. A checkpoint that
            states `rope_theta` and `partial_rotary_factor` at top level, as the release does, is understood.
        block_length (`int`, defaults to 32): Attention is block-causal with blocks of this many tokens, unless a call
            of `forward` or `generate` names another length.
        mask_token_id (`int`, *optional*): The id that stands for "not yet generated".
        output_router_logits (`bool`, defaults to `False`): Whether `forward` returns the router logits.

    Raises:
        ValueError: if a value is out of its range, or the sizes do not fit together (heads, experts and groups, image
            codes). TypeError: for a value of the wrong type.
    """

    model_type = "llada2_moe"
    base_config_key = "text_config"
    keys_to_ignore_at_inference = ["past_key_values"]
    default_theta = 600000.0
    attribute_map = {
        # names under which transformers' own mixture-of-experts layers know these sizes
        "num_local_experts": "num_experts",
        "n_shared_experts": "num_shared_experts",
    }

    # Query, key and value heads live in one matrix, so its output is gathered before it is split into heads.
    base_model_tp_plan = {
        "word_embeddings": "embedding_rowwise",
        "layers.*.attention.query_key_value": "colwise_gather_output",
        "layers.*.attention.dense": "rowwise_split_input",
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
        "layers.*.mlp.experts.gate_up_proj": "packed_colwise",
        "layers.*.mlp.experts.down_proj": "rowwise",
        "layers.*.mlp.experts": "moe_tp_experts",
        "layers.*.mlp.shared_experts.gate_proj": "colwise",
        "layers.*.mlp.shared_experts.up_proj": "colwise",
        "layers.*.mlp.shared_experts.down_proj": "rowwise",
    }
    base_model_ep_plan: ClassVar[dict[str, Any]] = {
        "layers.*.mlp.experts.gate_up_proj": "grouped_gemm",
        "layers.*.mlp.experts.down_proj": "grouped_gemm",
        "layers.*.mlp.experts": "ep_dispatch_experts",
    }
    base_model_pp_plan = {
        "word_embeddings": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }
    base_model_fsdp_plan = {
        "word_embeddings": "free_full_weight",
        "layers.*": "free_full_weight",
        "norm": "keep_full_weight",
    }

    vocab_size: int = 173568
    image_token_offset: int | None = None
    hidden_size: int = 2048
    intermediate_size: int = 5120
    moe_intermediate_size: int = 512
    num_hidden_layers: int = 20
    num_attention_heads: int = 16
    num_key_value_heads: int = 4
    head_dim: int | None = 128
    num_experts: int = 256
    num_shared_experts: int = 1
    num_experts_per_tok: int = 8
    n_group: int = 8
    topk_group: int = 4
    routed_scaling_factor: float = 2.5
    first_k_dense_replace: int = 1
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    rope_parameters: RopeParameters | dict | None = None
    max_position_embeddings: int = 8192
    attention_dropout: float | int = 0.0
    initializer_range: float = 0.02
    block_length: int = 32
    mask_token_id: int | None = 156895
    pad_token_id: int | None = 156892
    eos_token_id: int | list[int] | None = 156892
    tie_word_embeddings: bool = False
    use_cache: bool = False
    output_router_logits: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        kwargs.setdefault("partial_rotary_factor", 0.5)
        super().__post_init__(**kwargs)
        # A smaller vocabulary than the released one has no such token, and -1 says so too in some checkpoints;
        # `generate` then asks for it by name.
        for name in ("mask_token_id", "pad_token_id", "eos_token_id"):
            value = getattr(self, name)
            if isinstance(value, int) and not 0 <= value < self.vocab_size:
                setattr(self, name, None)

    def validate_architecture(self) -> None:
        """Called by `@strict` after initialisation: the sizes must be possible and fit together."""
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "moe_intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "num_experts",
            "n_group",
            "max_position_embeddings",
            "block_length",
        ):
            check_integer(name, getattr(self, name), minimum=1)
        head_dim = check_integer("head_dim", self.head_dim, minimum=1)
        for name in ("num_shared_experts", "first_k_dense_replace"):
            check_integer(name, getattr(self, name), minimum=0)
        check_number("routed_scaling_factor", self.routed_scaling_factor, 0.0, exclude_minimum=True)
        check_number("rms_norm_eps", self.rms_norm_eps, 0.0)
        check_number("initializer_range", self.initializer_range, 0.0)
        check_number("attention_dropout", self.attention_dropout, 0.0, 1.0)
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"`hidden_act` must be an activation function of transformers, got {self.hidden_act!r}.")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"`num_attention_heads` ({self.num_attention_heads}) must be a multiple of `num_key_value_heads` "
                f"({self.num_key_value_heads})."
            )
        if self.num_experts % self.n_group:
            raise ValueError(f"`num_experts` ({self.num_experts}) must be a multiple of `n_group` ({self.n_group}).")
        if self.num_experts // self.n_group < 2:
            raise ValueError(
                f"`n_group` ({self.n_group}) leaves fewer than two of `num_experts` ({self.num_experts}) experts in a "
                "group; a group's score is the sum of its two best."
            )
        if not 1 <= self.topk_group <= self.n_group:
            raise ValueError(f"`topk_group` must be between 1 and `n_group` ({self.n_group}), got {self.topk_group}.")
        choosable = self.topk_group * (self.num_experts // self.n_group)
        if not 1 <= self.num_experts_per_tok <= choosable:
            raise ValueError(
                f"`num_experts_per_tok` must be between 1 and the {choosable} experts of `topk_group` groups, got "
                f"{self.num_experts_per_tok}."
            )
        if self.image_token_offset is not None and not 0 < self.image_token_offset < self.vocab_size:
            raise ValueError(
                f"`image_token_offset` must lie between 1 and `vocab_size` - 1 ({self.vocab_size - 1}), got "
                f"{self.image_token_offset}."
            )
        rope: dict[str, Any] = dict(self.rope_parameters or {})  # never empty after initialisation
        if rope["rope_type"] not in ("default", *ROPE_INIT_FUNCTIONS):
            raise ValueError(
                f"`rope_type` of `rope_parameters` must be one of default, {', '.join(ROPE_INIT_FUNCTIONS)}, got "
                f"{rope['rope_type']!r}."
            )
        check_number("rope_theta` of `rope_parameters", rope["rope_theta"], 0.0, exclude_minimum=True)
        check_number("partial_rotary_factor", rope["partial_rotary_factor"], 0.0, 1.0, exclude_minimum=True)
        rotated = int(head_dim * rope["partial_rotary_factor"])
        if rotated == 0 or rotated % 2:
            raise ValueError(
                f"`partial_rotary_factor` ({rope['partial_rotary_factor']}) must leave an even number of `head_dim` "
                f"({head_dim}) channels to rotate, got {rotated}."
            )
