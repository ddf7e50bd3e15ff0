"""What the tests of the converter share."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


ROOT = Path(__file__).resolve().parents[2]
SHARD = "model-00001-of-00002.safetensors"
IMAGE_TOKENIZER = "image_tokenizer/image_tokenizer.safetensors"
SIGVQ = "image_tokenizer/sigvq_embedding.pt"


def read_tensors(folder: Path, released: bool = True) -> dict[str, dict[str, torch.Tensor]]:
    """File -> tensors of a folder. The index that points into another folder is no file of tensors."""
    tensors = {str(file.relative_to(folder)): load_file(file) for file in sorted(folder.rglob("*.safetensors"))}
    if released:
        tensors[SIGVQ] = torch.load(folder / SIGVQ, weights_only=True)
    return {file: content for file, content in tensors.items() if not file.startswith("expected")}


def assert_equal(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def merged(files: dict[str, dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """All tensors of several files; files outside a component's folder keep their names apart."""
    return {name: tensor for content in files.values() for name, tensor in content.items()}


def backbone_of(folder: Path) -> dict[str, torch.Tensor]:
    return merged({file.name: load_file(file) for file in folder.glob("model*.safetensors")})


def copy_released(official_tiny: Path, folder: Path) -> Path:
    """A copy of the released layout to spoil."""
    shutil.copytree(official_tiny, folder, ignore=shutil.ignore_patterns("expected", "images"))
    folder.chmod(0o755)
    for path in folder.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return folder


# What may be wrong with a checkpoint


def edit_json(file: str, **changes) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        path = folder / file
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return spoil


def edit_tensors(file: str, change: Callable[[dict], None]) -> Callable[[Path], None]:
    """Changes the tensors of a file, and the index to match."""

    def spoil(folder: Path) -> None:
        path = folder / file
        if path.suffix == ".pt":
            tensors = torch.load(path, weights_only=True)
            change(tensors)
            torch.save(tensors, path)
            return
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)
        index_file = folder / "model.safetensors.index.json"
        if path.parent == folder:
            index = json.loads(index_file.read_text())
            index["weight_map"] = {k: f for k, f in index["weight_map"].items() if f != file}
            index["weight_map"] |= dict.fromkeys(tensors, file)
            index_file.write_text(json.dumps(index))

    return spoil


def drop(name: str) -> Callable[[dict], None]:
    return lambda tensors: tensors.pop(name)
