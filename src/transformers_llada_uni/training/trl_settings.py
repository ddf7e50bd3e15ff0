"""What the configurations do with the settings they inherit from trl."""

from typing import Any

import torch


def refuse_without_meaning(config: Any, table: dict[str, tuple[Any, str]]) -> None:
    """
    Refuses settings of trl that have no meaning for block diffusion.

    Args:
        config: A configuration of trl.
        table: For each setting the only value it may have, and why.

    Raises:
        ValueError: that names the setting.
    """
    for name, (value, reason) in table.items():
        if getattr(config, name) != value:
            raise ValueError(f"`{name}` must stay {value!r}, got {getattr(config, name)!r}: {reason}.")


def settle_defaults(config: Any) -> None:
    """
    trl computes in bfloat16 unless told otherwise; on a CPU that is slow, and off by default here. trl sets
    `gradient_checkpointing`, which is deprecated, by default; without a warning, it is what its new name says.
    """
    if config.bf16 is None and not config.fp16:
        config.bf16 = not config.use_cpu and torch.accelerator.is_available()
    if config.activation_checkpointing is None:
        config.activation_checkpointing = config.gradient_checkpointing
    if config.activation_checkpointing_kwargs is None:
        config.activation_checkpointing_kwargs = config.gradient_checkpointing_kwargs
