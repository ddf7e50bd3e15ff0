"""Where the settings of a call come from: the checkpoint, the model, the call itself."""

import copy
import os
from typing import Any

from transformers import GenerationConfig, PreTrainedConfig
from transformers.utils import logging

from ..input_checks import check_token_id
from .configuration import BlockDiffusionGenerationConfig, check_generation_config
from .foreign_settings import settings_of, without_neutral


logger = logging.get_logger(__name__)


def _one_length(settings: dict[str, Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Both together, with one of `max_new_tokens` and `max_length`: the later word's, as in transformers the former's
    where both are given at once."""
    parts = []
    for given in (dict(settings), dict(kwargs)):
        if given.get("max_new_tokens") is not None and given.pop("max_length", None) is not None:
            logger.warning("Both `max_new_tokens` and `max_length` are given: `max_new_tokens` counts.")
        parts.append(given)
    earlier, later = parts
    if later.get("max_new_tokens") is not None or later.get("max_length") is not None:
        for name in ("max_new_tokens", "max_length"):
            earlier.pop(name, None)
    return earlier | later


class GenerationSettingsMixin:
    """Loads a model's `generation_config`, and settles what holds for a call."""

    # What it is mixed into has these.
    config: PreTrainedConfig
    generation_config: BlockDiffusionGenerationConfig

    def adjust_generation_fn(
        self,
        generation_config: BlockDiffusionGenerationConfig | None,
        from_auto_class: bool,
        from_pipeline: str | None,
        pretrained_model_name_or_path: str | os.PathLike | None,
        **kwargs: Any,
    ) -> None:
        """Called by `from_pretrained`: loads `generation_config.json` where the checkpoint has one."""
        if generation_config is not None:
            self.generation_config = generation_config
        if generation_config is not None or pretrained_model_name_or_path is None:
            return
        names = ("cache_dir", "force_download", "proxies", "local_files_only", "token", "revision", "subfolder")
        location = {name: value for name, value in kwargs.items() if name in names and value is not None}
        if os.path.isdir(pretrained_model_name_or_path):
            # transformers takes the subfolder `model` of a relative path `model` for its parent.
            pretrained_model_name_or_path = os.path.abspath(pretrained_model_name_or_path)
        try:
            config = BlockDiffusionGenerationConfig.from_pretrained(pretrained_model_name_or_path, **location)
            self.generation_config = config  # type: ignore[assignment]  # transformers says its own class
        except OSError:
            # There is no such file: the settings that follow from the model's configuration stay.
            if os.path.isfile(
                os.path.join(pretrained_model_name_or_path, location.get("subfolder", ""), "generation_config.json")
            ):
                raise
        except TypeError as error:
            # The file was written for autoregressive generation; what it says of special tokens holds here too.
            try:
                foreign = GenerationConfig.from_pretrained(pretrained_model_name_or_path, **location)
            except ValueError:
                foreign = None
            if foreign is None or hasattr(foreign, "block_length"):
                raise  # It was written for block diffusion, and holds what is unknown.
            for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
                if getattr(foreign, name) is not None:
                    setattr(self.generation_config, name, getattr(foreign, name))
            logger.warning("Of `generation_config.json` only the special tokens are used: %s", error)

    def settle_generation_config(
        self, generation_config: GenerationConfig | None, kwargs: dict[str, Any]
    ) -> BlockDiffusionGenerationConfig:
        """
        The settings of a call: of the model, of the call's configuration, of its `kwargs`; the later word counts.

        Raises:
            ValueError, TypeError: for a setting that is unknown or out of range.
        """
        check_generation_config(generation_config)
        # peft puts its own there for a prompt that was learnt.
        owner = getattr(vars(self).get("prepare_inputs_for_generation"), "__self__", None)
        if getattr(getattr(owner, "active_peft_config", None), "is_prompt_learning", False):
            raise ValueError("A prompt that peft has learnt cannot be put before what is generated here; use LoRA.")
        text_config = self.config.get_text_config()
        defaults = BlockDiffusionGenerationConfig.from_model_config(text_config)
        config = defaults
        settings: dict[str, Any] = {}
        for given in (self.generation_config, generation_config):
            if isinstance(given, BlockDiffusionGenerationConfig):
                config, settings = given, {}
            elif given is not None:  # one of transformers
                settings |= settings_of(given)
        config = copy.deepcopy(config)
        settings = without_neutral(_one_length(settings, kwargs))
        strangers = without_neutral(settings_of(config))  # set as attributes, as `transformers serve` does
        config.check_names([*settings, *strangers])
        if "max_new_tokens" in settings:
            config.max_length = None
        config.update(**settings)
        if config.temperature == 0:
            config.do_sample = False
        for name in ("mask_token_id", "eos_token_id", "pad_token_id", "bos_token_id"):
            if getattr(config, name) is None:
                setattr(config, name, getattr(defaults, name))
            check_token_id(name, getattr(config, name), text_config.vocab_size)
        if config.mask_token_id is None:
            raise ValueError(
                "`mask_token_id` is not known from the checkpoint; pass `mask_token_id=tokenizer.mask_token_id`."
            )
        if config.block_length > text_config.max_position_embeddings:
            raise ValueError(
                f"`block_length` ({config.block_length}) exceeds `max_position_embeddings` "
                f"({text_config.max_position_embeddings})."
            )
        return config
