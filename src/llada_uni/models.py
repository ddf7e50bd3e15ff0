"""The model that a name means, loaded for this machine."""

from pathlib import Path
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    import torch

    from diffusers_llada_uni import LLaDAUniPipeline

DTYPES = ("auto", "float32", "bfloat16", "float16")


def resolve_model(name: str) -> str:
    """
    A folder or a repository of the Hub.

    Args:
        name: A folder, a repository, or the name of a checkpoint that comes with the package (`emoji`).

    Raises:
        ValueError: if it is a path to nothing, or a folder without a pipeline.
    """
    from diffusers_llada_uni.embedded_checkpoints import embedded_checkpoint, names_of_embedded_checkpoints

    path = Path(name).expanduser()
    if path.exists():
        if (path / "model_index.json").is_file():
            return str(path)
        hint = "it is a model alone" if (path / "config.json").is_file() else "it holds no `model_index.json`"
        raise ValueError(
            f"`model` {name!r} is no pipeline: {hint}. `llada-uni convert` makes one of the released checkpoint."
        )
    if name in names_of_embedded_checkpoints():
        return str(embedded_checkpoint(name))
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise ValueError(
            f"`model` {name!r} is no folder here, no repository of the Hub (owner/name), and none of "
            f"{', '.join(names_of_embedded_checkpoints())}."
        )
    return name


def best_device() -> str:
    """`cuda` where there is one, then `mps`, else `cpu`."""
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def dtype_of(name: str, device: str) -> "torch.dtype":
    """The type of weights: `auto` is bfloat16 but on a CPU, where float32 is faster."""
    import torch

    if name not in DTYPES:
        raise ValueError(f"`dtype` must be one of {', '.join(DTYPES)}, got {name!r}.")
    if name == "auto":
        name = "float32" if device.startswith("cpu") else "bfloat16"
    return getattr(torch, name)


def load_pipeline(name: str, device: str | None = None, dtype: str = "auto") -> "LLaDAUniPipeline":
    """
    The pipeline of a name, on a device.

    Args:
        name: See [`resolve_model`].
        device: Default: [`best_device`].
        dtype: See [`dtype_of`].
    """
    path = resolve_model(name)
    device = device or best_device()
    _check_device(device)
    from diffusers_llada_uni import LLaDAUniPipeline

    return LLaDAUniPipeline.from_pretrained(path, dtype=dtype_of(dtype, device)).to(device)


def _check_device(device: str) -> None:
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # whatever a build of torch raises
        raise ValueError(f"`device` {device!r} cannot be had here: {str(error).splitlines()[0]}") from error
