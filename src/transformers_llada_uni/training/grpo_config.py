"""Settings of reward training by block diffusion."""

from dataclasses import dataclass, field

from trl import GRPOConfig

from ..input_checks import check_choice, check_integer, check_number
from .documented_settings import documented
from .objective.noise import BlockDiffusionNoise
from .objective.rollout_likelihood import ESTIMATES
from .trl_settings import refuse_without_meaning, settle_defaults


# Settings of trl that have no meaning here, the only value they may have, and why.
WITHOUT_MEANING = {
    "use_vllm": (False, "vLLM does not run this model"),
    "use_transformers_continuous_batching": (False, "blocks are decoded by `generate`"),
    "use_transformers_paged": (False, "blocks are decoded by `generate`"),
    "min_p": (None, "`generate` samples with `temperature`, `top_k` and `top_p`"),
    "repetition_penalty": (1.0, "`generate` samples with `temperature`, `top_k` and `top_p`"),
    "generation_kwargs": (None, "set the fields of this config"),
    "cache_implementation": (None, "the exact cache is used"),
    "sync_ref_model": (False, "the reference is the model at the begin of the run"),
    "cast_lm_head_to_fp32": (False, "log-probabilities are summed in float32 anyway"),
    "router_aux_loss_coef": (None, "loads are balanced by the experts' biases"),
    "remove_unused_columns": (False, "rollouts and rewards need all columns"),
}
# Noise levels of the bound: all of them for texts, high ones for images (MaskGRPO, arXiv 2510.02880, section 3.2).
TEXT_NOISE_RANGE = (1e-3, 1.0)
IMAGE_NOISE_RANGE = (0.8, 1.0)


@documented
@dataclass
class LLaDAUniGRPOConfig(GRPOConfig):
    r"""
    Configuration of [`LLaDAUniGRPOTrainer`]. Only what differs from [`~trl.GRPOConfig`] is described here.

    Parameters:
        block_length (`int`, *optional*): Tokens of a block. Default: the model's.
        num_steps_per_block (`int`, defaults to 32): Steps a block of a rollout may take.
        threshold (`float`, defaults to 0.95): Tokens predicted with a higher probability are committed at once.
        guidance_scale (`float`, defaults to 1.0): Of text-to-image rollouts; 1.0 is without guidance, so that the
            images come from the distribution that is trained.
        log_probability_estimate (`str`, defaults to `"full_mask"`): How the log-probabilities are estimated whose
            ratio is clipped, see [`LLaDAUniGRPOTrainer`]: `"full_mask"`, `"elbo"` or `"trace"`.
        num_noise_samples (`int`, defaults to 4): Noise levels of `"elbo"`; each costs a noisy copy of the answer.
        noise_range (`list[float]`, *optional*): Lowest and highest noise level of `"elbo"`. Default: `[0.001, 1.0]`,
            the bound, for texts, and `[0.8, 1.0]` for images.
        trace_shrinkage (`int`, defaults to 1): How many neighbouring steps of a block `"trace"` takes for one; 1 is
            exact, more take fewer noisy copies of the answer.

    > [!NOTE]
    > `temperature` and `top_p`, `top_k` shape the sampling of rollouts only; log-probabilities are those of the model.
    > trl does not save rollouts: a run that is resumed while one is learnt from in several steps (`num_iterations`, or
    > `steps_per_generation` above `gradient_accumulation_steps`) makes it anew, and is not bit-equal then.

    Raises:
        ValueError: naming the field, for a value out of range, one that the estimate has no use for, or a setting of
            trl without meaning here.
    """

    block_length: int | None = None
    num_steps_per_block: int = 32
    threshold: float = 0.95
    guidance_scale: float = 1.0
    log_probability_estimate: str = field(default="full_mask", metadata={"choices": list(ESTIMATES)})
    num_noise_samples: int = 4
    noise_range: list[float] | None = None
    trace_shrinkage: int = 1

    def __post_init__(self):
        refuse_without_meaning(self, WITHOUT_MEANING)
        settle_defaults(self)
        if self.block_length is not None:
            check_integer("block_length", self.block_length, 1)
        check_integer("num_steps_per_block", self.num_steps_per_block, 1)
        check_number("threshold", self.threshold, 0, 1)
        check_number("guidance_scale", self.guidance_scale, 0)
        check_choice("log_probability_estimate", self.log_probability_estimate, ESTIMATES)
        check_integer("num_noise_samples", self.num_noise_samples, 1)
        check_integer("trace_shrinkage", self.trace_shrinkage, 1)
        of_estimates = {"num_noise_samples": "elbo", "noise_range": "elbo", "trace_shrinkage": "trace"}
        for name, estimate in of_estimates.items():
            if getattr(self, name) != getattr(type(self), name) and self.log_probability_estimate != estimate:
                raise ValueError(
                    f"`{name}` is for `log_probability_estimate={estimate!r}`, which is "
                    f"{self.log_probability_estimate!r}."
                )
        self.make_noise()
        super().__post_init__()

    def make_noise(self, is_image: bool = False) -> BlockDiffusionNoise:
        """What the estimate masks; `"trace"` draws nothing."""
        if self.log_probability_estimate != "elbo":
            # All of a block is masked, since every number that is drawn lies below 1.
            return BlockDiffusionNoise(noise_range=(1 - 1e-12, 1.0), weighting="inverse")
        default = IMAGE_NOISE_RANGE if is_image else TEXT_NOISE_RANGE
        return BlockDiffusionNoise(
            noise_range=default if self.noise_range is None else self.noise_range,  # type: ignore[arg-type]  # its length is checked there
            num_noise_samples=self.num_noise_samples,
        )
