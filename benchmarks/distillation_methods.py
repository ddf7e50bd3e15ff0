"""
Two published ways to distil a decoder, that `distillation.py` compares with the package's.

Noise levels sigma fall from 1 to 0, x_sigma = (1 - sigma) x + sigma e is an image's latents x with noise e, and
velocities v point to data, so that a student says of each point f = x_sigma + sigma v(x_sigma), where it ends. Both
take images, not codes alone. What is known of the first is a sentence: flow matching plus consistency, two heads, the
derivative by second-order differences; of the second the formulas, without code. What is ours is said where it is.
"""

import copy
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.models import ZImageTransformer2DModel
from torch import nn

from diffusers_llada_uni import LLaDAUniSemanticEmbedder
from diffusers_llada_uni.training import LLaDAUniDistillationTrainer
from diffusers_llada_uni.training.decoder_model import DecoderModule
from transformers_llada_uni.training.objective.noise import step_generators


Latents = list[torch.Tensor]
# Of noise levels. The embedding of the time has waves of a length of 0.006: over less than that the difference is
# theirs (with 0.001 four times that of 0.02 to 0.05, at the emoji decoder).
DIFFERENCE = 0.03


def errors(found: Latents, wanted: Latents) -> torch.Tensor:
    """Mean square errors `(batch,)`."""
    return torch.stack([(a - b).square().mean() for a, b in zip(found, wanted, strict=True)])


def noisy(latents: Latents, noise: Latents, sigmas: torch.Tensor) -> Latents:
    return [(1 - sigma) * x + sigma * e for sigma, x, e in zip(sigmas, latents, noise, strict=True)]


def draw(latents: Latents, generators: list[torch.Generator]) -> tuple[torch.Tensor, Latents]:
    """Uniform noise levels `(batch,)`, and noise."""
    sigmas = [torch.rand((), generator=generator).clamp_min(1e-3) for generator in generators]
    noise = [torch.randn(x.shape, generator=g).to(x.device) for x, g in zip(latents, generators, strict=True)]
    return torch.stack(sigmas).to(latents[0].device), noise


def ones_like(sigmas: torch.Tensor) -> torch.Tensor:
    """All images are shown with their codes."""
    return torch.ones_like(sigmas, dtype=torch.bool)


@torch.no_grad()
def consistency_target(
    jump: Callable[[Latents, torch.Tensor, Latents], Latents],
    points: Latents,
    sigmas: torch.Tensor,
    velocities: Latents,
    codes: Latents,
) -> Latents:
    """
    What `jump` of `(points, sigmas, codes)` has to be so that f = x + sigma v does not change on the way that
    `velocities` u lead: v = u - sigma dv/dsigma, the derivative along the way by a central difference, whose error is
    of second order (UCGM, arXiv 2505.07447).
    """
    above, below = (sigmas + DIFFERENCE).clamp_max(1), (sigmas - DIFFERENCE).clamp_min(0)
    sides = [
        [x - (other - sigma) * u for x, u, sigma, other in zip(points, velocities, sigmas, side, strict=True)]
        for side in (above, below)
    ]
    with torch.autocast(points[0].device.type, enabled=False):  # bfloat16 would lose the difference
        values = jump(sides[0] + sides[1], torch.cat([above, below]), codes * 2)
    count = len(points)
    slopes = [
        (a - b) / (high - low) for a, b, high, low in zip(values[:count], values[count:], above, below, strict=True)
    ]
    return [u - sigma * slope for u, sigma, slope in zip(velocities, sigmas, slopes, strict=True)]


def consistency_errors(jumps: Latents, targets: Latents) -> torch.Tensor:
    """
    Mean square errors `(batch,)` with no step of more than 1 toward a target, which holds a derivative of the student
    itself: without, both grow.
    """
    nearer = [(v + (target - v).clamp(-1, 1)).detach() for v, target in zip(jumps, targets, strict=True)]
    return errors(jumps, nearer)


class TwoHeadDecoder(DecoderModule):
    """A decoder with a second last layer, which only the training knows: saved is the transformer as it was."""

    def __init__(self, transformer: ZImageTransformer2DModel, semantic_embedder: LLaDAUniSemanticEmbedder):
        super().__init__(transformer, semantic_embedder)
        (last_layer,) = transformer.all_final_layer.values()
        self.flow_head = copy.deepcopy(last_layer)

    def forward(self, latents: Latents, *arguments: Any) -> tuple[Latents, Latents]:
        """Velocities of the transformer's own last layer, which jumps, and of the second, of one pass."""
        (last_layer,) = self.transformer.all_final_layer.values()
        seen: dict[str, Any] = {}
        hook = last_layer.register_forward_hook(
            lambda layer, args, kwargs, output: seen.update(args=args, kwargs=kwargs), with_kwargs=True
        )
        try:
            jumps = super().forward(latents, *arguments)
        finally:
            hook.remove()
        config = self.transformer.config
        flows = self.transformer.unpatchify(
            list(self.flow_head(*seen["args"], **seen["kwargs"]).unbind()),
            [(1, *latent.shape[1:]) for latent in latents],
            config["all_patch_size"][0],
            config["all_f_patch_size"][0],
        )
        return jumps, [flow.squeeze(1).float() for flow in flows]


class TwoHeadsTrainer(LLaDAUniDistillationTrainer):
    """
    Consistency plus flow matching (LLaDA2.0-Uni, arXiv 2604.20796, eq. 8): one head learns the jump, the other the
    velocity. Ours: the velocity is the teacher's guided one for both, both errors weigh the same, and the first is
    bounded.
    """

    student_class = TwoHeadDecoder

    def loss(self, model: TwoHeadDecoder, inputs: dict[str, Any]) -> torch.Tensor:
        codes, latents = inputs["codes"], inputs["latents"]
        sigmas, noise = draw(latents, step_generators(self, len(codes)))
        points = noisy(latents, noise, sigmas)
        velocities = self.teacher_velocity(points, 1 - sigmas, codes)

        def jump(points: Latents, sigmas: torch.Tensor, codes: Latents) -> Latents:
            return model(points, 1 - sigmas, codes, ones_like(sigmas))[0]

        targets = consistency_target(jump, points, sigmas, velocities, codes)
        jumps, flows = model(points, 1 - sigmas, codes, ones_like(sigmas))
        return (consistency_errors(jumps, targets) + errors(flows, velocities)).mean()


class TwinDecoder(DecoderModule):
    """
    A decoder with a second flow, to its own images. TwinFlow tells the two apart by the sign of the time; ours by a
    vector that is added to the embedding of the time, zero at first, so that the second begins as the first. Only the
    training knows it.
    """

    def __init__(self, transformer: ZImageTransformer2DModel, semantic_embedder: LLaDAUniSemanticEmbedder):
        super().__init__(transformer, semantic_embedder)
        self.twin = nn.Parameter(torch.zeros(transformer.t_embedder.mlp[-1].out_features))

    @contextmanager
    def _twin(self):
        hook = self.transformer.t_embedder.register_forward_hook(lambda layer, args, output: output + self.twin)
        try:
            yield
        finally:
            hook.remove()

    def forward(self, *arguments: Any, is_twin: bool = False) -> Latents:
        if not is_twin:
            return super().forward(*arguments)
        with self._twin():
            return super().forward(*arguments)


class TwinFlowTrainer(LLaDAUniDistillationTrainer):
    """
    TwinFlow (arXiv 2512.05150): a third of a batch is for the twin flow, the others learn as consistency functions.
    Of that third the student jumps to an image y, and

    - the twin flow learns the velocity to y, from two points each (LLaDA-Image: generator : fake 1 : 2),
    - the jump's target is moved by what the real flow says at a noisy y more than the twin flow does, the direction
      in which the divergence of the student's images from real ones falls.

    Ours: the real flow is the teacher's guided one, as the student has no time to aim at among its inputs by which it
    could say both the velocity and the jump.
    """

    student_class = TwinDecoder

    def loss(self, model: TwinDecoder, inputs: dict[str, Any]) -> torch.Tensor:
        codes, latents = inputs["codes"], inputs["latents"]
        generators = step_generators(self, len(codes))
        sigmas, noise = draw(latents, generators)
        third = len(codes) // 3
        # Where the samplers with 1, 2 and 4 steps jump from
        for row, generator in enumerate(generators[:third]):
            sigmas[row] = 1 - torch.randint(4, (), generator=generator) / 4
        points = noisy(latents, noise, sigmas)

        def jump(points: Latents, sigmas: torch.Tensor, codes: Latents) -> Latents:
            return model(points, 1 - sigmas, codes, ones_like(sigmas))

        jumps = jump(points, sigmas, codes)
        rest = (points[third:], sigmas[third:])
        velocities = self.teacher_velocity(rest[0], 1 - rest[1], codes[third:])
        losses = [consistency_errors(jumps[third:], consistency_target(jump, *rest, velocities, codes[third:]))]
        own = [(x + sigma * v).detach() for x, sigma, v in zip(points[:third], sigmas, jumps, strict=False)]
        codes, generators = codes[:third], generators[:third]
        losses += [self.rectification(model, jumps[:third], own, codes, generators)]
        losses += [self.twin_flow(model, own, codes, generators) for _ in range(2)]
        return torch.cat(losses).sum() / len(points)

    def twin_flow(
        self, model: TwinDecoder, own: Latents, codes: Latents, generators: list[torch.Generator]
    ) -> torch.Tensor:
        sigmas, noise = draw(own, generators)
        velocities = model(noisy(own, noise, sigmas), 1 - sigmas, codes, ones_like(sigmas), is_twin=True)
        return errors(velocities, [y - e for y, e in zip(own, noise, strict=True)])

    def rectification(
        self, model: TwinDecoder, jumps: Latents, own: Latents, codes: Latents, generators: list[torch.Generator]
    ) -> torch.Tensor:
        sigmas, noise = draw(own, generators)
        points = noisy(own, noise, sigmas)
        with torch.no_grad():
            twin = model(points, 1 - sigmas, codes, ones_like(sigmas), is_twin=True)
        real = self.teacher_velocity(points, 1 - sigmas, codes)
        return errors(jumps, [(v + r - t).detach() for v, r, t in zip(jumps, real, twin, strict=True)])
