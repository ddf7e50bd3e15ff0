"""What a name means, and what is told of one that means nothing."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from httpx import Request, Response
from huggingface_hub.errors import RemoteEntryNotFoundError
from peft import LoraConfig, get_peft_model
from trl import ModelConfig

from diffusers_llada_uni import embedded_checkpoint
from llada_uni.commands.info import describe_folder
from llada_uni.commands.train_trainers import _path
from llada_uni.pipeline_loading import (
    Located,
    configurations_of,
    load_chat_model,
    load_pipeline,
    locate,
    resolve_model,
)
from transformers_llada_uni.loading.model_loading import load_model


def save_adapter(model, folder: Path, base: str | None, **settings) -> torch.Tensor:
    """A LoRA adapter that changes the first attention's outputs; returns what it adds to their weights."""
    adapted = get_peft_model(model, LoraConfig(r=2, lora_alpha=4, target_modules=["dense"], **settings))
    parameters = dict(adapted.named_parameters())
    down, up = ([v for k, v in parameters.items() if name in k][0] for name in ("lora_A", "lora_B"))
    torch.manual_seed(0)
    torch.nn.init.normal_(up)
    adapted.save_pretrained(folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": base}))
    return 2.0 * (up @ down).detach()


def first_outputs(model) -> torch.Tensor:
    return next(v for k, v in model.state_dict().items() if k.endswith("layers.0.attention.dense.weight"))


@pytest.mark.parametrize("device", ["nonsense", "cuda:99"])
def test_a_device_that_is_not_there(device):
    with pytest.raises(ValueError, match=f"`device` '{device}' cannot be had here"):
        load_pipeline("emoji", device)


def test_names(tmp_path, monkeypatch):
    emoji = str(embedded_checkpoint("emoji"))
    assert resolve_model("emoji") == resolve_model(emoji) == configurations_of("emoji") == emoji
    assert resolve_model("owner/name") == "owner/name"
    monkeypatch.chdir(tmp_path)
    for name in ("", ".", "nothing", "./nothing", "~/nothing", "a/b/c", "\0", "🍎"):
        with pytest.raises(ValueError, match="`model`"):
            resolve_model(name)


def test_a_folder_of_images_has_the_name_of_a_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "emoji").mkdir()
    emoji = str(embedded_checkpoint("emoji"))
    assert resolve_model("emoji") == configurations_of("emoji") == _path(ModelConfig("emoji")) == emoji
    with pytest.raises(ValueError, match="`model` './emoji' is no pipeline"):
        resolve_model("./emoji")
    (tmp_path / "emoji" / "config.json").write_text('{"model_type": "llada_uni"}')  # what a training has written
    assert resolve_model("emoji") == emoji
    assert (
        resolve_model("emoji", takes_models=True)
        == configurations_of("emoji")
        == _path(ModelConfig("emoji"))
        == "emoji"
    )
    (tmp_path / "emoji" / "config.json").unlink()
    (tmp_path / "emoji" / "model_index.json").write_text('{"_class_name": "LLaDAUniPipeline"}')
    assert resolve_model("emoji") == _path(ModelConfig("emoji")) == "emoji"


@pytest.mark.parametrize(
    "file, content, words",
    [
        ("model_index.json", "[]", "model_index.json must hold an object"),
        ("model_index.json", "{", "model_index.json is no JSON"),
        ("model_index.json", '{"_class_name": "FluxPipeline"}', "of another kind: FluxPipeline"),
        ("model_index.json", '{"_class_name": "LLaDAUniPipeline", "model": 3}', "cannot be loaded"),
        ("model/config.json", "[]", "model/config.json must hold an object"),
        ("model/config.json", "{", "model/config.json is no JSON"),
        ("scheduler/scheduler_config.json", "[1]", "scheduler_config.json must hold an object"),
        ("processor/tokenizer.json", "{}", "cannot be loaded"),
        ("model/model.safetensors", "half", "cannot be loaded.*damaged"),
        ("vae", None, "cannot be loaded"),
    ],
)
def test_a_folder_that_is_damaged_is_told_of_in_a_line(tmp_path, file, content, words):
    folder = tmp_path / "damaged"
    shutil.copytree(embedded_checkpoint("emoji"), folder)
    if content is None:
        shutil.rmtree(folder / file)
    else:
        (folder / file).write_text(content)
    with pytest.raises(ValueError, match=words):
        load_pipeline(str(folder), "cpu")


def test_an_adapter_in_the_place_of_its_model(tmp_path):
    """It is added to the weights of the pipeline whose language model it was trained upon."""
    emoji = embedded_checkpoint("emoji")
    model = load_model(str(emoji), dtype=torch.float32)
    before = first_outputs(model).clone()
    added = save_adapter(model, tmp_path / "adapter", str(emoji / "model"))
    pipe = load_pipeline(str(tmp_path / "adapter"), "cpu")
    assert added.abs().max() > 0.1
    torch.testing.assert_close(first_outputs(pipe.model), before + added)
    assert pipe.loaded_decoders and not pipe.get_list_adapters()
    described = describe_folder(configurations_of(str(tmp_path / "adapter")))
    assert described["components"]["adapter"]["parameters"] > 0 and "vae" in described["components"]


def test_what_an_adapter_holds_beside_lora_is_not_lost(tmp_path):
    """Magnitudes of DoRA, and whole layers (`modules_to_save`)."""
    emoji = embedded_checkpoint("emoji")
    model = load_model(str(emoji), dtype=torch.float32)
    adapted = get_peft_model(
        model, LoraConfig(r=2, target_modules=["dense"], use_dora=True, modules_to_save=["lm_head"])
    )
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora" in name or "modules_to_save" in name:
                parameter += 0.1 * torch.randn_like(parameter)
    adapted.save_pretrained(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    (tmp_path / "adapter" / "adapter_config.json").write_text(
        json.dumps(config | {"base_model_name_or_path": "emoji"})
    )
    expected = adapted.merge_and_unload().state_dict()
    found = load_pipeline(str(tmp_path / "adapter"), "cpu").model.state_dict()
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, msg=name)


def test_an_adapter_of_a_language_model_alone(tmp_path, text_only):
    model = load_model(str(text_only), dtype=torch.float32)
    before = first_outputs(model).clone()
    added = save_adapter(model, tmp_path / "adapter", str(text_only))
    talking = load_chat_model(str(tmp_path / "adapter"), "cpu", "float32")
    torch.testing.assert_close(first_outputs(talking.model), before + added)
    with pytest.raises(ValueError, match="is an adapter .* is a language model alone"):
        load_pipeline(str(tmp_path / "adapter"), "cpu")


def test_the_adapter_that_comes_along_stands_upon_the_pipeline_that_it_lies_in():
    adapter = embedded_checkpoint("emoji") / "adapter"
    assert not torch.equal(
        first_outputs(load_pipeline(str(adapter), "cpu").model), first_outputs(load_pipeline("emoji", "cpu").model)
    )


@pytest.mark.parametrize(
    "base, words",
    [
        (None, "does not say upon which"),
        ("nowhere", "upon 'nowhere': `model` 'nowhere' is no folder"),
        (".", "adapter as well"),
        ("me/model/deep/model", "upon 'me/model/deep/model'"),
    ],
)
def test_an_adapter_upon_nothing(tmp_path, monkeypatch, base, words):
    monkeypatch.chdir(tmp_path)
    Path("adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
    with pytest.raises(ValueError, match=words):
        resolve_model(".")


def test_the_folder_of_several_is_told_of_the_first(tmp_path):
    (tmp_path / "runs" / "animals").mkdir(parents=True)
    (tmp_path / "runs" / "animals" / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="Did you mean `.*animals`?"):
        resolve_model(str(tmp_path / "runs"))


def test_a_lora_file_in_a_pipeline_makes_it_no_adapter(tmp_path):
    folder = tmp_path / "pipeline"
    shutil.copytree(embedded_checkpoint("emoji"), folder)
    for name in ("pytorch_lora_weights.safetensors", "adapter_config.json"):
        (folder / name).write_text("{}")
    assert locate(str(folder)) == Located(str(folder), is_pipeline=True)
    assert "adapter" not in describe_folder(str(folder))["components"]


def test_a_file_is_no_model(tmp_path):
    (tmp_path / "notes.txt").write_text("a")
    with pytest.raises(ValueError, match="is a file, and no folder"):
        resolve_model(str(tmp_path / "notes.txt"))


def test_where_the_embedded_checkpoint_has_moved(tmp_path):
    base = "/elsewhere/site-packages/diffusers_llada_uni/checkpoints/emoji/model"
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
    assert locate(str(tmp_path)) == Located(str(embedded_checkpoint("emoji")), True, str(tmp_path))


def test_a_repository_is_asked_for_what_it_holds(tmp_path, monkeypatch):
    """An adapter; and a network that fails is told of, whichever file it fails at."""
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "emoji"}))
    failing: set[str] = set()

    def download(repository, file):
        if file in failing:
            raise TimeoutError("too slow")
        if file != "adapter_config.json":
            raise RemoteEntryNotFoundError(file, response=Response(404, request=Request("GET", "https://hub")))
        return str(tmp_path / file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert locate("me/adapter") == Located(str(embedded_checkpoint("emoji")), True, "me/adapter")
    for file in ("model_index.json", "adapter_config.json"):
        failing |= {file}
        with pytest.raises(ValueError, match="`model` 'me/adapter' .*too slow"):
            locate("me/adapter")
        failing.clear()
