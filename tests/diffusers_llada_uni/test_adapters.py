"""Adapters of the language model and of decoders: loaded, combined, and saved with a pipeline."""

import json

import pytest
import torch
from diffusers import (
    AutoPipelineForImage2Image,
    AutoPipelineForInpainting,
    AutoPipelineForText2Image,
    DiffusionPipeline,
)
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from transformers import AutoModelForImageTextToText, AutoProcessor

from diffusers_llada_uni import LLaDAUniPipeline, embedded_checkpoint


DECODER_LORA = LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
MODEL_LORA = LoraConfig(r=2, target_modules=["query_key_value"], init_lora_weights=False)


@pytest.fixture
def pipe(converted_dir):
    pipe = LLaDAUniPipeline.from_pretrained(converted_dir)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def adapter_dir(converted_dir, tmp_path_factory):
    """An adapter of the language model, as peft saves it."""
    folder = tmp_path_factory.mktemp("adapter")
    model = AutoModelForImageTextToText.from_pretrained(converted_dir / "model")
    torch.manual_seed(0)
    PeftModel(model, MODEL_LORA).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def decoder_lora(converted_dir):
    torch.manual_seed(1)
    turbo = LLaDAUniPipeline.from_pretrained(converted_dir, model=None, processor=None).transformer_turbo
    turbo.add_adapter(DECODER_LORA, "style")
    weights = get_peft_model_state_dict(turbo, adapter_name="style")
    return {f"transformer.{name}": 3 * weight for name, weight in weights.items()}


@torch.no_grad()
def answers(pipe):
    """Logits of the language model, and latents of the decoder."""
    ids = torch.tensor([pipe.processor.tokenizer("What is this?")["input_ids"]])
    codes = torch.arange(6).view(1, 2, 3)
    generator = torch.Generator().manual_seed(0)
    latents = pipe.decode_codes(codes, num_inference_steps=2, generator=generator, output_type="latent")
    return torch.nan_to_num(pipe.model(input_ids=ids).logits, neginf=0.0), latents


def are_close(ours, theirs):
    return [torch.allclose(a, b, atol=1e-4) for a, b in zip(ours, theirs, strict=True)]


def test_adapters_of_model_and_decoder(pipe, adapter_dir, decoder_lora):
    before = answers(pipe)
    pipe.load_lora_weights(adapter_dir, adapter_name="words")
    of_model = answers(pipe)
    assert are_close(of_model, before) == [False, True]
    given = dict(decoder_lora)
    pipe.load_lora_weights(given, adapter_name="style")
    both = answers(pipe)
    assert are_close(both, of_model) == [True, False] and given.keys() == decoder_lora.keys()
    assert pipe.get_list_adapters() == {"model": ["words"], "transformer_turbo": ["style"]}

    for change, expected in (
        (lambda: pipe.set_adapters("style"), (before[0], both[1])),
        (lambda: pipe.set_adapters(["words", "style"], [1.0, 0.0]), (both[0], before[1])),
        (lambda: pipe.set_adapters(["words", "style"]), both),
        (pipe.disable_lora, before),
        (pipe.enable_lora, both),
        (pipe.fuse_lora, both),
        (pipe.unfuse_lora, both),
        (pipe.unload_lora_weights, before),
    ):
        change()
        assert are_close(answers(pipe), expected) == [True, True]
    assert pipe.get_list_adapters() == {}


def test_adapter_of_the_other_decoder(pipe, decoder_lora, tmp_path):
    weights = {name.removeprefix("transformer."): weight for name, weight in decoder_lora.items()}
    pipe.save_lora_weights(tmp_path, transformer_lora_layers=weights)
    pipe.load_lora_weights(tmp_path, decoder="normal")
    assert list(pipe.get_list_adapters()) == ["transformer"]


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"decoder": "slow"}, "`decoder` must be one of 'turbo', 'normal'"),
        ({"pretrained_model_name_or_path_or_dict": {"transformer.weight": torch.ones(1)}}, "LoRA or LoKr only"),
        ({"pretrained_model_name_or_path_or_dict": {}}, "LoRA or LoKr only"),
    ],
)
def test_bad_adapters(pipe, decoder_lora, arguments, words):
    with pytest.raises(ValueError, match=words):
        pipe.load_lora_weights(**{"pretrained_model_name_or_path_or_dict": decoder_lora, **arguments})
    pipe.register_modules(model=None)


def test_adapter_of_a_decoder_in_a_file(pipe, decoder_lora, tmp_path):
    weights = {name.removeprefix("transformer."): weight for name, weight in decoder_lora.items()}
    dropout = {**DECODER_LORA.to_dict(), "lora_dropout": 0.5}
    pipe.save_lora_weights(
        tmp_path,
        transformer_lora_layers=weights,
        transformer_lora_adapter_metadata=dropout,
        weight_name="a.safetensors",
    )
    before = answers(pipe)
    pipe.load_lora_weights(tmp_path / "a.safetensors")
    adapted = answers(pipe)
    assert are_close(adapted, before) == [True, False]
    assert torch.equal(answers(pipe)[1], adapted[1])  # nothing is dropped out


def test_adapter_of_a_model_that_is_not_loaded(converted_dir, adapter_dir):
    pipe = LLaDAUniPipeline.from_pretrained(converted_dir, model=None)
    with pytest.raises(ValueError, match="`model`, which is not loaded"):
        pipe.load_lora_weights(adapter_dir)


@pytest.mark.parametrize("way", ["load_adapter", "load_lora_weights", "PeftModel"])
def test_pipeline_with_an_adapter_is_saved_and_loaded(pipe, adapter_dir, tmp_path, way):
    before, weights = answers(pipe), {name: weight.clone() for name, weight in pipe.model.state_dict().items()}
    pipe.save_pretrained(tmp_path)  # what is saved over it leaves nothing behind
    if way == "PeftModel":
        pipe.model = PeftModel.from_pretrained(pipe.model, adapter_dir)
    else:
        (pipe.model.load_adapter if way == "load_adapter" else pipe.load_lora_weights)(str(adapter_dir))
    model, with_adapter = pipe.model, answers(pipe)
    assert are_close(with_adapter, before) == [False, True]
    pipe.save_pretrained(tmp_path)
    assert pipe.model is model and are_close(answers(pipe), with_adapter) == [True, True]
    assert "save_pretrained" not in vars(model)
    again = DiffusionPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert are_close(answers(again), with_adapter) == [True, True]
    assert not (tmp_path / "config.json").exists()  # the Auto classes would load the model without its adapter

    again.unload_lora_weights()
    again.save_pretrained(tmp_path)
    bare = DiffusionPipeline.from_pretrained(tmp_path)
    assert not bare.get_list_adapters()
    assert all(torch.equal(weight, weights[name]) for name, weight in bare.model.state_dict().items())


def test_adapters_that_are_not_saved(pipe, adapter_dir, decoder_lora, tmp_path):
    def refuses(words):
        with pytest.raises(ValueError, match=words):
            pipe.save_pretrained(tmp_path / "saved")
        assert not (tmp_path / "saved").exists()

    pipe.load_lora_weights(decoder_lora)
    refuses("`transformer_turbo` has an adapter")
    pipe.unload_lora_weights()
    pipe.load_lora_weights(adapter_dir, adapter_name="a")
    pipe.load_lora_weights(adapter_dir, adapter_name="b")
    refuses("`model` has the adapters 'a', 'b'")
    pipe.delete_adapters("b")
    pipe.fuse_lora()
    refuses("merged into its weights")
    fused = answers(pipe)
    pipe.unload_lora_weights()
    pipe.save_pretrained(tmp_path / "saved")
    again = DiffusionPipeline.from_pretrained(tmp_path / "saved")
    assert are_close(answers(again), fused) == [True, True]


@pytest.mark.parametrize("max_shard_size", ["50GB", "100KB"])
def test_auto_classes_load_what_a_pipeline_saves(pipe, tmp_path, max_shard_size):
    pipe.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert all(torch.equal(weight, pipe.model.state_dict()[name]) for name, weight in model.state_dict().items())
    assert model.generation_config.to_dict() == pipe.model.generation_config.to_dict()
    assert type(AutoProcessor.from_pretrained(tmp_path)) is type(pipe.processor)


def test_auto_classes_load_the_embedded_checkpoint():
    folder = embedded_checkpoint("emoji")
    for name in ("config.json", "generation_config.json"):
        assert json.loads((folder / name).read_text()) == json.loads((folder / "model" / name).read_text())
    model = AutoModelForImageTextToText.from_pretrained(folder)
    expected = AutoModelForImageTextToText.from_pretrained(folder / "model").state_dict()
    assert all(torch.equal(weight, expected[name]) for name, weight in model.state_dict().items())


@pytest.mark.parametrize("auto", [AutoPipelineForText2Image, AutoPipelineForImage2Image, AutoPipelineForInpainting])
def test_auto_pipelines(pipe, converted_dir, auto):
    assert type(auto.from_pretrained(converted_dir)) is LLaDAUniPipeline
    again = auto.from_pipe(pipe)
    assert type(again) is LLaDAUniPipeline and again.model is pipe.model
