"""
Weights in blocks of FP8: a copy of the tiny release, quantised as DeepSeek-V3's weights are, converts, comes back, and
loads as what its blocks and scales say. The kernels that compute in FP8 need a GPU; here transformers dequantises.
"""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.integrations.finegrained_fp8 import FP8Experts, FP8Linear
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

import transformers_llada_uni  # noqa: F401 (registers)
from llada_uni.conversion.convert_llada_uni_checkpoint import convert_to_diffusers, convert_to_released
from llada_uni.conversion.llada_uni_layout import backbone_name_to_ours
from tests.conversion.conversion_common import (
    SHARD,
    assert_equal,
    backbone_of,
    copy_released,
    drop,
    edit_json,
    edit_tensors,
    merged,
    read_tensors,
)


BLOCK = 16  # 128 in the release, wider than the tiny model
QUANTIZATION = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [BLOCK, BLOCK],
}


def is_quantised(name: str, tensor: torch.Tensor) -> bool:
    return ".layers." in name and tensor.ndim == 2 and not name.endswith("mlp.gate.weight")


def blocks_of(weight: torch.Tensor) -> torch.Tensor:
    rows, columns = weight.shape
    return weight.view(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK)


@pytest.fixture(scope="module")
def fp8_dir(official_tiny, tmp_path_factory):
    folder = copy_released(official_tiny, tmp_path_factory.mktemp("fp8") / "released")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    for file in folder.glob("model-*.safetensors"):
        tensors = load_file(file)
        for name, tensor in list(tensors.items()):
            if is_quantised(name, tensor):
                blocks = blocks_of(tensor)
                scales = blocks.abs().amax(dim=(1, 3)) / torch.finfo(torch.float8_e4m3fn).max
                tensors[name] = (blocks / scales[:, None, :, None]).view_as(tensor).to(torch.float8_e4m3fn)
                tensors[f"{name}_scale_inv"] = scales
        save_file(tensors, file, metadata={"format": "pt"})
        index["weight_map"] |= dict.fromkeys(tensors, file.name)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    edit_json("config.json", quantization_config=QUANTIZATION)(folder)
    return folder


@pytest.fixture
def spoilt(fp8_dir, tmp_path):
    return copy_released(fp8_dir, tmp_path / "spoilt")


@pytest.fixture(scope="module")
def dequantised(official_tiny, fp8_dir, tmp_path_factory):
    """The release whose weights are what blocks and scales say, computed here."""
    folder = copy_released(official_tiny, tmp_path_factory.mktemp("dequantised") / "released")
    for file in fp8_dir.glob("model-*.safetensors"):
        tensors, whole = load_file(file), {}
        for name, tensor in tensors.items():
            if tensor.dtype == torch.float8_e4m3fn:
                scales = tensors[f"{name}_scale_inv"][:, None, :, None]
                tensor = (blocks_of(tensor.float()) * scales).view_as(tensor)
            if not name.endswith("_scale_inv"):
                whole[name] = tensor
        save_file(whole, folder / file.name, metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def converted(fp8_dir, tmp_path_factory):
    return convert_to_diffusers(fp8_dir, tmp_path_factory.mktemp("fp8") / "ours", progress=False)


def test_released_folder_loads_dequantised(fp8_dir, dequantised):
    found, wanted = (AutoModelForCausalLM.from_pretrained(folder) for folder in (fp8_dir, dequantised))
    assert_equal(found.state_dict(), wanted.state_dict())


def test_pipeline_folder_loads_dequantised(converted, dequantised, tmp_path):
    wanted = convert_to_diffusers(dequantised, tmp_path / "wanted", progress=False)
    found, wanted = (AutoModelForImageTextToText.from_pretrained(folder / "model") for folder in (converted, wanted))
    assert_equal(found.state_dict(), wanted.state_dict())


def test_round_trip(fp8_dir, converted, tmp_path):
    back = convert_to_released(converted, tmp_path / "back", progress=False)
    found, wanted = read_tensors(back), read_tensors(fp8_dir)
    assert found.keys() == wanted.keys()
    for file in wanted:
        assert_equal(found[file], wanted[file])
    config = json.loads((back / "config.json").read_text())
    assert config["quantization_config"].items() >= QUANTIZATION.items()
    assert config["torch_dtype"] == "float32"
    assert_equal(
        AutoModelForCausalLM.from_pretrained(back).state_dict(),
        AutoModelForCausalLM.from_pretrained(fp8_dir).state_dict(),
    )


def test_requested_dtype_leaves_weights_and_scales(fp8_dir, tmp_path):
    folder = convert_to_diffusers(fp8_dir, tmp_path / "half", dtype=torch.bfloat16, progress=False)
    back = merged(read_tensors(folder / "model", released=False))
    for name, tensor in backbone_of(fp8_dir).items():
        found = back[backbone_name_to_ours(name)]
        is_left = tensor.dtype == torch.float8_e4m3fn or name.endswith(("_scale_inv", "expert_bias"))
        assert found.dtype == (tensor.dtype if is_left else torch.bfloat16), name
    assert json.loads((folder / "model" / "config.json").read_text())["dtype"] == "bfloat16"


def test_where_fp8_is_computed_only_the_quantised_weights_are(converted, monkeypatch):
    """As on a GPU: all weights find their place, and the image tokenizer, the routers and the head stay whole."""
    monkeypatch.setattr(FineGrainedFP8HfQuantizer, "validate_environment", lambda *args, **kwargs: None)
    model, report = AutoModelForImageTextToText.from_pretrained(converted / "model", output_loading_info=True)
    assert not any(report.values()), report
    backbone = model.model.language_model
    assert {type(module) for module in backbone.modules() if isinstance(module, nn.Linear)} == {FP8Linear}
    assert sum(isinstance(module, FP8Experts) for module in backbone.modules()) == 2
    others = [module for name, module in model.named_modules() if "language_model" not in name]
    assert not any(isinstance(module, FP8Linear) for module in others)
    assert type(model.lm_head) is nn.Linear


QUERY = "model.layers.0.attention.query_key_value.weight"


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        (None, "no `quantization_config`"),
        (QUANTIZATION | {"quant_method": "gptq"}, "'gptq'"),
        (QUANTIZATION | {"weight_block_size": None}, "`weight_block_size`"),
        (QUANTIZATION | {"weight_block_size": [BLOCK, 0]}, "`weight_block_size`"),
        (QUANTIZATION | {"weight_block_size": [BLOCK, 2 * BLOCK]}, "misshapen"),
    ],
)
def test_config_that_does_not_fit(spoilt, tmp_path, quantization, message):
    edit_json("config.json", quantization_config=quantization)(spoilt)
    with pytest.raises(ValueError, match=message):
        convert_to_diffusers(spoilt, tmp_path / "ours", progress=False)
    assert not (tmp_path / "ours").exists()


def test_scale_that_is_missing(spoilt, tmp_path):
    edit_tensors(SHARD, drop(f"{QUERY}_scale_inv"))(spoilt)
    with pytest.raises(ValueError, match=f"1 missing: {QUERY}_scale_inv"):
        convert_to_diffusers(spoilt, tmp_path / "ours", progress=False)


def test_config_of_a_checkpoint_that_is_not_quantised(official_tiny, tmp_path):
    folder = copy_released(official_tiny, tmp_path / "released")
    edit_json("config.json", quantization_config=QUANTIZATION)(folder)
    with pytest.raises(ValueError, match="no weight is float8_e4m3"):
        convert_to_diffusers(folder, tmp_path / "ours", progress=False)


def test_config_that_says_that_nothing_is_quantised(official_tiny, tmp_path):
    folder = copy_released(official_tiny, tmp_path / "released")
    edit_json("config.json", quantization_config=None)(folder)
    ours = convert_to_diffusers(folder, tmp_path / "ours", progress=False)
    assert "quantization_config" not in json.loads((ours / "model" / "config.json").read_text())
