"""Bad checkpoints and arguments: the converter names what is wrong, and leaves nothing behind."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import diffusers_llada_uni  # noqa: F401 (registers)
from llada_uni.conversion.config_files import building
from llada_uni.conversion.convert_llada_uni_checkpoint import convert_to_diffusers, convert_to_released
from tests.conversion.conversion_common import (
    IMAGE_TOKENIZER,
    SHARD,
    SIGVQ,
    drop,
    edit_json,
    edit_tensors,
)


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


def edit_index(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        path = folder / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        change(index["weight_map"])
        path.write_text(json.dumps(index))

    return spoil


def edit_part(file: str, part: str, **changes) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        content = json.loads((folder / file).read_text())
        content[part] |= changes
        (folder / file).write_text(json.dumps(content))

    return spoil


def move_out_of_the_folder(folder: Path) -> None:
    (folder / SHARD).rename(folder.parent / "outside.safetensors")
    move = {SHARD: "../outside.safetensors"}
    edit_index(lambda weights: weights.update({name: move.get(file, file) for name, file in weights.items()}))(folder)


def nested(depth: int) -> str:
    return '{"deep": ' + "[" * depth + "]" * depth + "}"


def save_pickled(content: object) -> Callable[[Path], None]:
    return lambda folder: torch.save(content, folder / SIGVQ)


MANY = 10**7
VISION = "image_tokenizer/config.json"
PREPROCESSOR = "image_tokenizer/preprocessor_config.json"


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
    "tensor not in the index": (
        edit_index(drop("lm_head.weight")),
        ValueError,
        ["index.json", "1 extra: lm_head.weight"],
    ),
    "index without map": (write_text("model.safetensors.index.json", "{}"), ValueError, ["weight_map"]),
    "index with a wrong map": (
        write_text("model.safetensors.index.json", '{"weight_map": [1]}'),
        ValueError,
        ["weight_map"],
    ),
    "index with a number": (
        edit_index(lambda weights: weights.update({"lm_head.weight": 5})),
        ValueError,
        ["index.json", "`weight_map`", "lm_head.weight", "5"],
    ),
    "index that leaves the folder": (
        move_out_of_the_folder,
        ValueError,
        ["index.json", "`weight_map`", "'../outside.safetensors'"],
    ),
    "integers as weights": (
        edit_tensors(
            SHARD, lambda tensors: tensors.update({"lm_head.weight": torch.ones(768, 64, dtype=torch.int32)})
        ),
        ValueError,
        [SHARD, "lm_head.weight", "int32"],
    ),
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
    "pickle with numbers as names": (save_pickled({1: torch.zeros(2)}), ValueError, ["sigvq_embedding.pt", "names"]),
    "pickle of a list": (save_pickled([1]), ValueError, ["sigvq_embedding.pt", "state dict"]),
    "pickle of a sparse tensor": (
        save_pickled({"prior_token_embedding.weight": torch.eye(2).to_sparse()}),
        ValueError,
        ["sigvq_embedding.pt", "prior_token_embedding.weight"],
    ),
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
    "decoder with one length": (
        edit_json("decoder/config.json", axes_lens=5),
        ValueError,
        ["decoder", "`axes_lens`", "5"],
    ),
    "decoder with two lengths": (
        edit_json("decoder/config.json", axes_lens=[5, 6]),
        ValueError,
        ["decoder", "`axes_lens`", "[5, 6]"],
    ),
    "decoder with a word as theta": (
        edit_json("decoder/config.json", rope_theta="x"),
        ValueError,
        ["decoder/config.json", "`rope_theta`", "'x'"],
    ),
    "decoder with a flag that is a number": (
        edit_json("decoder/config.json", qk_norm=1),
        ValueError,
        ["decoder/config.json", "`qk_norm`", "1"],
    ),
    "decoder of very many layers": (
        edit_json("decoder/config.json", n_layers=MANY),
        ValueError,
        ["decoder/config.json", "`n_layers`", str(MANY)],
    ),
    "vae with a word as scale": (
        edit_json("vae/config.json", scaling_factor="x"),
        ValueError,
        ["vae/config.json", "`scaling_factor`", "'x'"],
    ),
    "vae without a scale": (
        edit_json("vae/config.json", scaling_factor=0),
        ValueError,
        ["vae/config.json", "`scaling_factor`", "got 0"],
    ),
    "vae with a list as shift": (
        edit_json("vae/config.json", shift_factor=[1]),
        ValueError,
        ["vae/config.json", "`shift_factor`", "[1]"],
    ),
    "vae with an unknown activation": (edit_json("vae/config.json", act_fn="x"), ValueError, ["vae/config.json", "x"]),
    "vae of very many layers": (
        edit_json("vae/config.json", layers_per_block=MANY),
        ValueError,
        ["vae/config.json", "`layers_per_block`", str(MANY)],
    ),
    "vae of very many blocks": (
        edit_json(
            "vae/config.json",
            block_out_channels=[32] * 10**5,
            down_block_types=["DownEncoderBlock2D"] * 10**5,
            up_block_types=["UpDecoderBlock2D"] * 10**5,
        ),
        ValueError,
        ["vae/config.json", "many more tensors"],
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
    "very many layers": (
        edit_json("config.json", num_hidden_layers=MANY),
        ValueError,
        ["config.json", "`num_hidden_layers`", str(MANY)],
    ),
    "very many experts": (
        edit_json("config.json", num_experts=MANY, n_group=1, topk_group=1),
        ValueError,
        ["config.json", "`num_experts`", str(MANY)],
    ),
    "many experts in many layers": (
        edit_json("config.json", num_experts=100, num_hidden_layers=40, n_group=1, topk_group=1),
        ValueError,
        ["config.json", "`num_experts`", "100"],
    ),
    "setting with the name of a method": (
        edit_json("config.json", to_dict=1),
        ValueError,
        ["config.json", "`to_dict`"],
    ),
    "deep nesting": (write_text("config.json", nested(99_999)), ValueError, ["config.json", "nested"]),
    "nesting that Python still reads": (write_text("vae/config.json", nested(500)), ValueError, ["vae", "nested"]),
    "not a number": (write_text("vae/config.json", '{"scaling_factor": NaN}'), ValueError, ["vae/config.json", "NaN"]),
    "beyond any number": (write_text("vae/config.json", '{"a": 1e999}'), ValueError, ["vae/config.json", "1e999"]),
    "a number of very many digits": (
        write_text("vae/config.json", '{"a": ' + "1" * 9999 + "}"),
        ValueError,
        ["vae/config.json"],
    ),
    "no config": (remove("config.json"), FileNotFoundError, ["config.json is missing"]),
    "config is no JSON": (write_text("config.json", "{"), ValueError, ["config.json is not valid JSON"]),
    "config is a list": (write_text("vae/config.json", "[]"), ValueError, ["vae", "JSON object", "list"]),
    "no vision config": (write_text("image_tokenizer/config.json", "{}"), ValueError, ["no `vision_config`"]),
    "vision config of very many layers": (
        edit_part(VISION, "vision_config", depth=MANY),
        ValueError,
        [VISION, "`depth`", str(MANY)],
    ),
    "vision config with negative heads": (
        edit_part(VISION, "vision_config", num_heads=-1),
        ValueError,
        [VISION, "`num_heads`", "-1"],
    ),
    "vision config of a wrong type": (
        edit_part(VISION, "vision_config", hidden_size="x"),
        ValueError,
        [VISION, "hidden_size"],
    ),
    "mean of a wrong type": (
        edit_json(PREPROCESSOR, image_mean="x"),
        ValueError,
        [PREPROCESSOR, "`image_mean`", "'x'"],
    ),
    "deviation of two colours": (
        edit_json(PREPROCESSOR, image_std=[0.5, 0.5]),
        ValueError,
        [PREPROCESSOR, "`image_std`", "[0.5, 0.5]"],
    ),
    "no deviation": (
        edit_json(PREPROCESSOR, image_std=[0.5, 0.5, 0]),
        ValueError,
        [PREPROCESSOR, "`image_std`", "0]"],
    ),
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
    assert "\n" not in str(info.value)
    assert not {path.name for path in tmp_path.iterdir()} - {"released", "outside.safetensors"}


def test_what_other_threads_build_meanwhile_does_not_count():
    with building({}, num_tensors=0), ThreadPoolExecutor(1) as thread:
        thread.submit(lambda: [torch.nn.Linear(1, 1) for _ in range(1000)]).result()


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


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (edit_json("vae/config.json", scaling_factor=-1.0), ["vae/config.json", "`scaling_factor`", "-1.0"]),
        (edit_json("transformer/config.json", axes_lens=5), ["transformer/config.json", "`axes_lens`", "5"]),
        (edit_json("model/config.json", text_config=5), ["model/config.json", "`text_config`", "5"]),
        (edit_part("model/config.json", "text_config", hidden_size="x"), ["model/config.json", "hidden_size"]),
        (edit_part("model/config.json", "text_config", num_experts=MANY, n_group=1, topk_group=1), ["`num_experts`"]),
        (write_text("model/config.json", nested(99_999)), ["model/config.json", "nested"]),
        (edit_json("processor/processor_config.json", image_processor=5), ["processor/processor_config.json"]),
        (
            edit_part("processor/processor_config.json", "image_processor", image_std=[1, 0, 1]),
            ["processor/processor_config.json", "`image_std`", "1, 0, 1"],
        ),
        (write_text("processor/processor_config.json", "[]"), ["processor/processor_config.json", "list"]),
    ],
)
def test_bad_pipeline_config(converted_dir, tmp_path, spoil, words):
    folder = tmp_path / "ours"
    shutil.copytree(converted_dir, folder)
    spoil(folder)
    with pytest.raises(ValueError) as info:
        convert_to_released(folder, tmp_path / "back", progress=False)
    assert all(word in str(info.value) for word in words), info.value
    assert "\n" not in str(info.value)
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


def test_bad_pipeline_folder(converted_dir, tmp_path):
    folder = tmp_path / "ours"
    shutil.copytree(converted_dir, folder)
    (folder / "model" / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="has an adapter beside its model"):
        convert_to_released(folder, tmp_path / "back", progress=False)
    (folder / "model" / "adapter_config.json").unlink()
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
