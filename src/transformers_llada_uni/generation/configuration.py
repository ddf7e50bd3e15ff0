"""The settings of block-diffusion generation, saved next to a model as `generation_config.json`."""

from typing import Any

from transformers import GenerationConfig

from ..input_checks import check_integer, check_number, check_token_id
from .sprint import SprintConfig


class BlockDiffusionGenerationConfig(GenerationConfig):
    r"""
    Settings of [`BlockDiffusionGenerationMixin.generate`]. Unknown names and values out of range are refused by name.

    Args:
        max_new_tokens (`int`, defaults to 256): Tokens to generate after the prompt. 0 only fills in mask tokens that
            stand in the prompt.
        max_length (`int`, *optional*): Length of prompt and new tokens; replaces `max_new_tokens` where it is given.
        block_length (`int`, defaults to 32): Tokens that are denoised together; also the block of the attention mask.
        num_steps_per_block (`int`, defaults to 32): Steps a block may take.
        threshold (`float`, defaults to 0.95): Tokens predicted with a higher probability are committed at once.
        editing_threshold (`float`, *optional*): Replace a token that the block has generated before where another is
            now predicted with a higher probability than this (LLaDA2.1, arXiv 2602.08676). Not exact; made for
            checkpoints that were trained for it.
        max_post_steps (`int`, defaults to 16): With `editing_threshold`, steps a block may take after its last mask;
            they end with the first that replaces nothing.
        do_sample (`bool`, defaults to `False`): Sample tokens instead of taking the most probable.
        temperature (`float`, defaults to 1.0), top_k (`int`, *optional*), top_p (`float`, *optional*): Shape what is
            sampled from.
        use_cache (`bool`, defaults to `True`): Keep the keys and values of finished blocks, which is exact. `False`
            recomputes everything at every step.
        cache_implementation (`str`, defaults to `"exact"`): `"exact"`, or `"sprint"`, an approximation.
        cache_config (`dict`, *optional*): Fields of [`SprintConfig`], for `cache_implementation="sprint"`.
        use_cuda_graphs (`bool`, *optional*): Record the steps of the exact cache as CUDA graphs, which gives the same
            tokens, several times as fast on a GPU. By default wherever it can be done; `True` raises where it cannot.
        return_dict_in_generate (`bool`, defaults to `False`): Return a [`BlockDiffusionOutput`] with counts.
        mask_token_id, eos_token_id, pad_token_id, bos_token_id (`int`, *optional*): Special tokens; others are
            taken from the model's configuration. `eos_token_id` may be a list: any of them ends a row.

    Raises:
        TypeError: for an unknown name. ValueError: for a value out of its range.
    """

    _DEFAULTS = {
        "max_new_tokens": 256,
        "max_length": None,
        "block_length": 32,
        "num_steps_per_block": 32,
        "threshold": 0.95,
        "editing_threshold": None,
        "max_post_steps": 16,
        "do_sample": False,
        "temperature": 1.0,
        "top_k": None,
        "top_p": None,
        "use_cache": True,
        "cache_implementation": "exact",
        "cache_config": None,
        "use_cuda_graphs": None,
        "return_dict_in_generate": False,
        "mask_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        "bos_token_id": None,
    }
    _METADATA = ("_commit_hash", "_from_model_config", "_original_object_hash", "transformers_version")

    def __init__(self, **kwargs: Any) -> None:
        # The parent's constructor would add the settings of autoregressive generation, which have no meaning here.
        for name, default in self._DEFAULTS.items():
            setattr(self, name, kwargs.pop(name, default))
        for name in self._METADATA:
            setattr(self, name, kwargs.pop(name, None))
        if kwargs:
            raise TypeError(
                f"{type(self).__name__} has no {', '.join(f'`{name}`' for name in sorted(kwargs))}; it knows "
                f"{', '.join(self._DEFAULTS)}."
            )
        self.validate()

    def validate(self, **unused_kwargs: Any) -> None:
        """Raises ValueError that names the setting, if one is out of its range."""
        minima = {"block_length": 1, "num_steps_per_block": 1, "max_new_tokens": 0, "max_post_steps": 0}
        for name, minimum in minima.items():
            check_integer(name, getattr(self, name), minimum)
        for name in ("max_length", "top_k"):
            if getattr(self, name) is not None:
                check_integer(name, getattr(self, name), minimum=1)
        check_number("threshold", self.threshold, 0.0, 1.0)
        if self.editing_threshold is not None:
            check_number("editing_threshold", self.editing_threshold, 0.0, 1.0)
        check_number("temperature", self.temperature, 0.0, exclude_low=True)
        if self.top_p is not None:
            check_number("top_p", self.top_p, 0.0, 1.0, exclude_low=True)
        for name in ("mask_token_id", "eos_token_id", "pad_token_id", "bos_token_id"):
            if isinstance(getattr(self, name), list) and name != "eos_token_id":
                raise ValueError(f"`{name}` must be one id, got {getattr(self, name)!r}.")
            check_token_id(name, getattr(self, name))
        for name in ("do_sample", "use_cache", "return_dict_in_generate"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"`{name}` must be True or False, got {getattr(self, name)!r}.")
        implementations = ("exact", "sprint")
        if self.cache_implementation not in implementations:
            raise ValueError(
                f"`cache_implementation` must be one of {implementations}, got {self.cache_implementation!r}."
            )
        if self.cache_implementation != "exact" and not self.use_cache:
            raise ValueError(f"`cache_implementation={self.cache_implementation!r}` needs `use_cache=True`.")
        if self.use_cuda_graphs is not None and not isinstance(self.use_cuda_graphs, bool):
            raise ValueError(f"`use_cuda_graphs` must be True, False or None, got {self.use_cuda_graphs!r}.")
        if self.use_cuda_graphs and (self.cache_implementation != "exact" or not self.use_cache):
            raise ValueError("`use_cuda_graphs=True` needs the exact cache.")
        if self.cache_config is not None and self.cache_implementation != "sprint":
            raise ValueError("`cache_config` holds the settings of `cache_implementation='sprint'`, which is not set.")
        if self.cache_implementation == "sprint":
            self.sprint_config()

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

    def get_generation_mode(self, assistant_model: Any = None) -> None:
        raise NotImplementedError("Block diffusion has one mode of generation.")


def check_generation_config(generation_config: Any) -> None:
    """`None` stands for the model's own."""
    if generation_config is not None and not isinstance(generation_config, BlockDiffusionGenerationConfig):
        raise TypeError(
            f"`generation_config` must be a BlockDiffusionGenerationConfig, got {type(generation_config).__name__}."
        )


__all__ = ["BlockDiffusionGenerationConfig"]
