"""Which checkpoint of a run is whole, and what was trained in it."""

import json
import os
import re
from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR


TRAINED_PARAMETERS_NAME = "trained_parameters.json"


def last_complete_checkpoint(output_dir: str | os.PathLike[str]) -> str | None:
    """
    The newest checkpoint of a run that was written to its end, or `None`.

    A kill while a checkpoint is being written leaves a folder without a readable `trainer_state.json`, which is
    written last; such folders are passed over.
    """
    numbered = []
    for folder in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        match = re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", folder.name)
        if match and folder.is_dir():
            numbered.append((int(match.group(1)), folder))
    for _, folder in sorted(numbered, reverse=True):
        try:
            json.loads((folder / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        return str(folder)
    return None


def write_trained_parameters(folder: Path, names: list[str]) -> None:
    """Beside the optimiser's state, which holds no names; `names` in the model's order."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / TRAINED_PARAMETERS_NAME).write_text(json.dumps(names, indent=0) + "\n", encoding="utf-8")


def parameters_trained_in(folder: str | os.PathLike[str]) -> list[str] | None:
    """What `write_trained_parameters` wrote, or `None` in a checkpoint that does not say it."""
    file = Path(folder, TRAINED_PARAMETERS_NAME)
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
