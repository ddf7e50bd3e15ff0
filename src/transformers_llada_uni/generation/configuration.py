"""The settings of block-diffusion generation, saved next to a model as `generation_config.json`."""

from collections.abc import Iterable
from typing import Any, ClassVar, NoReturn

from transformers import GenerationConfig
from transformers.utils import logging

from ..input_checks import (
    check_choice,
    check_flag,
    check_integer,
    check_number,
    check_texts,
    check_token_id,
    refuse_settings,
)
from .foreign_settings import refuse
from .sprint import SprintConfig


logger = logging.get_logger(__name__)

MASKING_SCHEDULES = ("linear", "cosine")
GUIDANCE = ("guidance_scale", "image_guidance_scale", "guidance_rescale", "guidance_ramp")
CACHE_IMPLEMENTATIONS = ("dynamic", "sprint", "exact")  # the last is what older files say for "dynamic"


class BlockDiffusionGenerationConfig(GenerationConfig):
    r"""
    Settings of [`BlockDiffusionGenerationMixin.generate`]. Unknown names and values out of range are refused by name.

    Args:
        max_new_tokens (`int`, defaults to 256): Tokens to generate after the prompt. 0 only fills in mask tokens that
            stand in the prompt.
        max_length (`int`, *optional*): Length of prompt and new tokens; replaces `max_new_tokens` where it is given.
        max_time (`float`, *optional*): Seconds after which no block is begun.
        stop_strings (`str` or `list[str]`, *optional*): A text ends with the first token that completes any of them.
            `generate` needs the `tokenizer` for it.
        num_return_sequences (`int`, defaults to 1): Answers to each prompt, which follow each other in the batch. More
            than one need `do_sample`.
        block_length (`int`, defaults to 32): Tokens that are denoised together; also the block of the attention mask.
        num_steps_per_block (`int`, defaults to 32): Steps a block may take.
        masking_schedule (`str`, defaults to `"linear"`): How many tokens the steps of a block commit at least:
            `"linear"`, in each the same, or `"cosine"` (MaskGIT, arXiv 2202.04200; MMaDA), few at first, while little
            is known, and many at the end. Made for image codes in few steps; of no effect where a block has as many
            steps as tokens.
        threshold (`float`, defaults to 0.95): Tokens predicted with a higher probability are committed at once.
        credit_alpha (`float`, *optional*): Weight of what a token has earned by being the most probable one in earlier
            steps of a block (credit decoding, arXiv 2510.06133; 0.7 in dInfer). Not exact; stable predictions
            are committed earlier, with any checkpoint.
        editing_threshold (`float`, *optional*): Replace a token that the block has generated before where another is
            now predicted with a higher probability than this (LLaDA2.1, arXiv 2602.08676). Not exact; made for
            checkpoints that were trained for it.
        max_post_steps (`int`, defaults to 16): With `editing_threshold`, steps a block may take after its last mask;
            they end with the first that replaces nothing.
        remasking_threshold (`float`, *optional*): Check the tokens of a block once it is full: mask half of them, then
            the other half, and find those anew whose probability is now less than this share of the most probable
            token's (re-masking, arXiv 2604.18738; 0.05 is a good start). Not exact; corrects what was committed too
            early, with any checkpoint, for two steps more a block. Takes the place of `editing_threshold`.
        max_remasking_rounds (`int`, defaults to 2): With `remasking_threshold`, how often a block is checked at most;
            a round that changes nothing is the last.
        self_speculation (`bool`, defaults to `False`): Text as `block_length=1` would give it, in fewer forward passes
            (S2D2, arXiv 2603.25702): blocks are drafted with these settings, and verified token by token in one pass.
            Exact, but where rounding decides between two tokens: `block_length`, `num_steps_per_block`, `threshold`
            and `credit_alpha` are those of drafts, and decide how many passes it takes, not what is written. Image
            codes are generated as without it.
        do_sample (`bool`, defaults to `False`): Sample tokens instead of taking the most probable.
        temperature (`float`, *optional*, defaults to 1.0), top_k (`int`, *optional*), top_p (`float`, *optional*):
            Shape what is sampled from. Without `do_sample` they do nothing, which is warned of. A temperature of 0
            takes the most probable token, with `do_sample` too.
        guidance_scale (`float`, *optional*): Of image codes, see [`generate_image_codes`]: how far to go from the
            negative prompt's prediction to the prompt's; 1 is none. Default: 2.0 with a negative prompt, else 1.0.
        image_guidance_scale (`float`, defaults to 0.0): Of image codes, away from the prompt without image.
        guidance_rescale (`float`, defaults to 0.7): Of image codes, the share of the rescaled logits, 0 to 1.
        guidance_ramp (`tuple[float, float]`, *optional*): Of image codes, guidance over time, weak early and strong
            late (arXiv 2507.08965): none until this share of the image is known, all of it from that share on, rising
            linearly between. `(0, 1)` rises all the time, `(0.25, 0.25)` begins at a quarter. Blocks without guidance
            take no forward of the negative prompts; an image of few blocks may have none such. A call that has no
            guidance refuses it. Default: the same all the time, which is `(0, 0)`.
        use_cache (`bool`, defaults to `True`): Keep the keys and values of finished blocks, which is exact. `False`
            recomputes everything at every step.
        cache_implementation (`str`, defaults to `"dynamic"`): `"dynamic"`, which is exact, or `"sprint"`, an
            approximation. (Older files say `"exact"` for the former.)
        cache_config (`dict`, *optional*): Fields of [`SprintConfig`], for `cache_implementation="sprint"`.
        use_cuda_graphs (`bool`, *optional*): Record the steps of the exact cache as CUDA graphs, which gives the same
            tokens, several times as fast on a GPU. By default wherever it can be done; `True` raises where it cannot.
        return_dict_in_generate (`bool`, defaults to `False`): Return a [`BlockDiffusionOutput`] with counts.
        output_trajectory (`bool`, defaults to `False`): With `return_dict_in_generate=True`, return the
            [`Trajectory`] too: in which step each token was committed.
        mask_token_id, eos_token_id, pad_token_id, bos_token_id (`int`, *optional*): Special tokens; others are
            taken from the model's configuration. `eos_token_id` may be a list: any of them ends a row.

    Raises:
        TypeError: for an unknown name or a value of another type. ValueError: for a value out of its range.
    """

    max_new_tokens: int = 256
    max_length: int | None = None
    max_time: float | None = None
    stop_strings: str | list[str] | None = None
    num_return_sequences: int = 1
    block_length: int = 32
    num_steps_per_block: int = 32
    masking_schedule: str = "linear"
    threshold: float = 0.95
    credit_alpha: float | None = None
    editing_threshold: float | None = None
    max_post_steps: int = 16
    remasking_threshold: float | None = None
    max_remasking_rounds: int = 2
    self_speculation: bool = False
    do_sample: bool = False
    temperature: float | None = 1.0
    top_k: int | None = None
    top_p: float | None = None
    guidance_scale: float | None = None
    image_guidance_scale: float = 0.0
    guidance_rescale: float = 0.7
    guidance_ramp: tuple[float, float] | None = None
    use_cache: bool = True
    cache_implementation: str = "dynamic"
    cache_config: dict[str, Any] | None = None
    use_cuda_graphs: bool | None = None
    return_dict_in_generate: bool = False
    output_trajectory: bool = False
    mask_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    bos_token_id: int | None = None

    _METADATA: ClassVar = ("_commit_hash", "_from_model_config", "_original_object_hash", "transformers_version")

    def __init__(self, **kwargs: Any) -> None:
        # The parent's constructor would add the settings of autoregressive generation, which have no meaning here.
        given = set(kwargs)
        for name, default in self.defaults().items():
            setattr(self, name, kwargs.pop(name, default))
        for name in self._METADATA:
            setattr(self, name, kwargs.pop(name, None))
        self.check_names(kwargs)
        self.validate(user_set_attributes=given)

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """All settings and their defaults."""
        return {
            name: getattr(cls, name)
            for name in BlockDiffusionGenerationConfig.__annotations__
            if not name.startswith("_")
        }

    @classmethod
    def check_names(cls, names: Iterable[str]) -> None:
        """Raises TypeError for names that are no settings; for one of transformers' own it says why it is none."""
        if unknown := sorted(set(names) - set(cls.defaults())):
            refuse(unknown)
            raise TypeError(
                f"{cls.__name__} has no {', '.join(f'`{name}`' for name in unknown)}; it knows "
                f"{', '.join(cls.defaults())}."
            )

    def validate(self, strict: bool = False, user_set_attributes: set[str] | None = None) -> None:
        """
        Raises ValueError or TypeError that names the setting, if one is out of its range. Settings of sampling without
        `do_sample` are only warned of.

        Args:
            strict: Means nothing here: a model can be saved whatever is warned of.
            user_set_attributes: What the caller has named, see [`~GenerationConfig.validate`].
        """
        minima = {
            "block_length": 1,
            "num_steps_per_block": 1,
            "max_new_tokens": 0,
            "max_post_steps": 0,
            "max_remasking_rounds": 1,
            "num_return_sequences": 1,
        }
        for name, minimum in minima.items():
            check_integer(name, getattr(self, name), minimum)
        for name in ("max_length", "top_k"):
            if getattr(self, name) is not None:
                check_integer(name, getattr(self, name), minimum=1)
        if self.max_time is not None:
            check_number("max_time", self.max_time, 0.0, exclude_minimum=True)
        if self.stop_strings is not None:
            check_texts("stop_strings", self.stop_strings)
        check_choice("masking_schedule", self.masking_schedule, MASKING_SCHEDULES)
        check_number("threshold", self.threshold, 0.0, 1.0)
        if self.credit_alpha is not None:
            check_number("credit_alpha", self.credit_alpha, 0.0)
        if self.editing_threshold is not None:
            check_number("editing_threshold", self.editing_threshold, 0.0, 1.0)
        if self.remasking_threshold is not None:
            check_number("remasking_threshold", self.remasking_threshold, 0.0, 1.0)
            if self.editing_threshold is not None:
                raise ValueError("`remasking_threshold` takes the place of `editing_threshold`: set one of them.")
        if self.temperature is not None:
            check_number("temperature", self.temperature, 0.0)
        if self.top_p is not None:
            check_number("top_p", self.top_p, 0.0, 1.0, exclude_minimum=True)
        if self.guidance_scale is not None:
            check_number("guidance_scale", self.guidance_scale, 0.0)
        check_number("image_guidance_scale", self.image_guidance_scale, 0.0)
        check_number("guidance_rescale", self.guidance_rescale, 0.0, 1.0)
        if self.guidance_ramp is not None:
            self._check_guidance_ramp()
        for name in ("mask_token_id", "eos_token_id", "pad_token_id", "bos_token_id"):
            if isinstance(getattr(self, name), list) and name != "eos_token_id":
                raise ValueError(f"`{name}` must be one id, got {getattr(self, name)!r}.")
            check_token_id(name, getattr(self, name))
        for name in ("self_speculation", "do_sample", "use_cache", "return_dict_in_generate", "output_trajectory"):
            check_flag(name, getattr(self, name))
        if self.output_trajectory and not self.return_dict_in_generate:
            raise ValueError("`output_trajectory=True` needs `return_dict_in_generate=True`.")
        check_choice("cache_implementation", self.cache_implementation, CACHE_IMPLEMENTATIONS)
        is_sprint = self.cache_implementation == "sprint"
        if is_sprint and self.masking_schedule != "linear":
            raise ValueError("`cache_implementation='sprint'` fills a block evenly: it takes no `masking_schedule`.")
        if is_sprint and not self.use_cache:
            raise ValueError("`cache_implementation='sprint'` needs `use_cache=True`.")
        if self.use_cuda_graphs is not None:
            check_flag("use_cuda_graphs", self.use_cuda_graphs)
        if self.use_cuda_graphs and (is_sprint or not self.use_cache):
            raise ValueError("`use_cuda_graphs=True` needs the exact cache.")
        if is_sprint:
            self.sprint_config()
        elif self.cache_config is not None:
            raise ValueError("`cache_config` holds the settings of `cache_implementation='sprint'`, which is not set.")
        if self.self_speculation:
            self._check_self_speculation()
        self._check_sampling(user_set_attributes or set())

    def _check_self_speculation(self) -> None:
        others = {
            "do_sample=True": self.do_sample and self.temperature != 0,
            "editing_threshold": self.editing_threshold is not None,
            "remasking_threshold": self.remasking_threshold is not None,
            "use_cache=False": not self.use_cache,
            "cache_implementation='sprint'": self.cache_implementation == "sprint",
            "use_cuda_graphs=True": self.use_cuda_graphs,
            "output_trajectory=True": self.output_trajectory,
        }
        if conflicts := [name for name, is_set in others.items() if is_set]:
            raise ValueError(
                f"`self_speculation=True` cannot be had with `{conflicts[0]}`: it gives the most probable token after "
                "those before it, by steps of its own."
            )

    def _check_guidance_ramp(self) -> None:
        if not isinstance(self.guidance_ramp, tuple | list) or len(self.guidance_ramp) != 2:  # a list in a file
            raise ValueError(f"`guidance_ramp` must be two shares of the image, got {self.guidance_ramp!r}.")
        for share in self.guidance_ramp:
            check_number("guidance_ramp", share, 0.0, 1.0)
        if self.guidance_ramp[0] > self.guidance_ramp[1]:
            raise ValueError(f"`guidance_ramp` must not end before it begins, got {self.guidance_ramp!r}.")

    def _check_sampling(self, named: set[str]) -> None:
        if self.num_return_sequences > 1 and (not self.do_sample or self.temperature == 0):
            raise ValueError(
                f"`num_return_sequences` is {self.num_return_sequences}, but without `do_sample=True`, and with a "
                "`temperature` of 0, all of them would be the same."
            )
        neutral = {"temperature": (None, 1.0, 0.0), "top_k": (None,), "top_p": (None, 1.0)}
        unused = [name for name, values in neutral.items() if getattr(self, name) not in values]
        # Who says `do_sample=False` in a call has said enough of what a file sets besides.
        if unused and not self.do_sample and ("do_sample" not in named or named.intersection(unused)):
            logger.warning_once(
                "`do_sample` is False, so the most probable tokens are taken, whatever is said by "
                f"{', '.join(f'`{name}`' for name in unused)}. Set `do_sample=True`."
            )

    def sprint_config(self) -> SprintConfig:
        """The settings of SPRINT. Raises ValueError for an unknown name or a value out of range."""
        settings = {} if self.cache_config is None else self.cache_config
        if not isinstance(settings, dict):
            raise ValueError(f"`cache_config` must be a dict, got {settings!r}.")
        if unknown := sorted(map(str, set(settings) - set(SprintConfig.__dataclass_fields__))):
            raise ValueError(
                f"`cache_config` has no {', '.join(f'`{name}`' for name in unknown)}; it knows "
                f"{', '.join(SprintConfig.__dataclass_fields__)}."
            )
        return SprintConfig(**settings)

    @classmethod
    def from_model_config(cls, model_config: Any) -> "BlockDiffusionGenerationConfig":
        """Settings that follow from a model's configuration: its block length and special tokens."""
        text_config = model_config.get_text_config()
        names = ("block_length", "mask_token_id", "eos_token_id", "pad_token_id", "bos_token_id")
        known = {name: getattr(text_config, name, None) for name in names}
        return cls(_from_model_config=True, **{name: value for name, value in known.items() if value is not None})

    def get_generation_mode(self, assistant_model: Any = None) -> NoReturn:
        raise NotImplementedError("Block diffusion has one mode of generation.")


def as_list(value: int | list[int] | None) -> list[int]:
    """`eos_token_id` may be one id, several, or none."""
    return [] if value is None else value if isinstance(value, list) else [value]


def refuse_settings_of_images(method: str, names: Iterable[str]) -> None:
    """Raises TypeError for the first setting that a call names and that has no meaning for text."""
    for name in names:
        if name in GUIDANCE:
            raise TypeError(f"`{method}` takes no `{name}`: only image codes are guided.")


def refuse_settings_of_text(method: str, settings: dict[str, Any], size: str = "grid") -> None:
    """Raises TypeError for the first setting that a call names and that has no meaning for codes, whose `size` says
    how many there are."""
    refuse_settings(
        method, settings, dict.fromkeys(("max_new_tokens", "max_length", "max_time", "stop_strings"), size)
    )
    if settings.get("self_speculation"):
        raise TypeError(
            f"`{method}` takes no `self_speculation`: image codes stand in no order in which one could follow from "
            "those before it."
        )


def check_generation_config(generation_config: Any) -> None:
    """`None` stands for the model's own."""
    if generation_config is not None and not isinstance(generation_config, GenerationConfig):
        raise TypeError(
            "`generation_config` must be a BlockDiffusionGenerationConfig, or a GenerationConfig of transformers, got "
            f"{type(generation_config).__name__}."
        )


__all__ = ["BlockDiffusionGenerationConfig"]
