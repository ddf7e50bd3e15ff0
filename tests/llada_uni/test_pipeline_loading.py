"""What a name means, and what is told of one that means nothing."""

import shutil

import pytest

from diffusers_llada_uni import embedded_checkpoint
from llada_uni.pipeline_loading import configurations_of, load_pipeline, resolve_model


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
