"""What the trainers of the pipeline's parts check of their arguments before any work."""

from collections.abc import Collection
from typing import Any

from datasets import Dataset, IterableDataset
from trl.data_utils import get_dataset_column_names


def check_class(name: str, value: Any, expected: type) -> None:
    if not isinstance(value, expected):
        raise TypeError(f"`{name}` must be a {expected.__name__}, got {type(value).__name__}.")


def check_datasets(train_dataset: Any, eval_dataset: Any, columns: Collection[str]) -> None:
    """Both must be datasets with these columns and rows; `eval_dataset` may be `None`."""
    for name, dataset in (("train_dataset", train_dataset), ("eval_dataset", eval_dataset)):
        if dataset is None and name == "eval_dataset":
            continue
        if not isinstance(dataset, Dataset | IterableDataset):
            hint = f"; choose one of its splits {sorted(dataset)}" if isinstance(dataset, dict) else ""
            raise TypeError(f"`{name}` must be a Dataset or an IterableDataset, got {type(dataset).__name__}{hint}.")
        if isinstance(dataset, Dataset) and not len(dataset):
            raise ValueError(f"`{name}` has no rows.")
        found = get_dataset_column_names(dataset)
        missing = [column for column in columns if column not in found]
        if missing:
            raise ValueError(
                f"`{name}` must have a column {' and a column '.join(f'`{column}`' for column in missing)}, it has "
                f"{sorted(found)}."
            )
