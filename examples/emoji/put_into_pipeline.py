"""
Puts what a stage of the training has written into a pipeline folder.

    python examples/emoji/put_into_pipeline.py runs/emoji/tokenizer runs/emoji/model

Known are `image_tokenizer/` and a language model (its `model.safetensors`), whose weights go into `model/`, and the
parts of the decoder: `vae/`, `semantic_embedder/`, `transformer/`, `scheduler/`, `transformer_turbo/`,
`scheduler_turbo/`.
"""

import argparse
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AutoModelForImageTextToText, PreTrainedModel

import diffusers_llada_uni  # noqa: F401  registers the models
from llada_uni.pipeline_assembly import is_of_image_tokenizer, put_image_tokenizer
from llada_uni.trained_parts import IMAGE_TOKENIZER, PARTS
from transformers_llada_uni.loading.folder_writing import folder_at_once


def put_new_image_tokenizer(weights: Path, pipeline: Path) -> None:
    model = AutoModelForImageTextToText.from_pretrained(pipeline / "model")
    put_image_tokenizer(weights, model)
    embed_codes_by_likeness(model)
    put_model(model, pipeline)


def put_language_model(trained: Path, pipeline: Path) -> None:
    """All but the image tokenizer, which has been trained on meanwhile."""
    model, other = (AutoModelForImageTextToText.from_pretrained(folder) for folder in (trained, pipeline / "model"))
    own = {name: weight for name, weight in other.state_dict().items() if is_of_image_tokenizer(name)}
    model.load_state_dict(own, strict=False)
    put_model(model, pipeline)


@torch.no_grad()
def embed_codes_by_likeness(model: Any) -> None:
    """Codes that look alike begin with embeddings that are alike: half of each is the same for its neighbours."""
    codes = F.normalize(model.model.vqmodel.quantize.embedding.weight, dim=-1)
    embeddings = model.get_input_embeddings().weight
    first, deviation = model.config.text_config.image_token_offset, model.config.text_config.initializer_range
    generator = torch.Generator().manual_seed(0)
    projection = torch.randn(codes.shape[1], embeddings.shape[1], generator=generator)
    own = torch.randn(codes.shape[0], embeddings.shape[1], generator=generator)
    embeddings[first : first + len(codes)] = deviation * (codes @ projection + own) / 2**0.5


def put_model(model: PreTrainedModel, pipeline: Path) -> None:
    with folder_at_once(pipeline / "model", replace=True) as folder:
        model.save_pretrained(folder)


def put_folder(source: Path, pipeline: Path) -> None:
    with folder_at_once(pipeline / source.name, replace=True) as folder:
        shutil.copytree(source, folder, dirs_exist_ok=True)
    index_file = pipeline / "model_index.json"
    index = json.loads(index_file.read_text(encoding="utf-8"))
    # A part that was absent when the pipeline was saved is of the class of its namesake.
    namesake = index[source.name.removesuffix("_turbo")]
    index[source.name] = namesake
    part_file = index_file.with_suffix(".part")
    part_file.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    os.replace(part_file, index_file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trained", type=Path, help="The output folder of a stage.")
    parser.add_argument("pipeline", type=Path)
    arguments = parser.parse_args()
    found = [name for name in PARTS if (arguments.trained / name).is_dir()]
    for name in found:
        put_folder(arguments.trained / name, arguments.pipeline)
    tokenizer = arguments.trained / IMAGE_TOKENIZER
    if tokenizer.exists():
        put_new_image_tokenizer(tokenizer, arguments.pipeline)
        found.append("image_tokenizer")
    if (arguments.trained / "model.safetensors").exists():
        put_language_model(arguments.trained, arguments.pipeline)
        found.append("language model")
    if not found:
        raise FileNotFoundError(f"`{arguments.trained}` holds no part of a pipeline.")
    print(f"Put {', '.join(found)} into {arguments.pipeline}.")


if __name__ == "__main__":
    main()
