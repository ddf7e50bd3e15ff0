"""Adapters as they are made for any causal language model: a `task_type` has a class of peft's own."""

import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model

from tests.transformers_llada_uni.generation.property_cases import tiny_backbone
from transformers_llada_uni.training.lora import check_adapter


IDS = torch.arange(5, 21)[None]
SETTINGS = {"max_new_tokens": 8, "block_length": 8, "eos_token_id": []}


def adapted(folder=None):
    model = tiny_backbone()
    if folder is not None:
        return model, PeftModel.from_pretrained(model, folder)
    config = LoraConfig(r=2, target_modules=["dense"], task_type="CAUSAL_LM", init_lora_weights=False)
    torch.manual_seed(0)
    return model, get_peft_model(model, config)


def test_lora_of_a_causal_language_model(tmp_path):
    plain = tiny_backbone().generate(IDS, **SETTINGS)
    model, adapter = adapted()
    found = adapter.generate(input_ids=IDS, **SETTINGS)
    assert not torch.equal(found, plain) and torch.equal(found, model.generate(IDS, **SETTINGS))
    with adapter.disable_adapter():
        assert torch.equal(adapter.generate(input_ids=IDS, **SETTINGS), plain)
    check_adapter(adapter)
    adapter.save_pretrained(tmp_path)
    _, again = adapted(tmp_path)
    assert torch.equal(again.generate(input_ids=IDS, **SETTINGS), found)


def test_a_prompt_that_was_learnt_is_refused_and_not_left_out():
    model = tiny_backbone()
    adapter = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    with pytest.raises(ValueError, match="A prompt that peft has learnt"):
        adapter.generate(input_ids=IDS, **SETTINGS)
    with pytest.raises(ValueError, match="`peft_config`: PROMPT_TUNING learns a prompt"):
        check_adapter(adapter)
    assert model.generate(IDS, **SETTINGS).shape == (1, 24)  # the model alone goes on
