"""What training has written, put into a pipeline."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file

from diffusers_llada_uni import LLaDAUniPipeline
from llada_uni.cli import main
from llada_uni.pipeline_assembly import assemble
from llada_uni.pipeline_loading import resolve_model
from transformers_llada_uni.training.image_tokenizer_saving import save_image_tokenizer

from .test_pipeline_loading import first_outputs, save_adapter


@pytest.fixture
def base(converted_dir) -> LLaDAUniPipeline:
    return LLaDAUniPipeline.from_pretrained(converted_dir)


@torch.no_grad()
def changed(module: torch.nn.Module) -> torch.nn.Module:
    for parameter in module.parameters():
        parameter += 1
    return module


def are_equal(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    weights = other.state_dict()
    return all(torch.equal(weight, weights[name].to(weight.dtype)) for name, weight in one.state_dict().items())


def test_parts_of_several_stages(base, converted_dir, tmp_path):
    trained = changed(LLaDAUniPipeline.from_pretrained(converted_dir).model)
    trained.save_pretrained(tmp_path / "sft")
    name = "transformer_turbo" if base.transformer_turbo is not None else "transformer"
    decoder = changed(getattr(LLaDAUniPipeline.from_pretrained(converted_dir), name))
    decoder.save_pretrained(tmp_path / "distill" / "transformer_turbo")
    FlowMatchEulerDiscreteScheduler(shift=2.5).save_pretrained(tmp_path / "distill" / "scheduler_turbo")
    new = assemble([tmp_path / "distill", tmp_path / "sft"], str(converted_dir), tmp_path / "new")
    assert sorted(new) == ["model", "scheduler_turbo", "transformer_turbo"]
    pipe = LLaDAUniPipeline.from_pretrained(tmp_path / "new")
    assert are_equal(pipe.model, trained) and not are_equal(pipe.model, base.model)
    assert are_equal(pipe.transformer_turbo, decoder) and are_equal(pipe.vae, base.vae)
    assert pipe.scheduler_turbo.config.shift == 2.5
    assert "turbo" in pipe.loaded_decoders


def test_an_image_tokenizer_leaves_the_language_model_as_it_was(base, converted_dir, tmp_path):
    other = LLaDAUniPipeline.from_pretrained(converted_dir)
    visual, vqmodel = changed(other.model.model.visual), other.model.model.vqmodel
    save_image_tokenizer(tmp_path / "tokenizer", visual, vqmodel, other.processor.image_processor)
    assert assemble([tmp_path / "tokenizer"], str(converted_dir), tmp_path / "new") == ["image_tokenizer"]
    pipe = LLaDAUniPipeline.from_pretrained(tmp_path / "new")
    assert are_equal(pipe.model.model.visual, visual)
    assert are_equal(pipe.model.model.language_model, base.model.model.language_model)


def test_a_model_does_not_undo_what_is_put_into_it(converted_dir, tmp_path):
    other = LLaDAUniPipeline.from_pretrained(converted_dir)
    visual, vqmodel = changed(other.model.model.visual), other.model.model.vqmodel
    save_image_tokenizer(tmp_path / "both", visual, vqmodel, other.processor.image_processor)
    LLaDAUniPipeline.from_pretrained(converted_dir).model.save_pretrained(tmp_path / "both")
    new = assemble([tmp_path / "both"], str(converted_dir), tmp_path / "new")
    assert sorted(new) == ["image_tokenizer", "model"]
    assert are_equal(LLaDAUniPipeline.from_pretrained(tmp_path / "new").model.model.visual, visual)


def test_each_part_keeps_the_type_of_its_numbers(converted_dir, tmp_path):
    pipe = LLaDAUniPipeline.from_pretrained(converted_dir)
    pipe.model.to(torch.float16)
    pipe.save_pretrained(tmp_path / "base")
    FlowMatchEulerDiscreteScheduler().save_pretrained(tmp_path / "trained" / "scheduler_turbo")
    assemble([tmp_path / "trained"], str(tmp_path / "base"), tmp_path / "new")
    for name, dtype in (("model", torch.float16), ("vae", torch.float32)):
        files = (next((tmp_path / folder / name).glob("*.safetensors")) for folder in ("base", "new"))
        of_base, of_new = ({key: weight.dtype for key, weight in load_file(file).items()} for file in files)
        changed_by_loading = {key for key in of_new if of_new[key] != of_base[key]}  # routers' biases
        assert all(key.endswith("expert_bias") for key in changed_by_loading) and dtype in of_new.values()


def test_an_adapter_knows_its_pipeline(base, converted_dir, tmp_path, capsys):
    added = save_adapter(
        LLaDAUniPipeline.from_pretrained(converted_dir).model, tmp_path / "adapter", str(converted_dir)
    )
    main(["assemble", str(tmp_path / "adapter"), "--output", str(tmp_path / "new")])
    assert capsys.readouterr().out == f"{tmp_path / 'new'}: with adapter\n"
    pipe = LLaDAUniPipeline.from_pretrained(tmp_path / "new")
    torch.testing.assert_close(first_outputs(pipe.model), first_outputs(base.model) + added)
    stored = load_file(tmp_path / "new" / "model" / "model.safetensors")
    assert {weight.dtype for name, weight in stored.items() if "dense" in name} == {base.model.dtype}


def test_what_cannot_be_put_together(converted_dir, official_tiny, text_only, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match="`trained`: .*empty' holds no part of a pipeline"):
        assemble([empty], str(converted_dir), tmp_path / "new")
    with pytest.raises(ValueError, match="`into` is missing"):
        assemble([text_only], None, tmp_path / "new")
    with pytest.raises(ValueError, match="is a model of text alone"):
        assemble([text_only], str(converted_dir), tmp_path / "new")
    with pytest.raises(FileExistsError, match="`output`"):
        assemble([text_only], str(converted_dir), empty)
    with pytest.raises(ValueError, match="`trained`: .* holds no part"):  # a pipeline, whole as it is
        assemble([converted_dir], str(converted_dir), tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "file, settings", [("config.json", {"model_type": "llada_uni"}), ("transformer/config.json", {})]
)
def test_a_part_that_is_named_as_a_model_is_told_what_to_do(tmp_path, file, settings):
    Path(tmp_path, file).parent.mkdir(exist_ok=True)
    Path(tmp_path, file).write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="`llada-uni assemble FOLDER --into PIPELINE"):
        resolve_model(str(tmp_path))
