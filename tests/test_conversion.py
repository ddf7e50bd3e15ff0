"""The converter: released layout -> pipeline folder -> released layout, and what it says about bad checkpoints."""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, ZImageTransformer2DModel
from huggingface_hub import ModelCard
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
)

import diffusers_llada_uni  # noqa: F401 (registers)
from conversion import output_plan, tensor_files
from conversion.convert_llada_uni_checkpoint import convert_to_diffusers, convert_to_released, main, make_model_card
from diffusers_llada_uni import LLaDAUniSemanticEmbedder
from transformers_llada_uni import LLaDAUniForConditionalGeneration


ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "conversion" / "convert_llada_uni_checkpoint.py"
SHARD = "model-00001-of-00002.safetensors"
IMAGE_TOKENIZER = "image_tokenizer/image_tokenizer.safetensors"
SIGVQ = "image_tokenizer/sigvq_embedding.pt"


def read_tensors(folder: Path, released: bool = True) -> dict[str, dict[str, torch.Tensor]]:
    """File -> tensors of a folder. The index that points into another folder is no file of tensors."""
    tensors = {str(file.relative_to(folder)): load_file(file) for file in sorted(folder.rglob("*.safetensors"))}
    if released:
        tensors[SIGVQ] = torch.load(folder / SIGVQ, weights_only=True)
    return {file: content for file, content in tensors.items() if not file.startswith("expected")}


def assert_equal(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def merged(files: dict[str, dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """All tensors of several files; files outside a component's folder keep their names apart."""
    return {name: tensor for content in files.values() for name, tensor in content.items()}


def backbone_of(folder: Path) -> dict[str, torch.Tensor]:
    return merged({file.name: load_file(file) for file in folder.glob("model*.safetensors")})


@pytest.fixture
def released(official_tiny, tmp_path) -> Path:
    """A copy of the released layout to spoil."""
    folder = tmp_path / "released"
    shutil.copytree(official_tiny, folder, ignore=shutil.ignore_patterns("expected", "images"))
    folder.chmod(0o755)
    for path in folder.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return folder


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
    assert not suffixes & {".pt", ".bin", ".pth", ".pkl", ".py"}  # safetensors only, no code
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


def test_model_card_of_something_trained():
    card = make_model_card("someone/model", ["turbo"], "bfloat16", base_model="a/b", training="Ten steps.")
    assert card.data.base_model == "a/b"
    assert "## Training\n\nTen steps." in card.text
    assert "## Evaluation" not in card.text
    assert "normal" not in card.text


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


# Files


def test_writer_writes_what_safetensors_writes(tmp_path):
    torch.manual_seed(0)
    tensors = {
        "b.half": torch.randn(3, 5).to(torch.bfloat16),
        "a": torch.randn(7),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 4),
        "flags": torch.tensor([True, False, True]),
        "long": torch.arange(4),
        "nan": torch.tensor([float("nan"), -0.0]),
    }
    save_file(tensors, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    refs = tensor_files.list_tensors(tmp_path / "theirs.safetensors")
    outputs = [tensor_files.OutputTensor(name, ref, ref.dtype) for name, ref in refs.items()]
    reported = []
    tensor_files.write_safetensors(tmp_path / "ours.safetensors", outputs, reported.append)
    assert sum(reported) == sum(tensor.nbytes for tensor in tensors.values())
    assert (tmp_path / "ours.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()
    tensor_files.verify_tensors(tmp_path / "ours.safetensors", outputs, reported.append)


@pytest.mark.parametrize("file", ["model/model-00002-of-00003.safetensors", "vae/diffusion_pytorch_model.safetensors"])
def test_verification_finds_a_flipped_bit(official_tiny, tmp_path, monkeypatch, file):
    write = tensor_files.write_safetensors

    def write_badly(path, outputs, report):
        write(path, outputs, report)
        if str(path).endswith(file):
            content = bytearray(path.read_bytes())
            content[-1] ^= 1
            path.write_bytes(content)

    monkeypatch.setattr(tensor_files, "write_safetensors", write_badly)
    with pytest.raises(ValueError, match="differs from its source"):
        convert_to_diffusers(official_tiny, tmp_path / "out" / "ours", progress=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, MemoryError])
@pytest.mark.parametrize("moment", ["write_safetensors", "verify_tensors"])
def test_nothing_is_left_behind(official_tiny, tmp_path, monkeypatch, error, moment):
    calls = []
    work = getattr(tensor_files, moment)

    def fail_at_the_third(*args):
        calls.append(args)
        if len(calls) == 3:
            raise error("stop")
        work(*args)

    monkeypatch.setattr(tensor_files, moment, fail_at_the_third)
    with pytest.raises(error):
        convert_to_diffusers(official_tiny, tmp_path / "deep" / "er" / "ours", progress=False)
    assert len(calls) == 3
    assert list(tmp_path.iterdir()) == []


def test_full_disk_is_refused_before_any_work(official_tiny, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=10**6)
    monkeypatch.setattr(output_plan.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OSError, match=r"0\.0 GB are needed .* only 0\.0 GB are free"):
        convert_to_diffusers(official_tiny, tmp_path / "ours", progress=False)
    assert list(tmp_path.iterdir()) == []


# What is wrong with a checkpoint


def edit_json(file: str, **changes) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        path = folder / file
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return spoil


def edit_tensors(file: str, change: Callable[[dict], None]) -> Callable[[Path], None]:
    """Changes the tensors of a file, and the index to match."""

    def spoil(folder: Path) -> None:
        path = folder / file
        if path.suffix == ".pt":
            tensors = torch.load(path, weights_only=True)
            change(tensors)
            torch.save(tensors, path)
            return
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)
        index_file = folder / "model.safetensors.index.json"
        if path.parent == folder:
            index = json.loads(index_file.read_text())
            index["weight_map"] = {k: f for k, f in index["weight_map"].items() if f != file}
            index["weight_map"] |= dict.fromkeys(tensors, file)
            index_file.write_text(json.dumps(index))

    return spoil


def drop(name: str) -> Callable[[dict], None]:
    return lambda tensors: tensors.pop(name)


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


# The command


def test_command_reports_errors_without_a_traceback(released, tmp_path, capsys):
    (released / SHARD).unlink()
    assert main([str(released), str(tmp_path / "out")]) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert SHARD in err
    assert not (tmp_path / "out").exists()


def test_command_both_ways(official_tiny, tmp_path, capsys):
    assert main([str(official_tiny), str(tmp_path / "ours"), "--decoder", "turbo", "--dtype", "bfloat16"]) == 0
    assert main([str(tmp_path / "ours"), str(tmp_path / "back"), "--to-released"]) == 0
    assert str(tmp_path / "back") in capsys.readouterr().out
    assert backbone_of(tmp_path / "back")["model.norm.weight"].dtype == torch.bfloat16


SLOW_WRITER = """
import sys, time
sys.path.insert(0, {root!r})
from conversion import convert_llada_uni_checkpoint as script, tensor_files
write = tensor_files.write_safetensors
def slowly(*args):
    write(*args)
    print("wrote", flush=True)
    time.sleep(60)
tensor_files.write_safetensors = slowly
sys.exit(script.main([{source!r}, {target!r}]))
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_command_leaves_nothing(official_tiny, tmp_path, number, code):
    program = SLOW_WRITER.format(root=str(ROOT), source=str(official_tiny), target=str(tmp_path / "out"))
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        assert process.stdout.readline().strip() == b"wrote"
        assert [path.suffix for path in tmp_path.iterdir()] == [".partial"]
        process.send_signal(number)
        assert process.wait(timeout=30) == code
    finally:
        process.kill()
        process.stdout.close()
    assert list(tmp_path.iterdir()) == []


# Memory

MEASURE = """
import sys, threading, time
sys.path.insert(0, {root!r})
import torch
from conversion.convert_llada_uni_checkpoint import convert_to_diffusers, convert_to_released

def anonymous_memory():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))

def watch():
    while not done.is_set():
        peak[0] = max(peak[0], anonymous_memory())
        time.sleep(0.001)

convert_to_diffusers({tiny!r}, {target!r} + "-warm", progress=False)
for convert, source, target, dtype in [
    (convert_to_diffusers, {source!r}, {target!r}, None),
    (convert_to_diffusers, {source!r}, {target!r} + "-half", torch.bfloat16),
    (convert_to_released, {target!r}, {target!r} + "-back", None),
]:
    done, peak, before = threading.Event(), [0], anonymous_memory()
    thread = threading.Thread(target=watch)
    thread.start()
    convert(source, target, dtype=dtype, progress=False)
    done.set()
    thread.join()
    print(peak[0] - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads RssAnon from /proc")
def test_memory_is_that_of_one_shard_not_of_the_model(released, official_tiny, tmp_path):
    layers, width = 7, 2048
    file = released / "config.json"
    config = json.loads(file.read_text()) | {"num_hidden_layers": layers, "moe_intermediate_size": width}
    file.write_text(json.dumps(config))
    tensors = backbone_of(released)
    for path in released.glob("model-*.safetensors"):
        path.unlink()
    shapes = {"gate_proj": (width, 64), "up_proj": (width, 64), "down_proj": (64, width)}
    weight_map = {}
    for layer in range(layers + 1):  # one shard for each layer, and one for what is not a layer
        shard = {k: t for k, t in tensors.items() if f"layers.{min(layer, 1)}." in k and layer < layers}
        if layer == layers:
            shard = {k: t for k, t in tensors.items() if "layers." not in k}
        elif layer:
            shard = {k.replace("layers.1.", f"layers.{layer}."): t.clone() for k, t in shard.items()}
            for name in shard:
                part = name.split(".")[-2]
                if "experts" in name:
                    shard[name] = torch.full(shapes[part], float(layer))
        name = f"model-{layer + 1:05d}-of-{layers + 1:05d}.safetensors"
        save_file(shard, released / name)
        weight_map |= dict.fromkeys(shard, name)
    (released / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    shard_size = (released / f"model-00003-of-{layers + 1:05d}.safetensors").stat().st_size
    assert shard_size > 20e6

    program = MEASURE.format(
        root=str(ROOT), source=str(released), target=str(tmp_path / "out"), tiny=str(official_tiny)
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    peaks = [int(line) for line in run.stdout.split()]
    assert len(peaks) == 3
    assert max(peaks) < shard_size, f"peaks {peaks} for shards of {shard_size}"
    assert_equal(backbone_of(tmp_path / "out-back"), backbone_of(released))


def test_only_one_source_file_is_open_at_a_time(official_tiny, tmp_path, monkeypatch):
    is_open, most = [], []

    class Counting:
        def __init__(self, path, framework):
            self.file = safe_open(path, framework=framework)

        def __enter__(self):
            is_open.append(self)
            most.append(len(is_open))
            return self.file.__enter__()

        def __getattr__(self, name):
            return getattr(self.file, name)

        def __exit__(self, *error):
            is_open.remove(self)
            return self.file.__exit__(*error)

    monkeypatch.setattr(tensor_files, "safe_open", Counting)
    convert_to_diffusers(official_tiny, tmp_path / "ours", progress=False)
    assert max(most) == 2  # the source and, while verifying, its copy
    assert not is_open
