"""Eight-bit weights of attention and experts through `quantization_config`, on the checkpoint that comes with us."""

import pytest
import torch
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor, TorchAoConfig

from diffusers_llada_uni import embedded_checkpoint
from tests.transformers_llada_uni.generation.property_cases import tiny_backbone
from transformers_llada_uni import backbone_quantization_config


torchao = pytest.importorskip("torchao.quantization", reason="needs `pip install .[quantization]`")

FOLDER = embedded_checkpoint("emoji")
PROMPTS = ["a red apple", "full moon", "flag of Japan", "dog face"]


@pytest.fixture(scope="module", params=[torch.int8, torch.float8_e4m3fn], ids=str)
def dtype(request):
    return request.param


@pytest.fixture(scope="module")
def quantized(dtype):
    weights = torchao.Int8WeightOnlyConfig() if dtype == torch.int8 else torchao.Float8WeightOnlyConfig()
    config = backbone_quantization_config(weights)
    return AutoModelForImageTextToText.from_pretrained(
        FOLDER / "model", dtype=torch.float32, quantization_config=config
    ).eval()


@pytest.fixture(scope="module")
def full():
    return AutoModelForImageTextToText.from_pretrained(FOLDER / "model", dtype=torch.float32).eval()


def is_quantised(model) -> dict[str, bool]:
    eight_bit = (torchao.Int8Tensor, torchao.Float8Tensor)
    return {name: isinstance(parameter.data, eight_bit) for name, parameter in model.named_parameters()}


def test_quantises_attention_and_experts_and_nothing_else(quantized, full, dtype):
    wanted = {
        name: ".language_model." in name
        and ("attention" in name or "mlp" in name)
        and "layernorm" not in name
        and not name.endswith("mlp.gate.weight")
        for name, _ in full.named_parameters()
    }
    assert is_quantised(quantized) == wanted
    experts = [weight for name, weight in quantized.named_parameters() if name.endswith("experts.gate_up_proj")]
    assert experts and all(weight.data.qdata.dtype == dtype for weight in experts)


def test_predicts_what_the_full_weights_predict(quantized, full):
    inputs = AutoProcessor.from_pretrained(FOLDER / "processor")(text=PROMPTS, task="text_to_image")
    found, wanted = (model.generate_image_codes(**inputs, guidance_scale=2.0) for model in (quantized, full))
    assert (found == wanted).float().mean() > 0.9


def test_comes_back_from_disk_as_it_was(quantized, tmp_path):
    quantized.save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) == 1
    again = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert is_quantised(again) == is_quantised(quantized)
    ids = torch.arange(32)[None]
    with torch.no_grad():
        hidden_states = [model.get_decoder()(ids).last_hidden_state for model in (again, quantized)]
    assert torch.equal(*hidden_states)


def test_refuses_an_implementation_that_cannot_compute_with_them():
    with pytest.raises(ValueError, match="`experts_implementation` 'fused_gather' cannot"):
        AutoModelForImageTextToText.from_pretrained(
            FOLDER / "model",
            quantization_config=backbone_quantization_config(torchao.Int8WeightOnlyConfig()),
            experts_implementation="fused_gather",
        )


def test_experts_that_stay_whole_keep_their_implementation():
    model = AutoModelForImageTextToText.from_pretrained(
        FOLDER / "model", quantization_config=TorchAoConfig(torchao.Int8WeightOnlyConfig())
    )
    assert model.config.text_config._experts_implementation == "grouped_mm"
    assert any(is_quantised(model).values())


def test_quantises_the_bare_backbone_too(tmp_path):
    tiny_backbone().float().save_pretrained(tmp_path)
    model = AutoModel.from_pretrained(
        tmp_path, quantization_config=backbone_quantization_config(torchao.Int8WeightOnlyConfig())
    )
    names = {name for name, quantised in is_quantised(model).items() if quantised}
    assert {"layers.0.attention.query_key_value.weight", "layers.1.mlp.experts.gate_up_proj"} <= names
