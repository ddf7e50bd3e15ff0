"""The feed-forward half of a layer: the dense MLP, or a router, the experts it chooses and a shared one."""

import copy

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeExperts, Glm4MoeMLP
from transformers.utils.generic import maybe_autocast

from .configuration_llada2_moe import LLaDA2MoeConfig
from .exact_buffers import ExactBuffers
from .kernels import can_fuse
from .weight_hooks import is_hooked


class LLaDA2MoeMLP(Glm4MoeMLP):
    """The dense MLP; also the shared expert."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_proj(hidden_states), self.up_proj(hidden_states)
        if self.config.hidden_act == "silu" and can_fuse(gate):
            from .kernels.normalization import silu_multiply

            return self.down_proj(silu_multiply(gate, up))
        return self.down_proj(self.act_fn(gate) * up)


class LLaDA2MoeTopkRouter(ExactBuffers):
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
            from .kernels import router

            router_logits = router.router_logits(hidden_states, self.weight)
            settings = (config.n_group, config.topk_group, config.num_experts_per_tok, config.routed_scaling_factor)
            return router_logits, *router.choose_experts(router_logits, self.expert_bias, *settings)
        dtype = torch.promote_types(hidden_states.dtype, torch.float32)  # half precision would tie scores
        with maybe_autocast(hidden_states.device.type, enabled=False):
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
            return self._routed(tokens, top_k_index, top_k_weights, addend=shared).view_as(hidden_states)
        routed = self._routed(tokens, top_k_index, top_k_weights.to(tokens.dtype)).view_as(hidden_states)
        return routed + self.shared_experts(hidden_states)

    def _routed(
        self, tokens: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor, **kwargs: torch.Tensor
    ) -> torch.Tensor:
        """
        What the experts give. Autocast knows nothing of their grouped products: float32 weights are cast for it, with
        gradients or without, as a reference model must compute as the policy does. Those that peft has wrapped or that
        have hooks compute in the type they have.
        """
        experts, arguments, device_type = self.experts, (tokens, top_k_index, top_k_weights), tokens.device.type
        is_cast = not tokens.is_meta and torch.is_autocast_enabled(device_type)
        if not is_cast or not isinstance(experts, Glm4MoeExperts) or is_hooked(experts):
            return experts(*arguments, **kwargs)
        dtype, own = torch.get_autocast_dtype(device_type), experts.named_parameters(recurse=False)
        weights = {name: weight.to(dtype) if weight.dtype == torch.float32 else weight for name, weight in own}
        if torch.compiler.is_compiling():
            return functional_call(experts, weights, arguments, kwargs)
        cast = copy.copy(experts)  # not in their place: other threads compute with them
        cast._parameters = weights  # type: ignore[assignment]  # which are no parameters, but have gradients
        return cast(*arguments, **kwargs)

    def _sums_in_kernel(self) -> bool:
        """Whether the experts add what the shared expert gives: not where a hook sums them up over processes."""
        return self.gate.config._experts_implementation == "triton" and not is_hooked(self.experts)
