"""The decoders of a pipeline by the names that `decoder=` takes: components, settings of schedulers, defaults."""

from typing import Any, TypeVar


# Name -> component, component of its scheduler
DECODERS = {"turbo": ("transformer_turbo", "scheduler_turbo"), "normal": ("transformer", "scheduler")}
# Arguments of FlowMatchEulerDiscreteScheduler
SCHEDULER_SETTINGS: dict[str, dict[str, Any]] = {
    "turbo": {"shift": 1.0, "stochastic_sampling": True},
    "normal": {"shift": 6.0},
}
# Of the decoding, where none are given
DEFAULT_STEPS = {"turbo": 8, "normal": 50}
DEFAULT_GUIDANCE = {"turbo": 0.0, "normal": 1.0}

Component = TypeVar("Component")


def loaded(name: str, component: Component | None) -> Component:
    """Raises ValueError that names it, if a component is absent."""
    if component is None:
        raise ValueError(f"The pipeline needs the component `{name}`, which is not loaded.")
    return component
