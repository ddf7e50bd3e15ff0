"""What the command does with a language model alone: LLaDA2.0-mini, LLaDA2.1-mini, and Ling before its conversion."""

import json
import shutil
from unittest.mock import Mock

import PIL.Image
import pytest
from huggingface_hub.errors import RemoteEntryNotFoundError

from llada_uni.pipeline_loading import LanguageModel, load_chat_model, load_pipeline
from transformers_llada_uni.loading.model_loading import load_processor


@pytest.fixture(scope="module")
def loaded(text_only) -> LanguageModel:
    """Loaded once; it answers at once, in words of the tokenizer."""
    chat_model = load_chat_model(str(text_only), "cpu")
    chat_model.model.generation_config.update(block_length=8, num_steps_per_block=1)
    chat_model.model.lm_head.weight.data[439:] = 0
    return chat_model


@pytest.fixture
def run(run_command, loaded, monkeypatch):
    monkeypatch.setattr("llada_uni.pipeline_loading.load_chat_model", lambda *_: loaded)
    return run_command


def test_info(run, text_only, ling):
    described = json.loads(run("info", str(text_only), "--json").stdout)
    assert described["components"].keys() == {"model"}
    assert f"`llada-uni chat --model {text_only}` talks with it" in described["advice"][0]
    assert f"`llada-uni convert {ling} FOLDER`" in run("info", str(ling)).stdout


def test_chat_and_ask(run, loaded, text_only):
    asked = run("ask", "What is it?", "--model", str(text_only), "--max-new-tokens", "8").stdout
    prompt = loaded.processor.apply_chat_template(
        [{"role": "user", "content": "What is it?"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    ids = loaded.model.generate(**prompt, max_new_tokens=8)[0, prompt["input_ids"].shape[1] :]
    assert asked == loaded.processor.decode(ids, skip_special_tokens=True) + "\n" != "\n"
    lines = "What is it?\n/quit\n"
    assert run("chat", "--model", str(text_only), "--max-new-tokens", "8", input=lines).stdout == asked


def test_it_neither_sees_nor_draws(run, text_only, tmp_path):
    PIL.Image.new("RGB", (64, 64)).save(tmp_path / "image.png")
    asked = run("ask", "What is it?", "-i", "image.png", "--model", str(text_only), code=2)
    assert "reads text alone" in asked.output
    drawn = run("draw", "a cat", "--model", str(text_only), code=2).output
    assert "with which `ask` and `chat` can talk; it has no image tokenizer and no decoder" in drawn
    assert not (tmp_path / "images").exists()


def test_of_the_hub_it_draws_neither(monkeypatch):
    """And no weights are fetched."""
    absent = RemoteEntryNotFoundError("absent", response=Mock())
    monkeypatch.setattr("huggingface_hub.hf_hub_download", Mock(side_effect=absent))
    with pytest.raises(ValueError, match="`model` 'owner/text' is no pipeline: .* a language model alone"):
        load_pipeline("owner/text", "cpu")


def test_one_that_was_fetched_before_needs_no_hub(tmp_path, text_only, monkeypatch):
    repository = tmp_path / "models--owner--text"
    shutil.copytree(text_only, repository / "snapshots" / ("0" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert load_chat_model("owner/text", "cpu").model.config.model_type == "llada2_moe"
    with pytest.raises(ValueError, match="`model` 'owner/text' is no pipeline: .* a language model alone"):
        load_pipeline("owner/text", "cpu")


def test_a_hub_that_cannot_be_reached_says_nothing_of_the_model(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for load in (load_pipeline, load_chat_model):
        with pytest.raises(ValueError, match="`model` 'owner/nothing' is no folder here, and cannot be fetched"):
            load("owner/nothing", "cpu")


def test_an_autoregressive_one_is_to_be_converted(ling, monkeypatch):
    """And nobody is asked whether to run the code that it comes with."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    with pytest.raises(ValueError, match="'bailing_moe'.*`llada-uni convert`"):
        load_chat_model(str(ling), "cpu")
    assert load_processor(str(ling)).mask_token is None  # trainers load it before the model


def test_a_damaged_one_is_told_of_in_a_line(tmp_path, text_only):
    for file in text_only.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "model-00001-of-00002.safetensors").unlink()
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"half")
    with pytest.raises(ValueError, match="`model` .* cannot be loaded"):
        load_chat_model(str(tmp_path), "cpu")
