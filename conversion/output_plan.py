"""What a conversion writes, planned before any data is read, and how it is written: all of it or nothing."""

import os
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers.utils import logging

from llada_uni.conversion import tensor_files as files
from llada_uni.conversion.config_files import write_json
from llada_uni.conversion.llada_uni_layout import SCALE_SUFFIX, stored_dtype
from llada_uni.conversion.tensor_files import OutputTensor, TensorRef
from transformers_llada_uni.loading.folder_writing import folder_at_once


logger = logging.get_logger(__name__)


@dataclass
class Plan:
    """
    What to write.

    Args:
        tensors: The tensors of each safetensors file, whose path is relative to the destination.
        pickled: The same for `.pt` files.
        small_files: Paths of files, or of folders that get several, and what writes them: configs and the like.
    """

    tensors: dict[str, list[OutputTensor]] = field(default_factory=dict)
    pickled: dict[str, list[OutputTensor]] = field(default_factory=dict)
    small_files: list[tuple[str, Callable[[Path], object]]] = field(default_factory=list)

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
        self.small_files.append((file, lambda path: write_json(path, content)))


def plan_outputs(
    refs: Mapping[str, TensorRef],
    dtype: torch.dtype | None,
    rename: Callable[[str], str] = str,
    changes: Mapping[str, Callable[[torch.Tensor], torch.Tensor] | None] | None = None,
) -> list[OutputTensor]:
    files.check_floating_point(refs)
    changes = changes or {}
    return [
        OutputTensor(rename(name), ref, stored_dtype(name, ref.dtype, dtype), changes.get(name))
        for name, ref in refs.items()
    ]


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


def carry_out(plan: Plan, destination: Path, progress: bool) -> Path:
    """
    Writes everything, compares every tensor with its source, and only then lets `destination` appear. Tensors with
    NaN or infinity are copied with a warning.

    Raises:
        OSError: if the disk has no room for it, or a file cannot be written.
        ValueError: if a value does not fit into its dtype, or a written tensor differs from its source.
    """
    not_finite: list[str] = []
    with (
        folder_at_once(destination) as folder,
        # Every byte counts twice: it is written, then compared.
        tqdm(total=2 * plan.num_bytes, unit="B", unit_scale=True, disable=None if progress else True) as bar,
    ):
        free = shutil.disk_usage(folder).free  # without what a killed process had left here
        if free < plan.num_bytes:
            raise OSError(f"{plan.num_bytes:,} bytes are needed at {destination.parent}, but only {free:,} are free.")

        def on_written(output: OutputTensor, tensor: torch.Tensor) -> None:
            bar.update(output.num_bytes)
            if not files.is_finite(tensor):
                not_finite.append(output.name)

        # Small files first: what is wrong with them shall not come to light after hours of copying.
        for path, write in plan.small_files:
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            with files.writing(folder / path):
                write(folder / path)
        for group, write_tensors in ((plan.tensors, files.write_safetensors), (plan.pickled, files.write_pickled)):
            for file, outputs in group.items():
                bar.set_description(f"writing {file}")
                (folder / file).parent.mkdir(parents=True, exist_ok=True)
                write_tensors(folder / file, outputs, on_written)
        for file, outputs in (plan.tensors | plan.pickled).items():
            bar.set_description(f"verifying {file}")
            files.verify_tensors(folder / file, outputs, lambda output, _: bar.update(output.num_bytes))
    if not_finite:
        logger.warning(f"{len(not_finite)} tensors hold NaN or infinity, as in the source: {files.some(not_finite)}.")
    return destination
