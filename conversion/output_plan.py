"""What a conversion writes, planned before any data is read, and how it is written: all of it or nothing."""

import os
import shutil
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from llada_uni.conversion import tensor_files as files
from llada_uni.conversion.llada_uni_layout import SCALE_SUFFIX, stored_dtype
from llada_uni.conversion.tensor_files import OutputTensor, TensorRef


@dataclass
class Plan:
    """
    What to write.

    Args:
        tensors: The tensors of each safetensors file, whose path is relative to the destination.
        pickled: The same for `.pt` files.
        small_files: Functions that write configs and the like into the folder they are given.
    """

    tensors: dict[str, list[OutputTensor]] = field(default_factory=dict)
    pickled: dict[str, list[OutputTensor]] = field(default_factory=dict)
    small_files: list[Callable[[Path], object]] = field(default_factory=list)

    @property
    def num_bytes(self) -> int:
        return sum(output.num_bytes for group in (self.tensors, self.pickled) for f in group.values() for output in f)

    def add_checkpoint(self, folder: str, stem: str, shards: list[list[OutputTensor]]) -> None:
        """A checkpoint, with an index where it has several shards."""
        named = files.name_shards(stem, shards)
        self.tensors |= {os.path.join(folder, file): outputs for file, outputs in named.items()}
        if len(named) > 1:
            index_file = os.path.join(folder, f"{stem}.safetensors.index.json")
            self.add_json(index_file, files.index_of(named))

    def add_json(self, file: str, content: Mapping[str, Any]) -> None:
        self.small_files.append(lambda folder: files.write_json(_make_parent(folder / file), content))


def _make_parent(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def plan_outputs(
    refs: Mapping[str, TensorRef], dtype: torch.dtype | None, rename: Callable[[str], str] = str
) -> list[OutputTensor]:
    return [OutputTensor(rename(name), ref, stored_dtype(name, ref.dtype, dtype)) for name, ref in refs.items()]


def by_source_file(outputs: list[OutputTensor]) -> list[list[OutputTensor]]:
    """One shard for each source file, so that shards stay as they were; a file that is too large is cut."""
    groups: dict[Path, list[OutputTensor]] = {}
    for output in outputs:
        groups.setdefault(output.source.file, []).append(output)
    return [shard for group in groups.values() for shard in files.split_by_size(group)]


def main_dtype(outputs: list[OutputTensor]) -> str:
    """The dtype most of the data has, as configs name it; FP8 weights are not computed in theirs."""
    sizes: Counter[torch.dtype] = Counter()
    for output in outputs:
        if output.dtype.itemsize > 1 and not output.name.endswith(SCALE_SUFFIX):
            sizes[output.dtype] += prod(output.source.shape)
    return str(sizes.most_common(1)[0][0]).removeprefix("torch.")


@contextmanager
def _appearing_at_once(destination: Path) -> Iterator[Path]:
    """A temporary sibling of `destination` that takes its name on success and is removed on any failure."""
    missing_parents = [parent for parent in destination.parents if not parent.exists()]
    temporary = destination.with_name(f".{destination.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        os.rename(temporary, destination)
    except BaseException:  # Ctrl-C too
        shutil.rmtree(temporary, ignore_errors=True)
        for parent in missing_parents:
            with suppress(OSError):
                parent.rmdir()
        raise


def carry_out(plan: Plan, destination: Path, progress: bool) -> Path:
    """
    Writes everything, compares every tensor with its source, and only then lets `destination` appear.

    Raises:
        OSError: if the disk has no room for it.
        ValueError: if a value does not fit into its dtype, or a written tensor differs from its source.
    """
    existing = next(parent for parent in destination.parents if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < plan.num_bytes:
        raise OSError(
            f"{plan.num_bytes / 1e9:.1f} GB are needed at {existing}, but only {free / 1e9:.1f} GB are free."
        )
    with (
        _appearing_at_once(destination) as folder,
        # Every byte counts twice: it is written, then compared.
        tqdm(total=2 * plan.num_bytes, unit="B", unit_scale=True, disable=None if progress else True) as bar,
    ):
        for file, outputs in plan.tensors.items():
            bar.set_description(f"writing {file}")
            files.write_safetensors(_make_parent(folder / file), outputs, bar.update)
        for file, outputs in plan.pickled.items():
            bar.set_description(f"writing {file}")
            files.write_pickled(_make_parent(folder / file), outputs, bar.update)
        for write in plan.small_files:
            write(folder)
        for file, outputs in (plan.tensors | plan.pickled).items():
            bar.set_description(f"verifying {file}")
            files.verify_tensors(folder / file, outputs, bar.update)
    return destination
