"""Keeps the experts' loads even without an auxiliary loss, and the routers' logits small."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from torch import nn
from transformers import TrainerCallback

from ...modeling_llada2_moe import LLaDA2MoeTopkRouter


BIAS_UPDATES = ("normalized", "sign")


class RouterBalancing(TrainerCallback):
    r"""
    Load balancing without an auxiliary loss. After every optimiser step, with the error e_i = mean load - load_i,

        expert_bias_i += update_rate * e_i / sqrt(mean of e^2 over the experts)    (`update="normalized"`), or
        expert_bias_i += update_rate * sign(e_i)                                   (`update="sign"`):

    LLaDA2.0-Uni's (arXiv 2604.20796, eq. 4), in which an expert that is far off moves further, and the one it comes
    from (arXiv 2408.15664, algorithm 1). The load of an expert is the number of tokens that chose it, in all
    micro-batches of the step and on all processes. `expert_bias` enters the choice of experts only, not their weights,
    so balancing does not disturb the gradient. It is a buffer of the model, and saved with it.

    Args:
        model: Holds the routers.
        update_rate: The papers' u; 0 leaves the bias alone, and only the loads are reported.
        update: One of [`BIAS_UPDATES`].
        accelerator: Of the trainer, for sums over processes.
        report: Called after every step as `report("max_load_violation", value)`: the paper's MaxVio, by how much the
            busiest expert exceeds the mean load, relative to it; averaged over the layers.
    """

    def __init__(
        self,
        model: nn.Module,
        update_rate: float,
        accelerator: Accelerator,
        report: Callable[[str, float], None],
        update: str = "normalized",
    ):
        self.routers = [module for module in model.modules() if isinstance(module, LLaDA2MoeTopkRouter)]
        self.update_rate, self.update = update_rate, update
        self.accelerator = accelerator
        self.report = report
        self.loads: torch.Tensor | None = None  # [routers, experts], of this step so far
        self._is_token: torch.Tensor | None = None  # None: nothing is recorded
        self._keep_logits = False
        self._logits: list[torch.Tensor] = []
        for number, router in enumerate(self.routers):
            router.register_forward_hook(self._make_hook(number))

    def _make_hook(self, number: int) -> Callable:
        def hook(router: LLaDA2MoeTopkRouter, args: tuple, output: tuple) -> None:
            # Also called when gradient checkpointing runs the layer again; that must not count twice. Nothing here
            # may compute with gradients either: the second run would have to do it as well.
            if self._is_token is None:
                return
            logits, _, index = output
            if self._keep_logits:
                self._logits.append(logits)
            chosen = index[self._is_token.to(index.device)].flatten()
            load = torch.bincount(chosen, minlength=router.expert_bias.shape[0])
            if self.loads is None:
                self.loads = load.new_zeros(len(self.routers), load.shape[0])
            self.loads[number] += load.to(self.loads.device)

        return hook

    @contextmanager
    def recording(self, is_token: torch.Tensor, keep_logits: bool = False) -> Iterator[None]:
        """Counts what the routers choose inside; `is_token` `(batch, length)` of the pass is false for padding."""
        self._is_token, self._keep_logits = is_token.flatten(), keep_logits
        try:
            yield
        finally:
            self._is_token = None

    def z_loss(self, is_token: torch.Tensor) -> torch.Tensor:
        """
        The mean over tokens and layers of `logsumexp(router logits)^2` (ST-MoE, arXiv 2202.08906, eq. 5) in the pass
        that was just recorded with `keep_logits=True`.
        """
        is_token = is_token.flatten()
        terms = [logits.float().logsumexp(dim=-1)[is_token.to(logits.device)].square() for logits in self._logits]
        self._logits = []
        device = terms[0].device
        return torch.stack([term.mean().to(device) for term in terms]).mean()

    @torch.no_grad()
    def on_optimizer_step(self, args, state, control, **kwargs) -> None:
        if self.loads is None:
            return
        loads = self.accelerator.reduce(self.loads, reduction="sum").float()
        self.loads = None
        mean_load = loads.mean(dim=1, keepdim=True)
        violation = loads.amax(dim=1) / mean_load.squeeze(1).clamp(min=1) - 1
        self.report("max_load_violation", violation.mean().item())
        if self.update_rate:
            error = mean_load - loads
            if self.update == "sign":
                direction = error.sign()
            else:  # even loads have no error, and no direction
                direction = error / error.square().mean(dim=1, keepdim=True).sqrt().clamp(min=1e-6)
            for router, step in zip(self.routers, direction * self.update_rate, strict=True):
                router.expert_bias.add_(step.to(router.expert_bias))
