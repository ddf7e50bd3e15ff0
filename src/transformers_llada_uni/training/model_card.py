"""The model card of a training run: what was trained on what, with which settings, and what came out."""

import dataclasses
import importlib.resources
import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

from accelerate.utils import is_peft_model
from huggingface_hub import ModelCard, ModelCardData
from transformers import Trainer


TEMPLATE = "model_card_template.md"
# Settings that say where and how a run is watched, not what it computes.
UNTOLD_SETTINGS = {
    "output_dir",
    "logging_dir",
    "run_name",
    "report_to",
    "push_to_hub",
    "hub_model_id",
    "hub_token",
    "hub_private_repo",
    "resume_from_checkpoint",
    "disable_tqdm",
    "local_rank",
    "model_init_kwargs",
    # What transformers works out by itself
    "accelerator_config",
    "activation_checkpointing",
    "debug",
    "pad_to_multiple_of",
}


def changed_settings(args: Any) -> dict[str, Any]:
    """The fields of a config dataclass that differ from their defaults, in their order."""
    changed = {}
    for field in dataclasses.fields(args):
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        value = getattr(args, field.name)
        if field.init and value != default and field.name not in UNTOLD_SETTINGS:
            changed[field.name] = getattr(value, "value", value)  # an enum by its value
    return changed


def last_metrics(log_history: list[dict[str, float]]) -> dict[str, float]:
    """The last value that each number was logged with."""
    metrics: dict[str, float] = {}
    for entry in log_history:
        metrics |= {name: value for name, value in entry.items() if isinstance(value, (int, float))}
    for name in ("step", "epoch"):
        metrics.pop(name, None)
    return metrics


def write_model_card(
    trainer: Trainer, stage: str, model_name: str | None, dataset_name: str | None, tags: list[str], **kwargs: Any
) -> None:
    """
    Fills `model_card_template.md` and writes it as `README.md` into the output folder.

    Args:
        trainer: Whose run it was.
        stage: What the trainer does, in words.
        model_name: Default: the folder's.
        dataset_name: Name or path of the data.
        tags: Added to the card's tags.
        **kwargs: Further fields of [`~huggingface_hub.ModelCardData`].
    """
    output_dir = Path(str(trainer.args.output_dir))
    base_model = getattr(getattr(trainer.model, "config", None), "name_or_path", None) or None
    card_data = ModelCardData(
        # A local folder is no model of the Hub.
        base_model=None if base_model is None or os.path.isdir(base_model) else base_model,
        datasets=None if dataset_name is None or os.path.exists(dataset_name) else [dataset_name],
        library_name="transformers",
        tags=["llada-uni", "block-diffusion", "generated_from_trainer", *tags],
        **kwargs,
    )
    libraries = ("llada-uni", "transformers", "trl", "peft", "datasets", "torch")
    card = ModelCard.from_template(
        card_data,
        template_str=importlib.resources.files(__package__).joinpath(TEMPLATE).read_text(encoding="utf-8"),
        model_name=model_name or output_dir.resolve().name,
        base_model=base_model,
        adapter=trainer.hub_model_id or str(output_dir) if is_peft_model(trainer.model) else None,
        dataset_name=dataset_name,
        stage=stage,
        trainer=type(trainer).__name__,
        num_steps=trainer.state.global_step,
        settings=changed_settings(trainer.args),
        metrics=last_metrics(trainer.state.log_history),
        versions={library: version(library) for library in libraries},
    )
    output_dir.mkdir(parents=True, exist_ok=True)
    part = output_dir / ".README.md.part"
    card.save(part)
    part.replace(output_dir / "README.md")
