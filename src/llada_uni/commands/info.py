"""`info`: what a folder holds, and how it fits into this machine."""

import json
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open


GIB = 2**30
# Beside the weights: activations, keys and values, recorded steps. Measured in docs/performance.md for one image of
# 1024 x 1024 at a time.
WORKING_SPACE = 4 * GIB


def describe_folder(path: str) -> dict[str, Any]:
    """
    Of a pipeline's folder, or a model's: its components, with class, parameters and bytes.

    Raises:
        ValueError: if it is neither.
    """
    folder = Path(path)
    index, config = folder / "model_index.json", folder / "config.json"
    if index.is_file():
        entries = json.loads(index.read_text())
        parts = {name: value[1] for name, value in entries.items() if isinstance(value, list) and value[1]}
        folders = {name: folder / name for name in parts}
    elif config.is_file():
        parts = {"model": (json.loads(config.read_text()).get("architectures") or ["unknown"])[0]}
        folders = {"model": folder}
    else:
        raise ValueError(f"{path} holds neither `model_index.json` nor `config.json`.")
    components = {name: {"class": parts[name], **_weights(folders[name])} for name in parts if folders[name].is_dir()}
    return {
        "path": str(folder),
        "components": components,
        "bytes": sum(component["bytes"] for component in components.values()),
    }


def _weights(folder: Path) -> dict[str, Any]:
    parameters = num_bytes = 0
    dtypes = set()
    for file in sorted(folder.glob("*.safetensors")):
        num_bytes += file.stat().st_size
        with _open(file) as tensors:
            for name in tensors.keys():  # noqa: SIM118
                part = tensors.get_slice(name)
                count = 1
                for side in part.get_shape():
                    count *= side
                parameters += count
                dtypes.add(part.get_dtype())
    return {"parameters": parameters, "bytes": num_bytes, "dtypes": sorted(dtypes)}


def _open(file: Path) -> Any:
    try:
        return safe_open(file, "pt")
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged: {error}") from error


def machine_memory() -> dict[str, int]:
    """Bytes of main memory, and of the largest GPU if there is one."""
    import torch

    memory = {"main": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")}
    if torch.cuda.is_available():
        devices = range(torch.cuda.device_count())
        memory["gpu"] = max(torch.cuda.get_device_properties(device).total_memory for device in devices)
    return memory


def advise(components: dict[str, dict[str, Any]], memory: dict[str, int]) -> list[str]:
    """
    How to load it, the fastest way first; each line a sentence.

    Args:
        components: Of [`describe_folder`].
        memory: Of [`machine_memory`].
    """
    # As loaded: two bytes a parameter on a GPU, four on a CPU.
    sizes = {name: 2 * component["parameters"] for name, component in components.items()}
    whole, model = sum(sizes.values()), sizes.get("model", 0)
    largest, rest = max(sizes.values(), default=0), whole - model
    gpu, main = memory.get("gpu", 0), memory["main"]
    lines = []
    if gpu:
        if whole + WORKING_SPACE <= gpu:
            lines.append(f"It fits the GPU as it is, in bfloat16: {_gib(whole)} of {_gib(gpu)}.")
        if whole + WORKING_SPACE > gpu >= largest + WORKING_SPACE and whole <= main:
            lines.append("`pipe.enable_model_cpu_offload()`: one component at a time on the GPU.")
        four_bits = int(0.3 * model)
        if whole + WORKING_SPACE > gpu >= four_bits + rest + WORKING_SPACE:
            size = f"{_gib(four_bits + rest)} of {_gib(gpu)}"
            lines.append(f"`GroupwiseQuantizationConfig(bits=4)` for the language model: {size}.")
        elif whole + WORKING_SPACE > gpu >= max(four_bits, max(set(sizes.values()) - {model}, default=0)) + GIB:
            lines.append("`GroupwiseQuantizationConfig(bits=4)` and `pipe.enable_model_cpu_offload()` together.")
    if 2 * whole + GIB <= main:
        lines.append(f"It fits main memory in float32, on the CPU: {_gib(2 * whole)} of {_gib(main)}.")
    elif whole + GIB <= main:
        lines.append(
            f"It fits main memory in bfloat16, on the CPU, where that is slow: {_gib(whole)} of {_gib(main)}."
        )
    if not lines:
        lines.append(f"It does not fit: {_gib(whole)} in bfloat16, of main memory {_gib(main)}.")
    return lines


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.1f} GiB"
