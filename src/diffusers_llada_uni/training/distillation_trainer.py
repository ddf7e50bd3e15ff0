"""A few-step decoder from the many-step one."""

import copy
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from diffusers.models import ZImageTransformer2DModel
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

from transformers_llada_uni.image_sizes import UPSCALE
from transformers_llada_uni.training.base_trainer import check_class, check_datasets, check_settings
from transformers_llada_uni.training.objective.noise import step_generators

from ..code_decoding import decoder_sigmas, guided_velocity
from ..decoders import DECODERS, SCHEDULER_SETTINGS
from ..semantic_embedder import LLaDAUniSemanticEmbedder
from .component_trainer import ComponentTrainer, Savable
from .decoder_data import collate
from .decoder_model import DecoderModule
from .distillation_config import LLaDAUniDistillationConfig


class LLaDAUniDistillationTrainer(ComponentTrainer[DecoderModule]):
    r"""
    Trains a student to say at once where the teacher's trajectory ends. From noise, the teacher walks its guided ODE
    to x_0. Its Euler steps are straight lines, so that the trajectory has a point x_sigma at every noise level sigma.
    For levels 1 - i/n of the samplers with n = `min_student_steps` .. `max_student_steps` steps the student learns

        L = mean | v(x_sigma, 1 - sigma, codes) - (x_0 - x_sigma) / sigma |^2,

    the velocity that leads from x_sigma straight to x_0: a consistency function (arXiv 2303.01469) learnt from its
    values. The few-step sampler asks for nothing else: it goes to x_0, adds new noise, and goes again.

    One trajectory gives `pairs_per_trajectory` pairs. Codes are all the data that is needed, no images: such as
    those that the language model generates. Guidance is baked in; the student runs once a step.

    This objective is ours. LLaDA2.0-Uni has consistency plus flow matching with two heads (arXiv 2604.20796, eq. 8),
    LLaDA-Image TwinFlow (arXiv 2512.05150); `benchmarks/distillation.py` compares the three.

    Saved are the folders `transformer_turbo/` and `scheduler_turbo/` of a pipeline.

    Args:
        teacher ([`~diffusers.ZImageTransformer2DModel`]): The many-step decoder; not changed.
        semantic_embedder ([`LLaDAUniSemanticEmbedder`]): Codes to features, for both; not changed.
        scheduler ([`~diffusers.FlowMatchEulerDiscreteScheduler`], *optional*): The teacher's. Default: shift 6.
        student ([`~diffusers.ZImageTransformer2DModel`], *optional*): Where the student starts. Default: the teacher.
        args ([`LLaDAUniDistillationConfig`], *optional*): Settings.
        train_dataset, eval_dataset: Rows with `codes` (H * W) and `grid` (H, W).
        **kwargs: Further arguments of [`~transformers.Trainer`].

    Raises:
        TypeError, ValueError: for components or data that do not fit.
    """

    _stage = "few-step distillation of the decoder"
    args: LLaDAUniDistillationConfig
    student_class: type[DecoderModule] = DecoderModule  # what the student is while it learns

    def __init__(
        self,
        teacher: ZImageTransformer2DModel,
        semantic_embedder: LLaDAUniSemanticEmbedder,
        scheduler: FlowMatchEulerDiscreteScheduler | None = None,
        student: ZImageTransformer2DModel | None = None,
        args: LLaDAUniDistillationConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | None = None,
        **kwargs: Any,
    ):
        args = check_settings(args, LLaDAUniDistillationConfig, "llada-uni-decoder-turbo")
        check_datasets(train_dataset, eval_dataset, ("codes", "grid"))
        if scheduler is None:
            scheduler = FlowMatchEulerDiscreteScheduler(**SCHEDULER_SETTINGS["normal"])
        check_class("scheduler", scheduler, FlowMatchEulerDiscreteScheduler)
        scheduler.set_timesteps(sigmas=decoder_sigmas("normal", args.num_teacher_steps))
        self.teacher_sigmas = scheduler.sigmas.tolist()  # falling, 0 at the end

        student = copy.deepcopy(teacher) if student is None else student
        self.teacher = DecoderModule(teacher.requires_grad_(False).eval(), semantic_embedder.requires_grad_(False))
        super().__init__(
            self.student_class(student.requires_grad_(True), semantic_embedder),
            args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            data_collator=collate,
            **kwargs,
        )
        self.teacher.to(self.args.device)

    # The teacher

    @torch.no_grad()
    def teacher_velocity(
        self, noisy: list[torch.Tensor], time: torch.Tensor, codes: list[torch.Tensor]
    ) -> list[torch.Tensor]:
        """The teacher's guided velocity toward data at `time` `(batch,)`, 0 for noise to 1 for data."""
        guidance_scale, batch_size = self.args.teacher_guidance_scale, len(codes)
        branches = 2 if guidance_scale else 1
        is_conditional = torch.arange(branches * batch_size, device=time.device) < batch_size
        velocities = self.teacher(noisy * branches, time.repeat(branches), codes * branches, is_conditional)
        if not guidance_scale:
            return velocities
        pairs = zip(velocities[:batch_size], velocities[batch_size:], strict=True)
        return [guided_velocity(p[None], q[None], guidance_scale)[0] for p, q in pairs]

    def trajectory(self, noise: list[torch.Tensor], codes: list[torch.Tensor]) -> list[list[torch.Tensor]]:
        """
        The teacher's way from `noise`: at each of `teacher_sigmas` the latents of all rows, the last of which are the
        images.
        """
        points = [noise]
        for sigma, following in zip(self.teacher_sigmas, self.teacher_sigmas[1:], strict=False):
            time = torch.full((len(codes),), 1 - sigma, device=noise[0].device)
            velocities = self.teacher_velocity(points[-1], time, codes)
            points.append([x + (sigma - following) * v for x, v in zip(points[-1], velocities, strict=True)])
        return points

    def point_at(self, points: list[list[torch.Tensor]], row: int, sigma: float) -> torch.Tensor:
        """The latents of a row where its trajectory passes the noise level `sigma`."""
        step = max(k for k, own in enumerate(self.teacher_sigmas) if own >= sigma or k == 0)
        upper, lower = self.teacher_sigmas[step], self.teacher_sigmas[step + 1]
        share = (upper - sigma) / (upper - lower)
        return torch.lerp(points[step][row], points[step + 1][row], share)

    # Loss

    def loss(self, model: DecoderModule, inputs: dict[str, Any]) -> torch.Tensor:
        args, codes = self.args, inputs["codes"]
        patch_size, channels = (self.teacher.transformer.config[name] for name in ("all_patch_size", "in_channels"))
        side = UPSCALE * patch_size[0]

        # 1. The teacher's trajectories
        generators = step_generators(self, len(codes))
        noise = [
            torch.randn(channels, side * grid.shape[0], side * grid.shape[1], generator=generator).to(grid.device)
            for grid, generator in zip(codes, generators, strict=True)
        ]
        points = self.trajectory(noise, codes)

        # 2. Points on them, at the noise levels of the few-step samplers
        sigmas, noisy, targets, shown = [], [], [], []
        for row, generator in enumerate(generators):
            for _ in range(args.pairs_per_trajectory):
                low, high = args.min_student_steps, args.max_student_steps
                num_steps = int(torch.randint(low, high + 1, (), generator=generator))
                sigma = 1 - int(torch.randint(num_steps, (), generator=generator)) / num_steps
                point = self.point_at(points, row, sigma)
                sigmas.append(sigma)
                noisy.append(point)
                targets.append((points[-1][row] - point) / sigma)
                shown.append(codes[row])

        # 3. The student's velocities
        time = 1 - torch.tensor(sigmas, device=codes[0].device)
        velocities = model(noisy, time, shown, torch.ones_like(time, dtype=torch.bool))
        errors = [(v - target).square().mean() for v, target in zip(velocities, targets, strict=True)]
        return torch.stack(errors).mean()

    def components(self) -> dict[str, Savable]:
        transformer, scheduler = DECODERS["turbo"]
        return {
            transformer: self.trained_model().transformer,
            scheduler: FlowMatchEulerDiscreteScheduler(**SCHEDULER_SETTINGS["turbo"]),
        }
