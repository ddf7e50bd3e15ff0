"""
The trained pipeline as it is shipped: half precision, inference only.

    python examples/emoji/export.py runs/emoji/model src/diffusers_llada_uni/checkpoints/emoji \\
        --adapter runs/emoji/lora

The adapter goes into the folder `adapter/` beside the parts of the pipeline. float16 and not bfloat16: the image
tokenizer's choices hang on the digits that bfloat16 would drop.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

import diffusers_llada_uni  # noqa: F401  registers the pipeline
from transformers_llada_uni.checkpoint_stub import MODULE
from transformers_llada_uni.loading.folder_writing import folder_at_once


LARGEST = 50 * 2**20
OF_HERE = ("auto_map", "_name_or_path", "local_files_only")
CARD = ("README.md", "sheet.png", "training.json", "training.png")  # lies in the folder, and is not exported


def export_adapter(adapter: Path, folder: Path) -> None:
    """Of an adapter's folder its weights and settings; it belongs to the model beside it, wherever that lies."""
    folder.mkdir()
    weights = load_file(adapter / "adapter_model.safetensors")
    save_file({name: weight.half() for name, weight in weights.items()}, folder / "adapter_model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    config |= {"base_model_name_or_path": None, "inference_mode": True}
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def leave_out_what_is_of_here(folder: Path) -> None:
    """Where it lay when it was exported; and what is for those without the package, which it comes with."""
    for stub in folder.rglob(f"{MODULE}.py"):
        stub.unlink()
    for file in folder.rglob("*.json"):
        settings = json.loads(file.read_text(encoding="utf-8"))
        if left_out := [name for name in OF_HERE if name in settings]:
            for name in left_out:
                del settings[name]
            file.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("output_dir", type=Path)
    parser.add_argument("--adapter", type=Path, help="The folder of a LoRA adapter of its language model.")
    arguments = parser.parse_args()
    pipe = DiffusionPipeline.from_pretrained(arguments.model, dtype=torch.float32).to(torch.float16)
    with folder_at_once(arguments.output_dir, replace=True) as folder:
        pipe.save_pretrained(folder)
        leave_out_what_is_of_here(folder)
        if arguments.adapter is not None:
            export_adapter(arguments.adapter, folder / "adapter")
        for name in CARD:
            if (arguments.output_dir / name).exists():
                shutil.copy(arguments.output_dir / name, folder / name)
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        if size > LARGEST:
            raise SystemExit(f"The checkpoint has {size / 2**20:.1f} MB, more than {LARGEST / 2**20:.0f}.")
    print(f"{size / 2**20:.1f} MB in {arguments.output_dir}.")


if __name__ == "__main__":
    main()
