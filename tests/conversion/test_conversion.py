"""The converter: released layout -> pipeline folder -> released layout, and what it says about bad checkpoints."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, ZImageTransformer2DModel
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import (
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
)

import diffusers_llada_uni  # noqa: F401 (registers)
from diffusers_llada_uni import LLaDAUniSemanticEmbedder
from llada_uni.conversion import tensor_files
from llada_uni.conversion.convert_llada_uni_checkpoint import (
    convert_to_diffusers,
    convert_to_released,
)
from tests.conversion.conversion_common import (
    IMAGE_TOKENIZER,
    SHARD,
    SIGVQ,
    assert_equal,
    backbone_of,
    merged,
    read_tensors,
)
from transformers_llada_uni import LLaDAUniForConditionalGeneration


@pytest.fixture(scope="module")
def pipeline(converted_dir):
    return DiffusionPipeline.from_pretrained(converted_dir)


@pytest.fixture(scope="module")
def back_dir(converted_dir, tmp_path_factory) -> Path:
    """There and back again."""
    return convert_to_released(converted_dir, tmp_path_factory.mktemp("back") / "released", progress=False)


# Released -> ours


def test_layout_of_the_pipeline_folder(converted_dir):
    index = json.loads((converted_dir / "model_index.json").read_text())
    assert index["_class_name"] == "LLaDAUniPipeline"
    components = {name for name, value in index.items() if not name.startswith("_") and value[0] is not None}
    assert components == {
        *("model", "processor", "semantic_embedder", "transformer", "transformer_turbo", "vae"),
        *("scheduler", "scheduler_turbo"),
    }
    assert all((converted_dir / name).is_dir() for name in components)
    suffixes = {path.suffix for path in converted_dir.rglob("*") if path.is_file()}
    assert not suffixes & {".pt", ".bin", ".pth", ".pkl"}  # safetensors only
    assert {path.name for path in converted_dir.rglob("*.py")} == {"load_llada_uni.py"}  # which holds no model
    assert not any(path.name.endswith(".partial") for path in converted_dir.parent.iterdir())


def test_backbone_is_renamed_shard_for_shard(official_tiny, converted_dir):
    for number in (1, 2):
        source = load_file(official_tiny / f"model-{number:05d}-of-00002.safetensors")
        written = load_file(converted_dir / "model" / f"model-{number:05d}-of-00003.safetensors")
        renamed = {
            f"model.language_model.{name.removeprefix('model.')}" if name.startswith("model.") else name: tensor
            for name, tensor in source.items()
        }
        assert_equal(written, renamed)
    assert_equal(
        load_file(converted_dir / "model" / "model-00003-of-00003.safetensors"),
        load_file(official_tiny / IMAGE_TOKENIZER),
    )


@pytest.mark.parametrize("where", [(), ("model",)], ids=["whole folder", "model folder"])
def test_model_loads_without_missing_or_unexpected_keys(official_tiny, converted_dir, where):
    model, info = AutoModelForImageTextToText.from_pretrained(converted_dir.joinpath(*where), output_loading_info=True)
    assert isinstance(model, LLaDAUniForConditionalGeneration)
    assert not any(info.values()), info
    state = model.state_dict()
    source = backbone_of(official_tiny)
    down = torch.stack([source[f"model.layers.1.mlp.experts.{e}.down_proj.weight"] for e in range(16)])
    assert torch.equal(state["model.language_model.layers.1.mlp.experts.down_proj"], down)
    codebook = load_file(official_tiny / IMAGE_TOKENIZER)["model.vqmodel.quantize.embedding.weight"]
    assert torch.equal(state["model.vqmodel.quantize.embedding.weight"], codebook)


def test_ids_come_from_the_tokenizer(official_tiny, converted_dir):
    vocab = AutoTokenizer.from_pretrained(official_tiny).get_vocab()
    config = AutoModelForImageTextToText.from_pretrained(converted_dir / "model").config
    assert config.image_start_token_id == vocab["<|image|>"]
    assert config.image_end_token_id == vocab["<|/image|>"]
    assert config.begin_of_image_token_id == vocab["<boi>"]
    assert config.image_token_id == vocab["<|reserved_token_0|>"]
    assert config.grid_token_ids == [vocab[f"<|reserved_token_{n}|>"] for n in range(64)]
    assert config.text_config.mask_token_id == vocab["<|mask|>"]
    assert config.text_config.pad_token_id == config.text_config.eos_token_id == vocab["<|endoftext|>"]
    generation = json.loads((converted_dir / "model" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [vocab["<|endoftext|>"], vocab["<|role_end|>"]]
    assert generation["mask_token_id"] == vocab["<|mask|>"]
    assert generation["pad_token_id"] == vocab["<|endoftext|>"]


def test_ids_follow_a_tokenizer_with_other_ids(released, tmp_path):
    file = released / "tokenizer.json"
    swapped = file.read_text().replace('"<boi>"', '"<x>"').replace('"<|/image|>"', '"<boi>"')
    file.write_text(swapped.replace('"<x>"', '"<|/image|>"'))
    config_file = released / "tokenizer_config.json"
    raw = json.loads(config_file.read_text())
    raw.pop("added_tokens_decoder", None)
    config_file.write_text(json.dumps(raw))
    vocab = AutoTokenizer.from_pretrained(released).get_vocab()
    assert vocab["<boi>"] < vocab["<|/image|>"]
    folder = convert_to_diffusers(released, tmp_path / "ours", progress=False)
    config = json.loads((folder / "model" / "config.json").read_text())
    assert config["begin_of_image_token_id"] == vocab["<boi>"]
    assert config["image_end_token_id"] == vocab["<|/image|>"]


@pytest.mark.parametrize("where", [(), ("processor",)], ids=["whole folder", "processor folder"])
def test_processor_loads_with_released_values(official_tiny, converted_dir, where):
    processor = AutoProcessor.from_pretrained(converted_dir.joinpath(*where))
    assert type(processor).__name__ == "LLaDAUniProcessor"
    assert processor.image_token_offset == 512
    assert processor.codebook_size == 256
    assert processor.max_position_embeddings == 2048
    image_processor = AutoImageProcessor.from_pretrained(converted_dir.joinpath(*where))
    assert type(image_processor).__name__ == "LLaDAUniImageProcessor"
    released = json.loads((official_tiny / "image_tokenizer" / "preprocessor_config.json").read_text())
    for name in ("image_mean", "image_std", "rescale_factor", "patch_size"):
        assert pytest.approx(getattr(image_processor, name)) == released[name]


def test_released_mean_is_taken_and_the_slip_is_not(released, tmp_path):
    file = released / "image_tokenizer" / "preprocessor_config.json"
    raw = json.loads(file.read_text()) | {"merge_size": 2, "image_mean": [0.1, 0.2, 0.3]}
    file.write_text(json.dumps(raw))
    folder = convert_to_diffusers(released, tmp_path / "ours", progress=False)
    image_processor = AutoImageProcessor.from_pretrained(folder / "processor")
    assert list(image_processor.image_mean) == [0.1, 0.2, 0.3]
    assert "merge_size" not in image_processor.to_dict()
    back = convert_to_released(folder, tmp_path / "back", progress=False)
    written = json.loads((back / "image_tokenizer" / "preprocessor_config.json").read_text())
    assert written["image_mean"] == [0.1, 0.2, 0.3]
    assert written["merge_size"] == 1


def test_decoder_parts_load_strictly(official_tiny, converted_dir):
    for cls, name in [
        (ZImageTransformer2DModel, "transformer"),
        (ZImageTransformer2DModel, "transformer_turbo"),
        (AutoencoderKL, "vae"),
        (LLaDAUniSemanticEmbedder, "semantic_embedder"),
    ]:
        model, info = cls.from_pretrained(converted_dir / name, output_loading_info=True)
        assert not any(info.values()), (name, info)
    transformer = ZImageTransformer2DModel.from_pretrained(converted_dir / "transformer_turbo")
    source = load_file(official_tiny / "decoder-turbo" / "model.safetensors")
    assert torch.equal(transformer.cap_embedder[1].weight, source["semantic_embedder.1.weight"])
    assert transformer.config.cap_feat_dim == 64
    assert transformer.config.axes_lens == [32768, 1024, 1024]
    assert transformer.config.siglip_feat_dim is None
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(converted_dir / "scheduler")
    assert (scheduler.config.shift, scheduler.config.stochastic_sampling) == (6.0, False)
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(converted_dir / "scheduler_turbo")
    assert (scheduler.config.shift, scheduler.config.stochastic_sampling) == (1.0, True)


def test_feature_width_comes_from_the_tensors(released, tmp_path):
    """The released config may still describe the text-conditioned ancestor, with other widths and shorter tables."""
    file = released / "decoder" / "config.json"
    raw = json.loads(file.read_text()) | {"cap_feat_dim": 2560, "axes_lens": [1536, 512, 2048], "unknown_key": 1}
    file.write_text(json.dumps(raw))
    folder = convert_to_diffusers(released, tmp_path / "ours", decoder="normal", progress=False)
    config = ZImageTransformer2DModel.from_pretrained(folder / "transformer").config
    assert config.cap_feat_dim == 64
    assert config.axes_lens == [32768, 1024, 2048]


def test_pipeline_loads_by_name(pipeline):
    assert type(pipeline).__name__ == "LLaDAUniPipeline"
    assert pipeline.transformer is not None
    assert pipeline.transformer_turbo is not None
    assert pipeline.scheduler_turbo.config.stochastic_sampling


@pytest.mark.parametrize(("decoder", "absent"), [("turbo", "transformer"), ("normal", "transformer_turbo")])
def test_one_decoder_only(official_tiny, tmp_path, decoder, absent):
    folder = convert_to_diffusers(official_tiny, tmp_path / "ours", decoder=decoder, progress=False)
    assert not (folder / absent).exists()
    pipe = DiffusionPipeline.from_pretrained(folder)
    assert getattr(pipe, absent) is None
    present = {"transformer": "transformer_turbo", "transformer_turbo": "transformer"}[absent]
    assert isinstance(getattr(pipe, present), ZImageTransformer2DModel)
    back = convert_to_released(folder, tmp_path / "back", progress=False)
    assert (back / "decoder-turbo").exists() == (decoder == "turbo")
    assert (back / "decoder").exists() == (decoder == "normal")


def test_default_is_the_decoders_that_are_there(released, tmp_path):
    shutil.rmtree(released / "decoder")
    folder = convert_to_diffusers(released, tmp_path / "ours", progress=False)
    assert not (folder / "transformer").exists()
    assert (folder / "transformer_turbo").exists()


def test_large_components_are_sharded_and_joined_again(official_tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_files, "MAX_SHARD_BYTES", 500_000)
    folder = convert_to_diffusers(official_tiny, tmp_path / "ours", decoder="turbo", progress=False)
    shards = sorted((folder / "transformer_turbo").glob("*.safetensors"))
    assert len(shards) > 3
    assert all(path.stat().st_size < 550_000 or len(load_file(path)) == 1 for path in shards)
    _, info = ZImageTransformer2DModel.from_pretrained(folder / "transformer_turbo", output_loading_info=True)
    assert not any(info.values())
    back = convert_to_released(folder, tmp_path / "back", progress=False)
    source = load_file(official_tiny / "decoder-turbo" / "model.safetensors")
    assert_equal(load_file(back / "decoder-turbo" / "model.safetensors"), source)
    assert_equal(backbone_of(back), backbone_of(official_tiny))


def test_single_file_backbone(released, official_tiny, tmp_path):
    tensors = backbone_of(released)
    for file in released.glob("model*"):
        file.unlink()
    save_file(tensors, released / "model.safetensors")
    folder = convert_to_diffusers(released, tmp_path / "ours", progress=False)
    _, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    back = convert_to_released(folder, tmp_path / "back", progress=False)
    assert [path.name for path in back.glob("model*")] == ["model.safetensors"]
    assert_equal(backbone_of(back), tensors)


def test_model_card(converted_dir):
    card = ModelCard.load(converted_dir / "README.md")
    assert card.data.license == "apache-2.0"
    assert card.data.library_name == "diffusers"
    assert card.data.pipeline_tag == "any-to-any"
    assert "base_model" not in card.data.to_dict()
    assert "turbo" in card.text
    assert "normal" in card.text
    assert "float32" in card.text
    assert converted_dir.name in card.text
    assert "{{" not in card.content
    assert "{%" not in card.content


# Ours -> released


def test_round_trip_gives_equal_files(official_tiny, back_dir):
    source, back = read_tensors(official_tiny), read_tensors(back_dir)
    assert back.keys() == source.keys()  # the same shards too
    for file in source:
        assert_equal(back[file], source[file])
    index = "model.safetensors.index.json"
    assert json.loads((back_dir / index).read_text()) == json.loads((official_tiny / index).read_text())


@pytest.mark.parametrize(
    ("file", "changed"),
    [
        ("config.json", {"auto_map", "transformers_version"}),
        ("image_tokenizer/config.json", set()),
        ("image_tokenizer/preprocessor_config.json", set()),
        ("vae/config.json", {"_diffusers_version"}),
        ("decoder/config.json", {"_diffusers_version", "axes_lens"}),
        ("decoder-turbo/config.json", {"_diffusers_version", "axes_lens"}),
    ],
)
def test_round_trip_keeps_every_setting(official_tiny, back_dir, file, changed):
    source, back = (json.loads((folder / file).read_text()) for folder in (official_tiny, back_dir))
    for name, value in source.items():
        if name in changed:
            continue
        if isinstance(value, dict):
            assert back[name] | value == back[name], name
        else:
            assert back[name] == value, name
    assert "auto_map" not in back


def test_round_trip_keeps_the_tokenizer(official_tiny, back_dir):
    source, back = AutoTokenizer.from_pretrained(official_tiny), AutoTokenizer.from_pretrained(back_dir)
    assert back.get_vocab() == source.get_vocab()
    text = "<role>HUMAN</role>a <|image|> cat, 12 €<|role_end|>"
    assert back(text).input_ids == source(text).input_ids
    assert back.special_tokens_map == source.special_tokens_map
    assert back.chat_template is None
    assert source.chat_template is None


def test_round_trip_keeps_the_tokenizers_own_chat_template(released, tmp_path):
    file = released / "tokenizer_config.json"
    template = "{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}{% endfor %}"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": template}))
    folder = convert_to_diffusers(released, tmp_path / "ours", progress=False)
    assert AutoProcessor.from_pretrained(folder).tokenizer.chat_template == template
    back = convert_to_released(folder, tmp_path / "back", progress=False)
    assert AutoTokenizer.from_pretrained(back).chat_template == template


def test_released_folder_loads_as_a_backbone(official_tiny, back_dir):
    ids = torch.tensor([[442, 5, 6, 7, 441, 441]])
    models = [AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (official_tiny, back_dir)]
    with torch.no_grad():
        source, back = (model(ids).logits for model in models)
    assert torch.equal(source, back)


def test_saved_model_converts_whatever_its_shards(official_tiny, converted_dir, tmp_path):
    model = AutoModelForImageTextToText.from_pretrained(converted_dir / "model")
    model.save_pretrained(tmp_path / "saved", max_shard_size="150KB")
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) > 5
    back = convert_to_released(tmp_path / "saved", tmp_path / "back", progress=False)
    assert_equal(backbone_of(back), backbone_of(official_tiny))
    assert_equal(load_file(back / IMAGE_TOKENIZER), load_file(official_tiny / IMAGE_TOKENIZER))
    assert not (back / "tokenizer.json").exists()
    assert not (back / "vae").exists()
    model, info = AutoModelForCausalLM.from_pretrained(back, output_loading_info=True)
    assert not any(info.values())


def test_saved_model_with_its_processor_brings_the_tokenizer(converted_dir, tmp_path):
    AutoModelForImageTextToText.from_pretrained(converted_dir / "model").save_pretrained(tmp_path / "saved")
    AutoProcessor.from_pretrained(converted_dir / "processor").save_pretrained(tmp_path / "saved")
    back = convert_to_released(tmp_path / "saved", tmp_path / "back", progress=False)
    assert AutoTokenizer.from_pretrained(back).mask_token == "<|mask|>"


def test_saved_pipeline_converts(official_tiny, pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "saved")
    back = convert_to_released(tmp_path / "saved", tmp_path / "back", progress=False)
    source, back = read_tensors(official_tiny), read_tensors(back)
    assert_equal(merged({f: t for f, t in back.items() if f.startswith("model")}), backbone_of(official_tiny))
    for file in (IMAGE_TOKENIZER, SIGVQ, "decoder/model.safetensors", "decoder-turbo/model.safetensors"):
        assert_equal(back[file], source[file])


# Dtypes


def test_dtype_casts_all_but_the_routers_bias(official_tiny, tmp_path):
    folder = convert_to_diffusers(official_tiny, tmp_path / "ours", dtype=torch.bfloat16, progress=False)
    source = merged({file: tensors for file, tensors in read_tensors(official_tiny).items() if file.startswith("mod")})
    written = merged({path.name: load_file(path) for path in (folder / "model").glob("*.safetensors")})
    kept = {name for name, tensor in written.items() if tensor.dtype != torch.bfloat16}
    assert kept == {f"model.language_model.layers.{n}.mlp.gate.expert_bias" for n in (1, 2)}
    assert all(written[name].dtype == torch.float32 for name in kept)
    assert torch.equal(written["lm_head.weight"], source["lm_head.weight"].to(torch.bfloat16))
    for name in ("transformer", "vae", "semantic_embedder"):
        for path in (folder / name).glob("*.safetensors"):
            assert {tensor.dtype for tensor in load_file(path).values()} == {torch.bfloat16}
    assert AutoModelForImageTextToText.from_pretrained(folder).dtype == torch.bfloat16
    assert "bfloat16" in (folder / "README.md").read_text()

    back = convert_to_released(folder, tmp_path / "back", progress=False)
    assert json.loads((back / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert backbone_of(back)["lm_head.weight"].dtype == torch.bfloat16
    assert torch.load(back / SIGVQ, weights_only=True)["prior_token_embedding.weight"].dtype == torch.bfloat16


def test_dtype_widens_a_bfloat16_checkpoint_exactly(official_tiny, tmp_path):
    half = convert_to_diffusers(official_tiny, tmp_path / "half", dtype=torch.bfloat16, progress=False)
    back = convert_to_released(half, tmp_path / "back", dtype=torch.float32, progress=False)
    for name, tensor in backbone_of(back).items():
        wanted = backbone_of(official_tiny)[name]
        if not name.endswith("expert_bias"):
            wanted = wanted.to(torch.bfloat16).to(torch.float32)
        assert torch.equal(tensor, wanted), name


def test_value_too_large_for_the_dtype(released, tmp_path):
    tensors = load_file(released / SHARD)
    tensors["model.layers.0.mlp.up_proj.weight"][3, 4] = 1e6
    save_file(tensors, released / SHARD)
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.up_proj\.weight: 1 values do not fit into float16"):
        convert_to_diffusers(released, tmp_path / "out" / "ours", dtype=torch.float16, progress=False)
    assert not (tmp_path / "out").exists()
