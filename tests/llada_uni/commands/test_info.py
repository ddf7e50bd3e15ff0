"""What a folder holds, and what fits a machine."""

import json
import shutil

import pytest

from diffusers_llada_uni import LLaDAUniPipeline, embedded_checkpoint
from llada_uni.commands.info import GIB, advise, describe_folder, machine_memory
from transformers_llada_uni import LLaDAUniConfig


@pytest.fixture(scope="module")
def emoji():
    return embedded_checkpoint("emoji")


@pytest.fixture(scope="module")
def released(emoji, tmp_path_factory):
    """The released sizes, as configurations alone. The language model's are our defaults."""
    folder = tmp_path_factory.mktemp("released")
    for file in emoji.rglob("*.json"):
        target = folder / file.relative_to(emoji)
        target.parent.mkdir(exist_ok=True)
        shutil.copy(file, target)
    changes = {"text_config": {"image_token_offset": 157_184}}
    config = LLaDAUniConfig(**changes)
    config.save_pretrained(folder / "model")
    for name in ("transformer", "transformer_turbo"):
        path = folder / name / "config.json"
        decoder = {"dim": 3840, "n_heads": 30, "n_kv_heads": 30, "n_layers": 30, "n_refiner_layers": 2}
        decoder |= {"axes_dims": [32, 48, 48], "cap_feat_dim": 2560}
        path.write_text(json.dumps(json.loads(path.read_text()) | decoder))
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    return folder


def test_parameters_are_those_of_the_loaded_pipeline(emoji, tmp_path):
    described = describe_folder(str(emoji))
    pipe = LLaDAUniPipeline.from_pretrained(emoji)
    for name in ("model", "transformer", "vae", "semantic_embedder"):
        wanted = sum(parameter.numel() for parameter in getattr(pipe, name).parameters())
        assert described["components"][name]["parameters"] == pytest.approx(wanted, rel=1e-2)
        shutil.copytree(emoji / name, tmp_path / name, ignore=shutil.ignore_patterns("*.safetensors"))
    shutil.copy(emoji / "model_index.json", tmp_path)
    of_configurations = describe_folder(str(tmp_path))["components"]
    for name in of_configurations:
        wanted = sum(parameter.numel() for parameter in getattr(pipe, name).parameters())
        assert of_configurations[name]["parameters"] == wanted and not of_configurations[name]["is_complete"]


def test_configurations_of_the_released_size(released):
    described = describe_folder(str(released))
    model, decoder = (described["components"][name] for name in ("model", "transformer"))
    assert 15e9 < model["parameters"] < 18e9 and 5.5e9 < decoder["parameters"] < 7e9
    assert described["bytes"] == 0 and "Weights are missing: model" in advise(described, {"main": GIB})[0]


@pytest.mark.parametrize(
    "main, gpu, words",
    [
        (256, 80, ["It fits the GPU as it is", "fits main memory in float32"]),
        (256, 48, ["enable_model_cpu_offload()`: one", "bits=4)` for the language model", "in float32"]),
        (128, 24, ["bits=4)` and `pipe.enable_model_cpu_offload()`", "in float32"]),
        (64, 16, ["bits=4)` and `pipe.enable_model_cpu_offload()`", "bfloat16"]),
        (64, 0, ["--device cpu --dtype bfloat16"]),
        (32, 0, ["It does not fit"]),
        (32, 8, ["It does not fit"]),
    ],
)
def test_what_fits_which_machine(released, main, gpu, words):
    memory = {"main": main * GIB} | ({"gpu": gpu * GIB} if gpu else {})
    lines = advise(describe_folder(str(released)), memory)[1:]
    assert len(lines) == len(words) and all(word in line for word, line in zip(words, lines, strict=True)), lines


@pytest.mark.parametrize("architectures", [3, [], {}, None])
def test_a_configuration_that_names_no_class(tmp_path, architectures):
    (tmp_path / "config.json").write_text(json.dumps({"architectures": architectures}))
    assert describe_folder(str(tmp_path))["components"]["model"]["class"] == "unknown"


def test_components_that_are_left_out(emoji, tmp_path):
    (tmp_path / "model_index.json").write_text(
        '{"vae": ["diffusers", "AutoencoderKL"], "model": [null, null], "a": 1}'
    )
    shutil.copytree(emoji / "vae", tmp_path / "vae")
    assert list(describe_folder(str(tmp_path))["components"]) == ["vae"]


def test_a_released_checkpoint(official_tiny):
    described = describe_folder(str(official_tiny))
    assert set(described["components"]) == {"model", "image_tokenizer", "decoder", "decoder-turbo", "vae"}
    assert described["components"]["model"]["dtypes"] == ["F32"]
    assert "llada-uni convert" in advise(described, machine_memory())[0]


def test_a_shard_that_is_missing(official_tiny, tmp_path):
    shutil.copytree(official_tiny, tmp_path / "model")
    (tmp_path / "model" / "model-00002-of-00002.safetensors").unlink()
    assert not describe_folder(str(tmp_path / "model"))["components"]["model"]["is_complete"]


@pytest.mark.parametrize(
    "file, content, words",
    [
        ("model_index.json", "[]", "model_index.json must hold an object, got a list"),
        ("model_index.json", "{", "model_index.json is no JSON"),
        ("model_index.json", "[" * 100_000, "model_index.json is no JSON"),
        ("config.json", "[]", "config.json must hold an object"),
        ("config.json", "\xff", "config.json is no JSON"),
        ("config.json", '{"model_type": "llada_uni", "text_config": 3}', "config.json makes no component"),
        ("model.safetensors.index.json", "[]", "index.json must hold an object"),
        ("model.safetensors.index.json", "{}", "index.json has no `weight_map`"),
        ("model.safetensors", "half", "model.safetensors is damaged"),
    ],
)
def test_files_that_are_damaged(tmp_path, file, content, words):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / file).write_text(content, encoding="latin-1")
    with pytest.raises(ValueError, match=words):
        describe_folder(str(tmp_path))


def test_of_an_adapter_without_its_weights_they_are_missing(emoji, tmp_path):
    config = {"peft_type": "LORA", "base_model_name_or_path": str(emoji)}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    described = describe_folder(str(tmp_path))
    assert not described["components"]["adapter"]["is_complete"] and described["components"]["model"]["is_complete"]
    assert advise(described, {"main": 64 * GIB})[0].startswith("Weights are missing: adapter.")
    shutil.copy(emoji / "vae" / "diffusion_pytorch_model.safetensors", tmp_path / "adapter_model.safetensors")
    assert describe_folder(str(tmp_path))["components"]["adapter"]["is_complete"]
