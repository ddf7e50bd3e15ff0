"""A few-step decoder from the many-step one."""

import copy
from typing import Any, NamedTuple

import torch
from datasets import Dataset, IterableDataset
from diffusers.models import ZImageTransformer2DModel
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

from transformers_llada_uni.training.base_trainer import check_class, check_settings
from transformers_llada_uni.training.data.dataset_loading import AnyDataset
from transformers_llada_uni.training.objective.noise import step_generators

from ..code_decoding import guided_velocity
from ..decoders import DECODERS, SCHEDULER_SETTINGS
from ..semantic_embedder import LLaDAUniSemanticEmbedder
from .component_trainer import ComponentTrainer, Savable
from .decoder_data import check_codes, collate, is_prepared
from .decoder_model import DecoderModule
from .distillation_config import LLaDAUniDistillationConfig
from .distillation_objective import (
    OWN_SHARE,
    consistency_errors,
    consistency_targets,
    draw_noise,
)
from .flow_matching import Latents, noised, squared_errors, velocities_to
from .twin_decoder import TwinDecoder


class LLaDAUniDistillationTrainer(ComponentTrainer[TwinDecoder]):
    r"""
    Trains a student to say at once where the teacher's way from a noisy image ends, by TwinFlow (arXiv 2512.05150).
    With an image's latents x, noise e and a noise level sigma, the student sees x_sigma = (1 - sigma) x + sigma e at
    time 1 - sigma and jumps to f = x_sigma + sigma v.

    1. Of two thirds of the images it learns to be a consistency function: f stays the same on the way on which the
       teacher leads (arXiv 2303.01469), for which v has to be u - sigma dv/dsigma, u being the teacher's guided
       velocity.
    2. Of the others it jumps to an image y of its own, from a noise level of a sampler with `num_student_steps`
       steps. A twin of the student, the same weights told apart by a vector, learns the velocity to y from two noisy
       points. The student's jump is moved by what the teacher says at a noisy y more than its twin does: the direction
       in which the divergence of the student's images from real ones falls.

    The few-step sampler asks for nothing else: it goes to f, adds new noise, and goes again. Guidance is baked in; the
    student runs once a step.

    With `objective="guidance"` it learns no more than the teacher's guided velocity, and is sampled as the teacher is:
    half its work a step, and in steps as many as the teacher needs.

    Ours is that the real flow is the teacher's guided one (the student has no input by which it could say both the
    velocity and the jump), the bound on the consistency step, and that an image's kind is drawn, so that batches may
    be of any size. `benchmarks/distillation.py` measures the student at 1, 2, 4 and 8 steps.

    Several processes share the work by DDP. Weights are float32; `bf16` is for what autocast covers of the student,
    all but the pass of the derivative. The teacher is computed as it is.

    Saved are the folders `transformer_turbo/` and `scheduler_turbo/` of a pipeline.

    Args:
        teacher ([`~diffusers.ZImageTransformer2DModel`]): The many-step decoder; not changed.
        semantic_embedder ([`LLaDAUniSemanticEmbedder`]): Codes to features, for both; not changed.
        student ([`~diffusers.ZImageTransformer2DModel`], *optional*): Where the student starts. Default: the teacher.
        args ([`LLaDAUniDistillationConfig`], *optional*): Settings.
        train_dataset, eval_dataset: Prepared by [`prepare_decoder_dataset`], as the decoder's.
        **kwargs: Further arguments of [`~transformers.Trainer`].

    Raises:
        TypeError, ValueError: for components or data that do not fit.
    """

    _stage = "few-step distillation of the decoder"
    args: LLaDAUniDistillationConfig

    @classmethod
    def check_columns(cls, argument: str, dataset: AnyDataset) -> None:
        is_prepared(argument, dataset)

    def __init__(
        self,
        teacher: ZImageTransformer2DModel,
        semantic_embedder: LLaDAUniSemanticEmbedder,
        student: ZImageTransformer2DModel | None = None,
        args: LLaDAUniDistillationConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | None = None,
        **kwargs: Any,
    ):
        args = check_settings(args, LLaDAUniDistillationConfig, "llada-uni-decoder-turbo")
        check_class("teacher", teacher, ZImageTransformer2DModel)
        if student is not None:
            check_class("student", student, ZImageTransformer2DModel)
        if student is teacher:
            raise ValueError("`student` is the `teacher`, which does not change: leave it out for a copy.")
        self._check_datasets(train_dataset, eval_dataset)
        for name, dataset in (("train_dataset", train_dataset), ("eval_dataset", eval_dataset)):
            if dataset is not None:
                if not is_prepared(name, dataset):
                    raise ValueError(f"`{name}` holds images: give what `prepare_decoder_dataset` makes of them.")
                check_codes(name, dataset, semantic_embedder.config["codebook_size"])
        student = copy.deepcopy(teacher) if student is None else student
        self.teacher = DecoderModule(teacher.requires_grad_(False).eval(), semantic_embedder.requires_grad_(False))
        super().__init__(
            TwinDecoder(student.requires_grad_(True), semantic_embedder),
            args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            data_collator=collate,
            **kwargs,
        )
        if self.is_fsdp_enabled or self.is_deepspeed_enabled or args.ddp_static_graph:
            raise ValueError(
                "The distillation makes as many passes as its images need, which differs from process to process: "
                "neither FSDP, DeepSpeed nor `ddp_static_graph` can be used, several processes by DDP can."
            )
        self.teacher.to(self.args.device)

    @torch.no_grad()
    def teacher_velocity(self, points: Latents, sigmas: torch.Tensor, codes: list[torch.Tensor]) -> Latents:
        """The teacher's guided velocity toward data at noise levels `(batch,)`."""
        guidance_scale, batch_size = self.args.teacher_guidance_scale, len(codes)
        branches = 2 if guidance_scale else 1
        is_conditional = torch.arange(branches * batch_size, device=sigmas.device) < batch_size
        velocities = self.teacher(points * branches, 1 - sigmas.repeat(branches), codes * branches, is_conditional)
        if not guidance_scale:
            return velocities
        pairs = zip(velocities[:batch_size], velocities[batch_size:], strict=True)
        return [guided_velocity(p[None], q[None], guidance_scale)[0] for p, q in pairs]

    def loss(self, model: TwinDecoder, inputs: dict[str, Any]) -> torch.Tensor:
        codes, latents = inputs["codes"], inputs["latents"]
        generators = step_generators(self, len(codes))
        sigmas, noise = draw_noise(latents, generators)
        if self.args.objective == "guidance":
            points = noised(latents, noise, sigmas)
            velocities = velocities_of(model, points, sigmas, codes)
            return squared_errors(velocities, self.teacher_velocity(points, sigmas, codes)).mean()
        of_data, own = [], []
        for row, generator in enumerate(generators):
            if torch.rand((), generator=generator).item() >= OWN_SHARE:
                of_data.append(row)
                continue
            own.append(row)
            steps = self.args.num_student_steps
            sigmas[row] = 1 - int(torch.randint(steps, (), generator=generator)) / steps
        points = noised(latents, noise, sigmas)
        jumps = Jumps(codes, points, sigmas, velocities_of(model, points, sigmas, codes))
        losses = []
        if of_data:
            losses.append(self.consistency_loss(model, jumps.of(of_data)))
        if own:
            losses.append(self.twin_loss(model, jumps.of(own), [generators[row] for row in own]))
        return torch.stack(losses).sum() / len(codes)

    def consistency_loss(self, model: TwinDecoder, jumps: "Jumps") -> torch.Tensor:
        """The sum of the jumps' errors from noisy images of the data."""
        codes, points, sigmas, velocities = jumps
        targets = consistency_targets(
            lambda sides, levels: velocities_of(model, sides, levels, codes * 2, in_full_precision=True),
            points,
            sigmas,
            self.teacher_velocity(points, sigmas, codes),
        )
        return consistency_errors(velocities, targets).sum()

    def twin_loss(self, model: TwinDecoder, jumps: "Jumps", generators: list[torch.Generator]) -> torch.Tensor:
        """The sum of the errors of the twin's velocities to where the jumps end, and of the jumps."""
        codes, points, sigmas, velocities = jumps
        own = [(x + sigma * v).detach() for x, sigma, v in zip(points, sigmas, velocities, strict=True)]
        # The twin learns twice as often as the student moves (as LLaDA-Image's, which is a model of its own)
        levels, noise = draw_noise(own * 2, generators * 2)
        flows = velocities_of(model, noised(own * 2, noise, levels), levels, codes * 2, is_twin=True)
        twin_errors = squared_errors(flows, velocities_to(own * 2, noise))

        levels, noise = draw_noise(own, generators)
        noisy = noised(own, noise, levels)
        real = self.teacher_velocity(noisy, levels, codes)
        with torch.no_grad():
            twin = velocities_of(model, noisy, levels, codes, is_twin=True)
        targets = [(v + r - t).detach() for v, r, t in zip(velocities, real, twin, strict=True)]
        return twin_errors.sum() + squared_errors(velocities, targets).sum()

    def components(self) -> dict[str, Savable]:
        transformer, scheduler = DECODERS["turbo"]
        is_of_guidance = self.args.objective == "guidance"
        settings = {"shift": self.args.scheduler_shift} if is_of_guidance else SCHEDULER_SETTINGS["turbo"]
        return {
            transformer: self.trained_model().transformer,
            scheduler: FlowMatchEulerDiscreteScheduler(**settings),
        }


class Jumps(NamedTuple):
    """Points `(channels, 4 * H, 4 * W)` each, their noise levels `(batch,)`, and the student's velocities there."""

    codes: list[torch.Tensor]
    points: Latents
    sigmas: torch.Tensor
    velocities: Latents

    def of(self, rows: list[int]) -> "Jumps":
        codes, points, velocities = (
            [values[row] for row in rows] for values in (self.codes, self.points, self.velocities)
        )
        return Jumps(codes, points, self.sigmas[rows], velocities)


def velocities_of(
    model: TwinDecoder,
    points: Latents,
    sigmas: torch.Tensor,
    codes: list[torch.Tensor],
    is_twin: bool = False,
    in_full_precision: bool = False,
) -> Latents:
    """At noise levels `(batch,)`, all images with their codes; `model` may be wrapped for several processes."""
    is_conditional = torch.ones_like(sigmas, dtype=torch.bool)
    return model(points, 1 - sigmas, codes, is_conditional, is_twin, in_full_precision)
