"""Checkpoints that come with the package, for a first try and for tests, without the Hub."""

from pathlib import Path


FOLDER = Path(__file__).parent / "checkpoints"


def embedded_checkpoint(name: str = "emoji") -> Path:
    """
    The pipeline folder of a checkpoint that comes with the package.

    Args:
        name (`str`, defaults to `"emoji"`): `"emoji"` is a LLaDA-Uni of 22 million parameters that draws, names and
            edits emoji of 64 x 64 pixels, and scenes of up to nine; see its `README.md`.

    Raises:
        ValueError: if there is no such checkpoint.
    """
    path = FOLDER / name
    if name not in names_of_embedded_checkpoints():
        raise ValueError(f"`name` must be one of {names_of_embedded_checkpoints()}, got {name!r}.")
    return path


def names_of_embedded_checkpoints() -> list[str]:
    """What [`embedded_checkpoint`] knows."""
    return sorted(entry.parent.name for entry in FOLDER.glob("*/model_index.json"))
