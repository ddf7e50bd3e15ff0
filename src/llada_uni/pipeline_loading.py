"""The pipeline that a name means, loaded for this machine."""

import runpy
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .json_files import read_object
from .trained_parts import (
    CONFIG,
    base_of_adapter,
    is_adapter,
    is_pipeline_folder,
    merge_into_pipeline,
    merged,
    parts_in,
)


if TYPE_CHECKING:
    import torch

    from diffusers_llada_uni import LLaDAUniPipeline

    from .answers import ChatModel

DTYPES = ("auto", "float32", "bfloat16", "float16")


def resolve_model(name: str, takes_models: bool = False) -> str:
    """
    A folder or a repository of the Hub.

    Args:
        name: A folder, a repository, or the name of a checkpoint that comes with the package (`emoji`). It may be a
            LoRA adapter's.
        takes_models: Whether it may also be the folder of a language model alone, which can talk and not draw.

    Raises:
        ValueError: if it is a path to nothing, a folder without a pipeline, or an adapter upon such.
    """
    path = Path(name).expanduser()
    names = find_embedded()["names_of_embedded_checkpoints"]()
    # What else has the name of a model that comes with the package, such as a folder for its images, is not meant.
    if path.exists() and (name not in names or is_model(path, takes_models)):
        if is_pipeline_folder(path):
            kind = read_object(path / "model_index.json").get("_class_name")
            if kind != "LLaDAUniPipeline":
                raise ValueError(f"`model` {name!r} is a pipeline of another kind: {kind}.")
            return str(path)
        if is_adapter(path):
            _resolve_base(name, path, takes_models)
            return str(path)
        if (path / "config.json").is_file() and takes_models:
            return str(path)
        raise ValueError(f"`model` {name!r} {_why_no_pipeline(path)}")
    if name in names:
        return str(find_embedded()["embedded_checkpoint"](name))
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        meant = f" Did you mean `{name.lower()}`?" if name.lower() in names else ""
        raise ValueError(
            f"`model` {name!r} is no folder here, no repository of the Hub (owner/name), and none of "
            f"{', '.join(names)}.{meant}"
        )
    return name


@cache
def find_embedded() -> dict[str, Any]:
    """The module of the checkpoints that come with the package, without that package: its import takes seconds."""
    package = find_spec("diffusers_llada_uni")
    assert package is not None and package.origin is not None
    return runpy.run_path(str(Path(package.origin).with_name("embedded_checkpoints.py")))


def is_model(path: Path, takes_models: bool) -> bool:
    """Whether a folder can stand for a name; see [`resolve_model`]."""
    return is_pipeline_folder(path) or is_adapter(path) or (takes_models and (path / "config.json").is_file())


def _why_no_pipeline(folder: Path) -> str:
    """Of what is there, without `model_index.json`: what it is, and what makes a pipeline of it."""
    if not folder.is_dir():
        return "is a file, and no folder."
    kind = read_object(folder / "config.json").get("model_type") if (folder / "config.json").is_file() else None
    if kind == "llada_uni" or (kind is None and parts_in(folder)):
        return (
            "is a part of a pipeline, as training has written it: `llada-uni assemble FOLDER --into PIPELINE --output "
            "NEW` makes a pipeline of it and of the one that it was trained from, such as `emoji`."
        )
    if kind == "llada2_moe" and not any(folder.glob("*/config.json")):  # of a released checkpoint's other parts
        return (
            "is a language model alone, with which `ask` and `chat` can talk; it has no image tokenizer and no "
            "decoder. For images name a pipeline, such as `emoji`, or what `llada-uni convert` makes of LLaDA2.0-Uni."
        )
    for child in sorted(folder.iterdir()):
        if is_pipeline_folder(child) or is_adapter(child):
            return f"is no pipeline: it holds no `model_index.json`. Did you mean `{child}`?"
    alone = "it is a model alone, with which `ask` and `chat` can talk"
    hint = "it holds no `model_index.json`" if kind is None else alone
    return f"is no pipeline: {hint}. `llada-uni convert` makes one of the released checkpoint."


def _resolve_base(name: str, adapter: Path, takes_models: bool) -> str:
    base = base_of_adapter(name, adapter)
    if is_adapter(Path(base).expanduser()):
        raise ValueError(f"`model` {name!r} is an adapter (LoRA) upon {base!r}, which is an adapter as well.")
    try:
        return resolve_model(base, takes_models)
    except ValueError as error:
        raise ValueError(f"`model` {name!r} is an adapter (LoRA) upon {base!r}: {error}") from error


class Located(NamedTuple):
    """
    Args:
        path: The folder or repository of a model.
        is_pipeline: Whether it is a pipeline, not a language model alone.
        adapter: The folder or repository of an adapter that is to be added to it.
    """

    path: str
    is_pipeline: bool
    adapter: str | None = None


def locate(name: str, takes_models: bool = False) -> Located:
    """
    What a name means, a repository of the Hub asked for what it holds.

    Args and errors: as [`resolve_model`]; also ValueError, if the Hub cannot be asked.
    """
    path = resolve_model(name, takes_models)
    is_pipeline = _is_pipeline(name, path)
    adapter = None if is_pipeline else _adapter_in(name, path)
    if adapter is None:
        return Located(path, is_pipeline)
    base = _resolve_base(name, adapter, takes_models)
    return Located(base, _is_pipeline(base, base), path)


def _adapter_in(name: str, path: str) -> Path | None:
    """The folder with the configuration of an adapter; `None` if the folder or repository holds none."""
    if Path(path).is_dir():
        return Path(path) if is_adapter(Path(path)) else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return Path(hf_hub_download(path, CONFIG)).parent
    except EntryNotFoundError:  # also what was not fetched before, where the Hub cannot be asked
        return None
    except Exception as error:  # of the Hub, or of the network
        raise ValueError(f"`model` {name!r} cannot be fetched from the Hub: {error}") from error


def _is_pipeline(name: str, path: str) -> bool:
    """Whether a folder or repository is one. Raises ValueError, if neither the Hub nor what was fetched says it."""
    if Path(path).is_dir():
        return is_pipeline_folder(Path(path))
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import RemoteEntryNotFoundError

    try:
        return bool(hf_hub_download(path, "model_index.json"))
    except RemoteEntryNotFoundError:
        return False
    except Exception as error:  # of the Hub, or of the network
        # A model alone, or an adapter, which was fetched before
        if any(isinstance(try_to_load_from_cache(path, file), str) for file in ("config.json", CONFIG)):
            return False
        raise ValueError(f"`model` {name!r} is no folder here, and cannot be fetched from the Hub: {error}") from error


def configurations_of(name: str) -> str:
    """
    A folder with the configurations of a model: of a repository of the Hub these alone are fetched.

    Raises:
        ValueError: if there is none.
    """
    folder = Path(name).expanduser()
    if folder.is_dir() and (name not in find_embedded()["names_of_embedded_checkpoints"]() or is_model(folder, True)):
        return str(folder)
    path = resolve_model(name)
    if Path(path).is_dir():
        return path
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(path, allow_patterns=["*.json"])
    except Exception as error:  # of the Hub, or of the network
        raise ValueError(f"`model` {name!r} is no folder here, and cannot be fetched from the Hub: {error}") from error


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

    Raises:
        ValueError: if there is no such pipeline or device, or the pipeline cannot be loaded.
    """
    return _load_pipeline(name, locate(name), device, dtype)


def _load_pipeline(name: str, located: Located, device: str | None, dtype: str) -> "LLaDAUniPipeline":
    path, is_pipeline, adapter = located
    if not is_pipeline:  # of the Hub; folders have been looked into
        raise ValueError(
            f"`model` {name!r} is no pipeline: it holds no `model_index.json`. With a language model alone `ask` and "
            "`chat` can talk, but images need a decoder; `llada-uni convert` makes a pipeline of the released "
            "checkpoint's folder."
        )
    device = best_device() if device is None else device
    _check_device(device)
    torch_dtype = dtype_of(dtype, device)
    for file in Path(path).glob("*/*config.json"):  # those who read them next would look for them on the Hub
        read_object(file)
    from accelerate.utils.memory import should_reduce_batch_size

    from diffusers_llada_uni import LLaDAUniPipeline

    try:
        pipe = LLaDAUniPipeline.from_pretrained(path, dtype=torch_dtype).to(device)
        if adapter is not None:
            merge_into_pipeline(pipe, adapter)
            pipe.register_to_config(_name_or_path=adapter)  # as manifests name it
        return pipe
    except Exception as error:
        if should_reduce_batch_size(error):  # out of memory
            raise
        # A folder that is damaged or incomplete raises whatever its first reader raises.
        kind = "" if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: "
        raise ValueError(f"`model` {name!r} cannot be loaded: {kind}{error}") from error


@dataclass
class LanguageModel:
    """A language model without a pipeline around it, to talk with: see [`ChatModel`]."""

    model: Any
    processor: Any


def load_chat_model(name: str, device: str | None = None, dtype: str = "auto") -> "ChatModel":
    """
    What a name means to `ask` and `chat`: the language model of a pipeline, or one alone, such as the text-only
    LLaDA2.0-mini and LLaDA2.1-mini.

    Args and errors: as [`load_pipeline`].
    """
    located = locate(name, takes_models=True)
    path, is_pipeline, adapter = located
    if is_pipeline:
        return _load_pipeline(name, located, device, dtype).code_generator
    device = best_device() if device is None else device
    _check_device(device)
    from accelerate.utils.memory import should_reduce_batch_size

    import transformers_llada_uni  # noqa: F401  makes the Auto classes know the models
    from transformers_llada_uni.loading.model_loading import load_model, load_processor

    try:
        model: Any = load_model(path, dtype=dtype_of(dtype, device)).eval()
        if adapter is not None:
            model = merged(model, adapter)
        processor: Any = load_processor(path)
        model.to(device)
    except Exception as error:
        if should_reduce_batch_size(error):  # out of memory
            raise
        raise ValueError(f"`model` {name!r} cannot be loaded: {error}") from error
    if model.generation_config.mask_token_id is None:
        model.generation_config.mask_token_id = getattr(processor, "tokenizer", processor).mask_token_id
    return LanguageModel(model, processor)


def _check_device(device: str) -> None:
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # whatever a build of torch raises
        raise ValueError(f"`device` {device!r} cannot be had here: {str(error).splitlines()[0]}") from error
