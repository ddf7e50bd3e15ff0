"""Bad checkpoints and arguments: the converter names what is wrong, and leaves nothing behind."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import diffusers_llada_uni  # noqa: F401 (registers)
from llada_uni.conversion.convert_llada_uni_checkpoint import convert_to_diffusers, convert_to_released
from tests.conversion.conversion_common import (
    IMAGE_TOKENIZER,
    SHARD,
    SIGVQ,
    copy_released,
    drop,
    edit_json,
    edit_tensors,
)


@pytest.fixture
def released(official_tiny, tmp_path) -> Path:
    return copy_released(official_tiny, tmp_path / "released")


# What is wrong with a checkpoint


def put(name: str, *shape: int) -> Callable[[dict], None]:
    return lambda tensors: tensors.update({name: torch.zeros(*shape)})


def truncate(file: str, keep: float = 0.5) -> Callable[[Path], None]:
    return lambda folder: os.truncate(folder / file, int((folder / file).stat().st_size * keep))


def remove(file: str) -> Callable[[Path], None]:
    return lambda folder: (folder / file).unlink()


def rename_token(old: str, new: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            path = folder / name
            path.write_text(path.read_text().replace(json.dumps(old), json.dumps(new)))

    return spoil


class RunsCode:
    def __reduce__(self):
        return os.system, ("true",)


def hide_code_in_pickle(folder: Path) -> None:
    (folder / SIGVQ).write_bytes(pickle.dumps({"prior_token_embedding.weight": RunsCode()}))


def write_text(file: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / file).write_text(text)


def remove_folder(*names: str) -> Callable[[Path], None]:
    return lambda folder: [shutil.rmtree(folder / name) for name in names]


def forget_in_index(folder: Path) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    del index["weight_map"]["lm_head.weight"]
    path.write_text(json.dumps(index))


EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"
BAD_CHECKPOINTS = {
    "missing shard": (remove(SHARD), FileNotFoundError, [SHARD, "missing"]),
    "no weights": (
        lambda f: [p.unlink() for p in f.glob("model*")],
        FileNotFoundError,
        ["neither model.safetensors nor"],
    ),
    "truncated shard": (truncate(SHARD), ValueError, [SHARD, "truncated"]),
    "truncated header": (truncate(SHARD, 0.001), ValueError, [SHARD, "truncated"]),
    "empty shard": (truncate(SHARD, 0), ValueError, [SHARD, "truncated"]),
    "truncated by a byte": (truncate(SHARD, 0.999999), ValueError, [SHARD, "truncated"]),
    "truncated image tokenizer": (truncate(IMAGE_TOKENIZER), ValueError, ["image_tokenizer.safetensors", "truncated"]),
    "truncated decoder": (truncate("decoder/model.safetensors"), ValueError, ["decoder", "truncated"]),
    "truncated vae": (truncate("vae/diffusion_pytorch_model.safetensors"), ValueError, ["vae", "truncated"]),
    "truncated sigvq": (truncate(SIGVQ), ValueError, ["sigvq_embedding.pt", "truncated"]),
    "missing expert": (edit_tensors(SHARD, drop(EXPERT)), ValueError, ["backbone", "1 missing", EXPERT]),
    "missing head": (edit_tensors(SHARD, drop("lm_head.weight")), ValueError, ["1 missing: lm_head.weight"]),
    "extra tensor": (
        edit_tensors(SHARD, put("model.layers.9.x.weight", 2)),
        ValueError,
        ["backbone", "1 extra: model.layers.9.x.weight"],
    ),
    "misshapen expert": (
        edit_tensors(SHARD, put(EXPERT, 4, 4)),
        ValueError,
        ["misshapen", EXPERT, "[4, 4]", "[32, 64]"],
    ),
    "more layers": (
        edit_json("config.json", num_hidden_layers=4),
        ValueError,
        ["missing", "model.layers.3"],
    ),
    "fewer layers": (
        edit_json("config.json", num_hidden_layers=2),
        ValueError,
        ["extra", "model.layers.2"],
    ),
    "tensor not in the index": (forget_in_index, ValueError, ["index.json", "1 extra: lm_head.weight"]),
    "index without map": (write_text("model.safetensors.index.json", "{}"), ValueError, ["weight_map"]),
    "missing vision tensor": (
        edit_tensors(IMAGE_TOKENIZER, drop("model.visual.patch_embed.proj.bias")),
        ValueError,
        ["image tokenizer", "missing: model.visual.patch_embed.proj.bias"],
    ),
    "codebook of another size": (
        edit_tensors(IMAGE_TOKENIZER, put("model.vqmodel.quantize.embedding.weight", 128, 32)),
        ValueError,
        ["model.vqmodel.quantize.embedding.weight", "[128, 32]", "[256, 32]"],
    ),
    "codebook config of another size": (
        edit_json("image_tokenizer/config.json", vq_config={"num_embeddings": 128, "embed_dim": 32}),
        ValueError,
        ["num_embeddings", "128", "256"],
    ),
    "embedder of another codebook": (
        edit_tensors(SIGVQ, put("prior_token_embedding.weight", 128, 64)),
        ValueError,
        ["sigvq_embedding.pt", "128", "256"],
    ),
    "embedder without projector": (
        edit_tensors(SIGVQ, drop("prior_projector.net.2.weight")),
        ValueError,
        ["prior_projector.net.2.weight"],
    ),
    "extra embedder tensor": (
        edit_tensors(SIGVQ, put("scale", 1)),
        ValueError,
        ["embedder", "1 extra: scale"],
    ),
    "pickle that runs code": (hide_code_in_pickle, ValueError, ["sigvq_embedding.pt", "cannot be read"]),
    "decoder of another width": (
        edit_tensors("decoder/model.safetensors", put("semantic_embedder.1.weight", 64, 32)),
        ValueError,
        ["cap_embedder.1.weight", "[64, 32]", "[64, 64]"],
    ),
    "decoder config that fits nothing": (
        edit_json("decoder/config.json", dim=63),
        ValueError,
        ["ZImageTransformer2DModel"],
    ),
    "vae with a missing tensor": (
        edit_tensors("vae/diffusion_pytorch_model.safetensors", drop("decoder.conv_in.bias")),
        ValueError,
        ["VAE", "missing: decoder.conv_in.bias"],
    ),
    "no vae": (remove_folder("vae"), FileNotFoundError, ["vae"]),
    "no decoder": (remove_folder("decoder", "decoder-turbo"), FileNotFoundError, ["no normal and no turbo decoder"]),
    "no tokenizer": (remove("tokenizer.json"), FileNotFoundError, ["tokenizer.json is missing"]),
    "broken tokenizer": (truncate("tokenizer.json"), ValueError, ["tokenizer"]),
    "no <boi>": (rename_token("<boi>", "<bio>"), ValueError, ["tokenizer has no <boi>"]),
    "no <|role_end|>": (rename_token("<|role_end|>", "<|end|>"), ValueError, ["tokenizer has no <|role_end|>"]),
    "gap in the reserved tokens": (
        rename_token("<|reserved_token_7|>", "<|unused|>"),
        ValueError,
        ["<|reserved_token_7|>", "gap"],
    ),
    "no placeholder": (rename_token("<|reserved_token_0|>", "<|x|>"), ValueError, ["<|reserved_token_0|>"]),
    "larger tokenizer": (
        edit_json("config.json", image_token_offset=400),
        ValueError,
        ["text ids", "400"],
    ),
    "another model": (edit_json("config.json", model_type="llama"), ValueError, ["'llama'", "llada2_moe"]),
    "text-only": (edit_json("config.json", image_token_offset=None), ValueError, ["text-only"]),
    "bad groups": (edit_json("config.json", n_group=5), ValueError, ["n_group", "5"]),
    "config of a wrong type": (
        edit_json("config.json", hidden_size="wide"),
        ValueError,
        ["hidden_size", "config.json"],
    ),
    "no config": (remove("config.json"), FileNotFoundError, ["config.json is missing"]),
    "config is no JSON": (write_text("config.json", "{"), ValueError, ["config.json is not valid JSON"]),
    "config is a list": (write_text("vae/config.json", "[]"), ValueError, ["vae", "JSON object", "list"]),
    "no vision config": (write_text("image_tokenizer/config.json", "{}"), ValueError, ["no `vision_config`"]),
    "patch size of another tower": (
        edit_json("image_tokenizer/preprocessor_config.json", patch_size=8),
        ValueError,
        ["patch_size", "8", "16"],
    ),
}


@pytest.mark.parametrize("case", BAD_CHECKPOINTS)
def test_bad_checkpoint_is_named_and_leaves_nothing(released, tmp_path, case):
    spoil, error_type, words = BAD_CHECKPOINTS[case]
    spoil(released)
    with pytest.raises(error_type) as info:
        convert_to_diffusers(released, tmp_path / "out" / "ours", progress=False)
    for word in words:
        assert word in str(info.value)
    assert [path.name for path in tmp_path.iterdir()] == ["released"]


def test_bad_arguments(official_tiny, converted_dir, tmp_path):
    (tmp_path / "there").mkdir()
    with pytest.raises(FileExistsError, match="exists already"):
        convert_to_diffusers(official_tiny, tmp_path / "there")
    with pytest.raises(FileNotFoundError, match="not a folder"):
        convert_to_diffusers(tmp_path / "nowhere", tmp_path / "x")
    with pytest.raises(ValueError, match="`decoder` must be one of turbo, normal, both, got 'fast'"):
        convert_to_diffusers(official_tiny, tmp_path / "x", decoder="fast")
    with pytest.raises(ValueError, match="'llada_uni'"):
        convert_to_released(official_tiny, tmp_path / "x")
    with pytest.raises(ValueError, match="'llada2_moe'"):
        convert_to_diffusers(converted_dir, tmp_path / "x")
    with pytest.raises(ValueError, match="without a decoder"):
        convert_to_released(converted_dir / "model", tmp_path / "x", decoder="turbo")
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_bad_pipeline_folder(converted_dir, tmp_path):
    folder = tmp_path / "ours"
    shutil.copytree(converted_dir, folder)
    shard = folder / "model" / "model-00002-of-00003.safetensors"
    os.truncate(shard, 1000)
    with pytest.raises(ValueError, match="truncated"):
        convert_to_released(folder, tmp_path / "back", progress=False)
    shard.unlink()
    with pytest.raises(FileNotFoundError, match="model-00002-of-00003"):
        convert_to_released(folder, tmp_path / "back", progress=False)
    shutil.copy(converted_dir / "model" / shard.name, shard)
    shutil.rmtree(folder / "transformer")
    with pytest.raises(FileNotFoundError, match="has no normal decoder, only the turbo one"):
        convert_to_released(folder, tmp_path / "back", decoder="both", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]
