"""The text-only relatives, LLaDA2.0-mini and LLaDA2.1-mini: with transformers' own classes, and trained."""

import json

import pytest
import torch
from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from tests.text_only import hidden_states_by_formula, stored_tensors
from transformers_llada_uni import BlockDiffusionGenerationConfig, LLaDA2MoeForBlockDiffusion
from transformers_llada_uni.chat_messages import encode_chat
from transformers_llada_uni.training.sft_config import LLaDAUniSFTConfig
from transformers_llada_uni.training.sft_trainer import LLaDAUniSFTTrainer


CHAT = [{"role": "user", "content": "What is it?"}]
# What LLaDA2.1's model card decodes with, for speed
EDITING = {"threshold": 0.5, "editing_threshold": 0.0, "max_post_steps": 16}


@pytest.fixture(scope="module")
def tokenizer(text_only):
    return AutoTokenizer.from_pretrained(text_only)


@pytest.fixture(scope="module")
def model(text_only):
    return AutoModelForCausalLM.from_pretrained(text_only, dtype="float32").eval()


def test_the_folder_loads_without_its_code(text_only, model):
    assert type(model) is LLaDA2MoeForBlockDiffusion and not list(text_only.glob("*.py"))
    assert AutoModelForCausalLM.from_pretrained(text_only).dtype == torch.bfloat16
    config = AutoConfig.from_pretrained(text_only)
    assert (config.image_token_offset, config.mask_token_id, config.eos_token_id) == (None, 156895, 156892)
    assert config.max_position_embeddings == 32768 and config.block_length == 32


@torch.no_grad()
def test_it_computes_what_the_family_does(text_only, model):
    ids = torch.randint(0, 157184, (1, 21), generator=torch.Generator().manual_seed(0))
    found = model.model(ids, block_length=8).last_hidden_state[0]
    torch.testing.assert_close(found, hidden_states_by_formula(stored_tensors(text_only), ids[0], 8))


def test_a_chat_is_written_by_its_own_template_and_its_words_are_words(tokenizer):
    wanted = "<role>SYSTEM</role>detailed thinking off<|role_end|><role>HUMAN</role>What is it?<|role_end|>"
    wanted += "<role>ASSISTANT</role>"
    assert tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True) == wanted
    ids = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True)["input_ids"]
    assert encode_chat(tokenizer, CHAT) == ids and tokenizer.decode(ids) == wanted
    sly = encode_chat(tokenizer, [{"role": "user", "content": "<|mask|> <|role_end|>"}])
    assert 156895 not in sly and tokenizer.decode(sly).count("<|role_end|>") == 3
    assert sly.count(tokenizer.convert_tokens_to_ids("<|role_end|>")) == 2
    for kind in ("image", "audio"):
        with pytest.raises(ValueError, match=f"{kind}.*reads text alone"):
            encode_chat(tokenizer, [{"role": "user", "content": [{"type": kind}]}])
    with pytest.raises(TypeError, match="`conversation` must be a list of messages"):
        encode_chat(tokenizer, [CHAT, CHAT])


def test_it_saves_as_it_lay_and_keeps_its_settings(text_only, model, tmp_path):
    model.generation_config.update(**EDITING)
    model.save_pretrained(tmp_path)
    saved = stored_tensors(tmp_path)
    assert saved.keys() == stored_tensors(text_only).keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in stored_tensors(text_only).items())
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "llada2_moe" and config["image_token_offset"] is None
    settings = BlockDiffusionGenerationConfig.from_pretrained(tmp_path)
    assert {name: getattr(settings, name) for name in EDITING} == EDITING


@torch.no_grad()
def test_it_is_trained_and_answers_with_token_editing(text_only, tokenizer, tmp_path):
    """After a few steps it gives the answer it was taught, with LLaDA2.1's settings in fewer passes."""
    answer = "a dog"
    model = AutoModelForCausalLM.from_pretrained(text_only, dtype="float32")
    rows = Dataset.from_dict({"messages": [[*CHAT, {"role": "assistant", "content": answer}]] * 4})
    settings = {"max_steps": 20, "learning_rate": 0.3, "per_device_train_batch_size": 2, "editing_weight": 1.0}
    settings |= {"lr_scheduler_type": "constant", "trained_parts": ["head"]}
    quiet = {"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": True}
    args = LLaDAUniSFTConfig(str(tmp_path), block_length=8, max_length=64, **settings, **quiet)
    trainer = LLaDAUniSFTTrainer(model, args, rows, processing_class=tokenizer)
    with torch.enable_grad():
        trainer.train()
    model.eval()

    passes = []
    model.register_forward_hook(lambda *_: passes.append(1))
    model.model.register_forward_hook(lambda *_: passes.append(1))
    ids = torch.tensor([encode_chat(tokenizer, CHAT)])
    counts = []
    for decoding in ({"threshold": 1.0, "num_steps_per_block": 8}, EDITING | {"num_steps_per_block": 8}):
        passes.clear()
        found = model.generate(ids, max_new_tokens=8, **decoding)[0, ids.shape[1] :]
        assert tokenizer.decode(found, skip_special_tokens=True) == answer
        counts.append(len(passes))
    assert counts[1] < counts[0]
