"""`info`: what a folder holds, and how it fits into this machine."""

import json
from math import prod
from pathlib import Path
from typing import Annotated, Any

import typer
from safetensors import SafetensorError, safe_open

from ..json_files import read_object
from ..pipeline_loading import configurations_of, locate
from ..trained_parts import is_adapter


GIB = 2**30
# Beside the weights: activations, keys and values, recorded steps. Measured in docs/performance.md for one image of
# 1024 x 1024 at a time.
WORKING_SPACE = 4 * GIB
# Of numbers that are no floating point of 16 bits or more, and so stay as they are when they are loaded
BYTES = {"I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2}
FLOATS = ("F64", "F32", "F16", "BF16")
# What a model that stands alone is for, by its class as the release names it, and as ours are named
USES = {
    "BailingMoeV2ForCausalLM": "An autoregressive model: `llada-uni convert {path} FOLDER` makes one to train by "
    "block diffusion.",
    **dict.fromkeys(
        ("LLaDA2MoeModelLM", "LLaDA2MoeForBlockDiffusion"),
        "A language model without a pipeline: `llada-uni chat --model {path}` talks with it.",
    ),
}


def info(
    model: Annotated[str, typer.Argument(help="A folder, a Hub repository, or `emoji`.")] = "emoji",
    as_json: Annotated[bool, typer.Option("--json", help="One object of JSON.")] = False,
) -> None:
    """
    Say what a folder holds, and how it fits into this machine.

    Of a repository of the Hub only the configurations are fetched.
    """
    described = describe_folder(configurations_of(model))
    described["advice"] = advise(described, machine_memory())
    if as_json:
        typer.echo(json.dumps(described))
        return
    typer.echo(described["path"])
    for name, component in described["components"].items():
        size = f"{component['parameters'] / 1e6:10.1f} M" if component["parameters"] else " " * 12
        kinds = ", ".join(component["dtypes"]) if component["is_complete"] else "without its weights"
        typer.echo(f"  {name:20} {size}  {component['class']}  {kinds}".rstrip())
    for line in described["advice"]:
        typer.echo(line)


def describe_folder(path: str) -> dict[str, Any]:
    """
    Of a pipeline's folder, a released checkpoint's, a model's, or an adapter's with what it stands upon: the
    components, with class, parameters and bytes.
    Where there is a configuration but no weights (`is_complete` is false then), parameters are those it asks for.

    Raises:
        ValueError: if it is neither, or a file in it is damaged; names the file.
    """
    folder = Path(path)
    index, config = folder / "model_index.json", folder / "config.json"
    is_released = False
    if is_adapter(folder):
        described = describe_folder(configurations_of(locate(path, takes_models=True).path))
        is_complete = any(folder.glob("*.safetensors"))
        described["components"]["adapter"] = {"class": "LoRA", **_weights(folder), "is_complete": is_complete}
        return described | {"path": path}
    if index.is_file():
        entries = read_object(index)
        # `[null, null]` is a component that is left out; what is no list is a setting.
        kinds = {name: value[1] for name, value in entries.items() if isinstance(value, list) and len(value) == 2}
        parts = {name: kind for name, kind in kinds.items() if isinstance(kind, str)}
        folders = {name: folder / name for name in parts}
    elif config.is_file():
        architectures = read_object(config).get("architectures")
        parts = {"model": str(architectures[0]) if isinstance(architectures, list) and architectures else "unknown"}
        folders = {"model": folder}
        is_released = (folder / "image_tokenizer").is_dir()
        for file in sorted(folder.glob("*/config.json")) if is_released else []:
            parts[file.parent.name] = str(read_object(file).get("_class_name", "unknown"))
            folders[file.parent.name] = file.parent
    else:
        raise ValueError(f"{path} holds neither `model_index.json` nor `config.json`.")
    components = {name: {"class": parts[name], **_weights(folders[name])} for name in parts if folders[name].is_dir()}
    return {
        "path": str(folder),
        "is_released": is_released,
        "components": components,
        "bytes": sum(component["bytes"] for component in components.values()),
    }


def _weights(folder: Path) -> dict[str, Any]:
    files = sorted(folder.glob("*.safetensors"))
    wanted = {folder / name for file in folder.glob("*.safetensors.index.json") for name in _shards(file)}
    is_complete = all(map(Path.is_file, wanted)) and bool(files)
    if not is_complete and (folder / "config.json").is_file():
        parameters = _parameters_of(folder / "config.json")
        is_complete = parameters == 0 and not wanted  # such as a processor
        return {
            "parameters": parameters,
            "bytes": 0,
            "loaded": 2 * parameters,
            "dtypes": [],
            "is_complete": is_complete,
        }
    parameters = loaded = 0
    dtypes = set()
    for file in files:
        with _open(file) as tensors:
            for name in tensors.keys():  # noqa: SIM118
                part = tensors.get_slice(name)
                dtype, count = part.get_dtype(), prod(part.get_shape())
                parameters += count
                loaded += count * (2 if dtype in FLOATS else BYTES.get(dtype, 1))
                dtypes.add(dtype)
    num_bytes = sum(file.stat().st_size for file in files)
    return {
        "parameters": parameters,
        "bytes": num_bytes,
        "loaded": loaded,  # in bfloat16, or as it is stored
        "dtypes": sorted(dtypes),
        "is_complete": True,
    }


def _shards(index: Path) -> set[str]:
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ValueError(f"{index} has no `weight_map`.")
    return set(map(str, weight_map.values()))


def _parameters_of(config_file: Path) -> int:
    """How many a component has by its configuration; 0 if that is not known. No memory is taken for them."""
    import diffusers
    import torch
    from transformers import AutoConfig

    import diffusers_llada_uni
    from transformers_llada_uni import LLaDA2MoeForBlockDiffusion, LLaDAUniForConditionalGeneration

    config = read_object(config_file)
    models = {"llada_uni": LLaDAUniForConditionalGeneration, "llada2_moe": LLaDA2MoeForBlockDiffusion}
    try:
        with torch.device("meta"):
            if config.get("model_type") in models:
                module = models[config["model_type"]](AutoConfig.from_pretrained(config_file.parent))
            elif name := config.get("_class_name"):
                kind = getattr(diffusers_llada_uni, name, None) or getattr(diffusers, name)
                module = kind.from_config(config)
            else:
                return 0
    except Exception as error:  # whatever a class raises of settings that it cannot have
        raise ValueError(f"{config_file} makes no component: {error}") from error
    return sum(parameter.numel() for parameter in module.parameters())


def _open(file: Path) -> Any:
    try:
        return safe_open(file, "pt")
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged: {error}") from error


def machine_memory() -> dict[str, int]:
    """Bytes of main memory (that of the container, in one), and of the largest GPU if there is one."""
    import psutil  # type: ignore[import-untyped]  # it has no annotations
    import torch

    memory = {"main": psutil.virtual_memory().total}
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file() and (text := limit.read_text().strip()).isdecimal():
        memory["main"] = min(memory["main"], int(text))
    if torch.cuda.is_available():
        devices = range(torch.cuda.device_count())
        memory["gpu"] = max(torch.cuda.get_device_properties(device).total_memory for device in devices)
    return memory


def advise(described: dict[str, Any], memory: dict[str, int]) -> list[str]:
    """
    How to load it, the fastest way first; each line a sentence.

    Args:
        described: Of [`describe_folder`].
        memory: Of [`machine_memory`].
    """
    components = described["components"]
    sizes = {name: component["loaded"] for name, component in components.items()}  # twice that in float32
    whole, model = sum(sizes.values()), sizes.get("model", 0)
    largest, rest = max(sizes.values(), default=0), whole - model
    gpu, main = memory.get("gpu", 0), memory["main"]
    lines = []
    if described["is_released"]:
        lines.append(f"A released checkpoint: `llada-uni convert {described['path']} FOLDER` makes a pipeline of it.")
    elif set(components) == {"model"} and (use := USES.get(components["model"]["class"])):
        lines.append(use.format(path=described["path"]))
    if missing := [name for name, component in components.items() if not component["is_complete"]]:
        lines.append(f"Weights are missing: {', '.join(missing)}. What follows holds once they are there.")
    fits = len(lines)
    if gpu and whole + WORKING_SPACE <= gpu:
        lines.append(f"It fits the GPU as it is, in bfloat16: {_gib(whole)} of {_gib(gpu)}.")
    elif gpu:
        if largest + WORKING_SPACE <= gpu and whole <= main:
            lines.append("In Python, `pipe.enable_model_cpu_offload()`: one component at a time on the GPU.")
        if set(components.get("model", {}).get("dtypes", ())) <= set(FLOATS):  # not quantised yet
            four_bits = int(0.3 * model)
            others = max((size for name, size in sizes.items() if name != "model"), default=0)
            if four_bits + rest + WORKING_SPACE <= gpu:
                size = f"{_gib(four_bits + rest)} of {_gib(gpu)}"
                lines.append(f"`GroupwiseQuantizationConfig(bits=4)` for the language model: {size}.")
            elif max(four_bits, others) + GIB <= gpu:
                lines.append(
                    "In Python, `GroupwiseQuantizationConfig(bits=4)` and `pipe.enable_model_cpu_offload()` together."
                )
    if 2 * whole + GIB <= main:
        lines.append(f"It fits main memory in float32, on the CPU: {_gib(2 * whole)} of {_gib(main)}.")
    elif whole + GIB <= main:
        lines.append(
            "It fits main memory with `--device cpu --dtype bfloat16`, where that is slow: "
            f"{_gib(whole)} of {_gib(main)}."
        )
    if len(lines) == fits:
        lines.append(f"It does not fit: {_gib(whole)} in bfloat16, of main memory {_gib(main)}.")
    return lines


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.1f} GiB"
