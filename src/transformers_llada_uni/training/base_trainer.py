"""What every trainer of the project does: check its arguments, resume to the bit, and write its model card."""

import os
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any, TypeVar

import torch
from datasets import Dataset, IterableDataset
from transformers import Trainer, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput
from trl.data_utils import get_dataset_column_names

from .checkpointing import last_complete_checkpoint, parameters_trained_in, write_trained_parameters
from .data.dataset_loading import AnyDataset
from .model_card import write_model_card


# What upstream's libraries say of each other and of a CPU, and nobody who trains can change
for category, message in (
    (FutureWarning, r"`\w*gradient_checkpointing\w*` is deprecated"),  # called by trl
    (UserWarning, "'pin_memory' argument is set as true but no accelerator is found"),
):
    warnings.filterwarnings("ignore", message, category)

MOST_NAMED = 3  # parameters in an error
Settings = TypeVar("Settings", bound=TrainingArguments)


def check_settings(args: Any, config_class: type[Settings], default_output_dir: str) -> Settings:
    """`args`, or the defaults. Raises TypeError if they are those of another trainer."""
    if args is None:
        return config_class(default_output_dir)
    if not isinstance(args, config_class):
        raise TypeError(f"`args` must be a {config_class.__name__}, got {type(args).__name__}.")
    return args


def check_class(name: str, value: Any, expected: type) -> None:
    if not isinstance(value, expected):
        raise TypeError(f"`{name}` must be a {expected.__name__}, got {type(value).__name__}.")


def check_has_columns(argument: str, dataset: AnyDataset, columns: Collection[str]) -> None:
    found = get_dataset_column_names(dataset)
    missing = [column for column in columns if column not in found]
    if missing:
        raise ValueError(
            f"`{argument}` must have a column {' and a column '.join(f'`{column}`' for column in missing)}, it has "
            f"{sorted(found)}."
        )


class BaseTrainer(Trainer):
    """
    First in the bases of a trainer, before that of transformers or trl which it extends:

    - `train(resume_from_checkpoint=True)` goes on from the newest *complete* checkpoint, and begins anew where a run
      was stopped before its first one; a run that was finished stays as it is;
    - a checkpoint of a run that trained other parameters is refused: what the optimiser remembers is told apart by its
      order alone;
    - `create_model_card` says what was trained on what, with which settings, and what came out.
    """

    _stage = "training"  # what the card calls it
    _columns: tuple[str, ...] = ()  # that rows must have
    _is_saving_checkpoint = False  # or else the result of the run
    _trained_before_wrapped: list[str]  # sharding and compiling give parameters other names

    @classmethod
    def check_columns(cls, argument: str, dataset: AnyDataset) -> None:
        """
        What can be said of data before there is a model.

        Args:
            argument: What the error calls it.
            dataset: One split.

        Raises:
            ValueError: if rows with such columns cannot be trained on.
        """
        check_has_columns(argument, dataset, cls._columns)

    @classmethod
    def _check_datasets(cls, train_dataset: Any, eval_dataset: Any) -> None:
        """Both must be datasets with rows and the columns that are needed; `eval_dataset` may be `None`."""
        for name, dataset in (("train_dataset", train_dataset), ("eval_dataset", eval_dataset)):
            if dataset is None and name == "eval_dataset":
                continue
            if not isinstance(dataset, Dataset | IterableDataset):
                hint = f"; choose one of its splits {sorted(dataset)}" if isinstance(dataset, dict) else ""
                raise TypeError(
                    f"`{name}` must be a Dataset or an IterableDataset, got {type(dataset).__name__}{hint}."
                )
            if isinstance(dataset, Dataset) and not len(dataset):
                raise ValueError(f"`{name}` has no rows.")
            cls.check_columns(name, dataset)

    def check_checkpoint(self, folder: str) -> None:
        """
        What can be said of a checkpoint before it is loaded.

        Raises:
            ValueError: if the run cannot go on from it.
        """
        before, now = parameters_trained_in(folder), self._trained_parameters()
        if before is None or before == now:
            return
        for this, other, names in (
            ("that run trained", "this one does not train", sorted(set(before) - set(now))),
            ("this run trains", "that one did not train", sorted(set(now) - set(before))),
        ):
            if names:
                more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
                raise ValueError(
                    f"`resume_from_checkpoint`: {folder!r} is of a run that trains other parameters: {this}, and "
                    f"{other}, {', '.join(names[:MOST_NAMED])}{more}. A run keeps its settings."
                )
        raise ValueError(f"`resume_from_checkpoint`: {folder!r} is of a run whose parameters were in another order.")

    def _trained_parameters(self) -> list[str]:
        assert self.model is not None
        return [name for name, parameter in self.model.named_parameters() if parameter.requires_grad]

    def train(
        self, resume_from_checkpoint: str | os.PathLike[str] | bool | None = None, *args: Any, **kwargs: Any
    ) -> TrainOutput:
        if isinstance(resume_from_checkpoint, os.PathLike):
            resume_from_checkpoint = os.fspath(resume_from_checkpoint)
        if resume_from_checkpoint is True:
            assert self.args.output_dir is not None
            resume_from_checkpoint = last_complete_checkpoint(self.args.output_dir)
        if isinstance(resume_from_checkpoint, str):
            self.check_checkpoint(resume_from_checkpoint)
        self._trained_before_wrapped = self._trained_parameters()
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _init_training_state(
        self, max_steps: int, num_update_steps_per_epoch: int, num_train_epochs: int, *args: Any, **kwargs: Any
    ) -> tuple[int, int]:
        epochs_trained, steps_trained = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, *args, **kwargs
        )
        # transformers looks whether a run is over after a step; one that was over within an epoch would do one more.
        return (num_train_epochs, 0) if self.state.global_step >= max_steps else (epochs_trained, steps_trained)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        self._is_saving_checkpoint = True
        folder = Path(self._get_output_dir(trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        if self.args.should_save:  # over an older run's checkpoint: it is not whole until the file comes back
            (folder / TRAINER_STATE_NAME).unlink(missing_ok=True)
            write_trained_parameters(folder, self._trained_before_wrapped)
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._is_saving_checkpoint = False

    def create_model_card(  # type: ignore[override]  # trl's arguments, by which `push_to_hub` calls it
        self,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        """
        Writes `README.md` into the output folder.

        Args:
            model_name: Default: the Hub repository's name, else the folder's.
            dataset_name: Name or path of the data.
            tags: Added to the card's tags.
            kwargs: Further fields of [`~huggingface_hub.ModelCardData`], such as `language` or `license`.
        """
        if self.is_world_process_zero():
            tags = [tags] if isinstance(tags, str) else list(tags or [])
            write_model_card(self, self._stage, model_name or self.hub_model_id, dataset_name, tags, **kwargs)
