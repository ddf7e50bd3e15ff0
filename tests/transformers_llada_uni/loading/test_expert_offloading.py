"""Experts kept on disk: not in memory, and the same tokens."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText, LlamaConfig

from diffusers_llada_uni import embedded_checkpoint
from tests.transformers_llada_uni.generation.property_cases import tiny_backbone
from transformers_llada_uni import expert_offload_device_map


FOLDER = embedded_checkpoint("emoji") / "model"


def test_experts_stay_on_disk_and_the_tokens_are_the_same(tmp_path):
    device_map = expert_offload_device_map(AutoConfig.from_pretrained(FOLDER), "cpu", experts_device="disk")
    settings = {"dtype": torch.float32}
    offloaded = AutoModelForImageTextToText.from_pretrained(
        FOLDER, device_map=device_map, offload_folder=tmp_path, **settings
    )
    full = AutoModelForImageTextToText.from_pretrained(FOLDER, **settings)
    prompt = torch.arange(40, 56)[None]
    assert torch.equal(offloaded.generate(prompt, max_new_tokens=16), full.generate(prompt, max_new_tokens=16))
    for name, parameter in offloaded.named_parameters():
        assert parameter.is_meta == (".experts." in name), name
    assert len(list(tmp_path.glob("*experts*.safetensors"))) == 2 * (full.config.text_config.num_hidden_layers - 1)


def test_every_weight_has_one_place():
    model = tiny_backbone()
    device_map = expert_offload_device_map(model.config, device=0, experts_device="cpu")
    for name, _ in [*model.named_parameters(), *model.named_buffers()]:
        places = [place for part, place in device_map.items() if name == part or name.startswith(f"{part}.")]
        assert places == ["cpu" if ".experts." in name else 0], name


@pytest.mark.parametrize(
    ("device", "experts_device", "message"),
    [
        ("cpu", "cpu", "`experts_device` is 'cpu', as is `device`"),
        (torch.device("cpu"), "cpu", "`experts_device` is 'cpu', as is `device`"),
        (0, "dsik", "`experts_device` should be 'cpu' or 'disk', got 'dsik'"),
        (0, 0, "`experts_device` should be 'cpu' or 'disk', got 0"),
    ],
)
def test_refuses_devices_that_make_no_sense(device, experts_device, message):
    with pytest.raises(ValueError, match=message):
        expert_offload_device_map(tiny_backbone().config, device, experts_device)


def test_refuses_other_models():
    with pytest.raises(TypeError, match="`config` should be .*, got LlamaConfig"):
        expert_offload_device_map(LlamaConfig(), 0, "cpu")
