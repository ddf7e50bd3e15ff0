"""
Reading, writing and comparing safetensors files one tensor at a time.

A checkpoint is described by `TensorRef`s (a name, where its data is, and its shape and dtype, known from the file's
header), so that a whole conversion is planned and checked before the first byte of data is read. Writing then holds
one tensor at a time, whatever the size of the file.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from llada_uni.conversion.config_files import read_json


# Output files of a component are cut at this size; diffusers and transformers use the same order of magnitude.
MAX_SHARD_BYTES = 5 * 10**9

# dtype names of the safetensors format
_DTYPE_OF_NAME = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAME_OF_DTYPE = {dtype: name for name, dtype in _DTYPE_OF_NAME.items()}


@dataclass(frozen=True)
class TensorRef:
    """A tensor that lies in a file: `key` in `file`, of `shape` and `dtype`."""

    file: Path
    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class OutputTensor:
    """A tensor to write under `name`: the data of `source`, as `dtype`; a `change` of its values comes before."""

    name: str
    source: TensorRef
    dtype: torch.dtype
    change: Callable[[torch.Tensor], torch.Tensor] | None = None

    @property
    def num_bytes(self) -> int:
        return prod(self.source.shape) * self.dtype.itemsize


def _unreadable(path: Path, error: Exception) -> ValueError:
    return ValueError(f"{path} cannot be read; it is truncated or corrupt ({' '.join(str(error).split())}).")


def _load_pickled(path: Path) -> dict[str, torch.Tensor]:
    try:
        state_dict = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zipfile and torch each have their own way to say no
        raise _unreadable(path, error) from error
    is_state_dict = isinstance(state_dict, dict) and all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in state_dict.items()
    )
    if not is_state_dict:
        raise ValueError(f"{path} should hold a state dict (names and tensors).")
    for name, tensor in state_dict.items():
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.dtype not in _NAME_OF_DTYPE:
            raise ValueError(f"{path}: {name!r} is no plain tensor of a known dtype.")
    return state_dict


@contextmanager
def open_tensors(path: Path) -> Iterator[Callable[[str], torch.Tensor]]:
    """
    Opens a safetensors file, or a `.pt` state dict (read with `weights_only=True`), and gives the function that reads
    one of its tensors.

    Raises:
        ValueError: if the file is truncated, corrupt, or would need code to be unpickled.
    """
    if path.suffix == ".pt":
        yield _load_pickled(path).__getitem__
        return
    try:
        file = safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise _unreadable(path, error) from error
    with file:
        yield file.get_tensor


def list_tensors(path: Path) -> dict[str, TensorRef]:
    """
    The tensors of one file, by name, from its header alone.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is truncated or corrupt, or holds a dtype this converter does not know.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing.")
    if path.suffix == ".pt":
        tensors = _load_pickled(path)
        return {name: TensorRef(path, name, tuple(t.shape), t.dtype) for name, t in tensors.items()}
    refs = {}
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                view = file.get_slice(name)
                if view.get_dtype() not in _DTYPE_OF_NAME:
                    raise ValueError(f"{path}: tensor {name!r} has the unknown dtype {view.get_dtype()}.")
                refs[name] = TensorRef(path, name, tuple(view.get_shape()), _DTYPE_OF_NAME[view.get_dtype()])
    except (SafetensorError, OSError) as error:
        raise _unreadable(path, error) from error
    return refs


def list_checkpoint(folder: Path, stem: str) -> dict[str, TensorRef]:
    """
    The tensors of a checkpoint: `{stem}.safetensors`, or the shards that `{stem}.safetensors.index.json` names.

    Raises:
        FileNotFoundError: if neither file is there, or a shard is missing.
        ValueError: if a shard cannot be read, or index and shards disagree.
    """
    single = folder / f"{stem}.safetensors"
    index_file = folder / f"{stem}.safetensors.index.json"
    if single.is_file():
        return list_tensors(single)
    if not index_file.is_file():
        raise FileNotFoundError(f"{folder} holds neither {single.name} nor {index_file.name}.")
    weight_map = read_json(index_file).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index_file} has no `weight_map`.")
    for name, shard in weight_map.items():
        # Only files of this folder: whoever wrote the index shall not choose what else of this machine is read.
        if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise ValueError(
                f"{index_file}: `weight_map` should name a .safetensors file beside it, got {shard!r:.200} for {name}."
            )
    refs: dict[str, TensorRef] = {}
    for shard in sorted(set(weight_map.values())):
        if not (folder / shard).is_file():
            raise FileNotFoundError(f"{folder / shard} is missing, but {index_file.name} names it.")
        in_shard = list_tensors(folder / shard)
        named = {name for name, file in weight_map.items() if file == shard}
        check_names(f"{folder / shard} (against {index_file.name})", in_shard.keys(), named)
        refs |= in_shard
    return refs


def some(names: Iterable[str], limit: int = 8) -> str:
    names = sorted(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def check_names(what: str, found: Iterable[str], expected: Iterable[str]) -> None:
    """Raises a `ValueError` that names the missing and the extra tensors of `what`."""
    found, expected = set(found), set(expected)
    problems = []
    if expected - found:
        problems.append(f"{len(expected - found)} missing: {some(expected - found)}")
    if found - expected:
        problems.append(f"{len(found - expected)} extra: {some(found - expected)}")
    if problems:
        raise ValueError(f"Tensors of {what} are not as they should be; {'; '.join(problems)}.")


def check_tensors(what: str, found: Mapping[str, TensorRef], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raises a `ValueError` that names the missing, extra and misshapen tensors of `what`."""
    check_names(what, found, expected)
    misshapen = [
        f"{name} has shape {list(ref.shape)}, its config implies {list(expected[name])}"
        for name, ref in found.items()
        if tuple(expected[name]) != ref.shape
    ]
    if misshapen:
        raise ValueError(f"Tensors of {what} are misshapen; {some(misshapen, limit=4)}.")


def check_floating_point(tensors: Mapping[str, TensorRef]) -> None:
    """Raises a `ValueError` that names a tensor of integers: weights are none."""
    for name, ref in tensors.items():
        if not ref.dtype.is_floating_point:
            raise ValueError(f"{ref.file}: tensor {name!r} should hold floating-point numbers, it holds {ref.dtype}.")


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether a tensor has neither NaN nor infinity, in one pass where it has not."""
    values = tensor.to(torch.float16) if tensor.dtype.itemsize == 1 and tensor.is_floating_point() else tensor
    return bool(values.sum().isfinite()) or bool(values.isfinite().all())  # a sum may also overflow


def cast(tensor: torch.Tensor, name: str, dtype: torch.dtype) -> torch.Tensor:
    """
    The tensor as `dtype`, contiguous.

    Raises:
        ValueError: if a finite value becomes infinite, as large bfloat16 values do in float16.
    """
    if tensor.dtype == dtype:
        return tensor.contiguous()
    result = tensor.to(dtype).contiguous()
    if dtype.itemsize < tensor.dtype.itemsize or dtype == torch.float16:
        overflow = result.isinf() & tensor.isfinite()
        if overflow.any():
            raise ValueError(
                f"{name}: {int(overflow.sum())} values do not fit into {str(dtype).removeprefix('torch.')}; choose "
                "bfloat16 or float32."
            )
    return result


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _in_reading_order(outputs: Sequence[OutputTensor]) -> list[OutputTensor]:
    # Wider dtypes first keeps every tensor aligned, which is also the order in which safetensors itself writes.
    return sorted(outputs, key=lambda output: (-output.dtype.itemsize, str(output.source.file), output.name))


def _read_each(outputs: Sequence[OutputTensor]) -> Iterator[tuple[OutputTensor, torch.Tensor]]:
    """Each output with its data, cast; only one source file is open at a time."""
    start = 0
    while start < len(outputs):
        file = outputs[start].source.file
        end = start
        with open_tensors(file) as get:
            while end < len(outputs) and outputs[end].source.file == file:
                output = outputs[end]
                tensor = get(output.source.key)
                tensor = tensor if output.change is None else output.change(tensor)
                yield output, cast(tensor, output.name, output.dtype)
                end += 1
        start = end


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """The system does not say which file a write failed on, torch and tokenizers have errors of their own."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
    except (ValueError, MemoryError):
        raise
    except Exception as error:
        raise OSError(f"{path} cannot be written: {' '.join(str(error).split())}.") from error


def write_safetensors(
    path: Path, outputs: Sequence[OutputTensor], report: Callable[[OutputTensor, torch.Tensor], object]
) -> None:
    """
    Writes a safetensors file, one tensor at a time, and flushes it to disk. `report` is called with each tensor
    written.

    Raises:
        OSError: naming `path`, if it cannot be written.
    """
    outputs = _in_reading_order(outputs)
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for output in outputs:
        header[output.name] = {
            "dtype": _NAME_OF_DTYPE[output.dtype],
            "shape": list(output.source.shape),
            "data_offsets": [offset, offset + output.num_bytes],
        }
        offset += output.num_bytes
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with writing(path), open(path, "wb") as file:
        file.write(len(encoded).to_bytes(8, "little"))
        file.write(encoded)
        for output, tensor in _read_each(outputs):
            file.write(_bytes_of(tensor).numpy().data)
            report(output, tensor)
        file.flush()
        os.fsync(file.fileno())


def write_pickled(
    path: Path, outputs: Sequence[OutputTensor], report: Callable[[OutputTensor, torch.Tensor], object]
) -> None:
    """Writes a `.pt` state dict. The file is held in memory; the release has one, of the size of an embedding."""
    state_dict = {}
    for output, tensor in _read_each(outputs):
        state_dict[output.name] = tensor.clone()
        report(output, tensor)
    with writing(path):
        torch.save(state_dict, path)


def verify_tensors(
    path: Path, outputs: Sequence[OutputTensor], report: Callable[[OutputTensor, torch.Tensor], object]
) -> None:
    """
    Compares a written file with its sources: the same names, shapes and dtypes, and every tensor bit for bit (after
    the cast, where there is one).

    Raises:
        ValueError: if they differ.
    """
    written = list_tensors(path)
    check_tensors(str(path), written, {output.name: output.source.shape for output in outputs})
    with open_tensors(path) as get:
        for output, tensor in _read_each(_in_reading_order(outputs)):
            copy = get(output.name)
            if copy.dtype != output.dtype or not torch.equal(_bytes_of(copy), _bytes_of(tensor)):
                raise ValueError(f"{path}: tensor {output.name!r} differs from its source {output.source.file}.")
            report(output, tensor)


def split_by_size(outputs: Sequence[OutputTensor], max_bytes: int | None = None) -> list[list[OutputTensor]]:
    """Cuts a checkpoint into shards of at most `max_bytes` (a larger tensor has a shard of its own)."""
    max_bytes = MAX_SHARD_BYTES if max_bytes is None else max_bytes
    shards: list[list[OutputTensor]] = [[]]
    size = 0
    for output in outputs:
        if shards[-1] and size + output.num_bytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(output)
        size += output.num_bytes
    return shards


def name_shards(stem: str, shards: Sequence[Sequence[OutputTensor]]) -> dict[str, list[OutputTensor]]:
    """File names as transformers and diffusers look for them: `{stem}.safetensors`, or `{stem}-0000i-of-0000n`."""
    if len(shards) == 1:
        return {f"{stem}.safetensors": list(shards[0])}
    return {
        f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors": list(shard)
        for number, shard in enumerate(shards, start=1)
    }


def index_of(files: Mapping[str, Sequence[OutputTensor]]) -> dict[str, Any]:
    """The content of the `.safetensors.index.json` that belongs to these files."""
    return {
        "metadata": {"total_size": sum(output.num_bytes for outputs in files.values() for output in outputs)},
        "weight_map": {output.name: file for file, outputs in files.items() for output in outputs},
    }
