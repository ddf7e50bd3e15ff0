"""Ling-mini-2.0 becomes a model that can be trained by block diffusion: the same one, with a mask token."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from llada_uni.cli import main
from llada_uni.conversion.convert_llada_uni_checkpoint import convert, convert_autoregressive
from tests.conversion.conversion_common import edit_json, edit_tensors
from tests.text_only import (
    LING_FIRST_TOKEN,
    LING_TOKENS,
    LING_VOCAB_SIZE,
    NUM_LAYERS,
    hidden_states_by_formula,
    stored_tensors,
)
from transformers_llada_uni import LLaDA2MoeForBlockDiffusion


EMBEDDINGS = "model.word_embeddings.weight"
MASK = LING_FIRST_TOKEN + len(LING_TOKENS)  # the first id that Ling's tokenizer does not use


@pytest.fixture(scope="module")
def converted(ling, tmp_path_factory):
    return convert_autoregressive(ling, tmp_path_factory.mktemp("converted") / "ling", progress=False)


@torch.no_grad()
def test_with_blocks_of_one_token_it_computes_what_it_did(ling, converted):
    model = AutoModelForCausalLM.from_pretrained(converted, dtype="float32").eval()
    assert type(model) is LLaDA2MoeForBlockDiffusion and model.config.block_length == 32
    ids = torch.randint(0, LING_FIRST_TOKEN, (1, 19), generator=torch.Generator().manual_seed(0))
    causal = hidden_states_by_formula(stored_tensors(ling), ids[0], block_length=1)
    torch.testing.assert_close(model.model(ids, block_length=1).last_hidden_state[0], causal)
    both_ways = hidden_states_by_formula(stored_tensors(ling), ids[0], block_length=8)
    torch.testing.assert_close(model.model(ids, block_length=8).last_hidden_state[0], both_ways)
    assert not torch.allclose(causal, both_ways, atol=0.1)


def test_every_tensor_stays_but_the_mask_and_the_layer_after_the_last(ling, converted):
    before, after = stored_tensors(ling), stored_tensors(converted)
    assert before.keys() - after.keys() == {name for name in before if f".layers.{NUM_LAYERS}." in name} != set()
    assert after.keys() <= before.keys()
    rows = before.pop(EMBEDDINGS), after.pop(EMBEDDINGS)
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())
    assert (rows[0] != rows[1]).any(dim=1).nonzero().flatten().tolist() == [MASK]
    assert rows[0][MASK].norm() == 0 and 0.5 < rows[1][MASK].norm() / rows[1][:400].norm(dim=1).mean() < 2
    assert len(list(converted.glob("*.safetensors"))) == 2


def test_it_knows_its_tokens(ling, converted):
    tokenizer = AutoTokenizer.from_pretrained(converted)
    end, turn_end = (tokenizer.convert_tokens_to_ids(token) for token in ("<|endoftext|>", "<|role_end|>"))
    assert (tokenizer.mask_token, tokenizer.mask_token_id) == ("<|mask|>", MASK)
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == end
    model = AutoModelForCausalLM.from_pretrained(converted)
    assert model.config.mask_token_id == model.generation_config.mask_token_id == MASK
    assert model.generation_config.eos_token_id == [end, turn_end]
    chat = [{"role": "user", "content": "a dog"}]
    theirs = AutoTokenizer.from_pretrained(ling).apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
    assert tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"] == theirs


def test_the_command_takes_a_token_that_is_there(ling, tmp_path, capsys):
    main(["convert", str(ling), str(tmp_path / "out"), "--mask-token", "[gMASK]", "--dtype", "float32"])
    assert AutoTokenizer.from_pretrained(tmp_path / "out").mask_token_id == LING_FIRST_TOKEN + 3
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["mask_token_id"] == LING_FIRST_TOKEN + 3 and config["dtype"] == "float32"


def test_what_transformers_5_writes_is_understood(ling, tmp_path):
    """Positions in `rope_parameters`; and a tokenizer may know ids beyond the vocabulary."""
    shutil.copytree(ling, tmp_path / "source")
    config = json.loads((tmp_path / "source" / "config.json").read_text())
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25}
    for name in ("rope_theta", "partial_rotary_factor", "rope_scaling"):
        del config[name]
    (tmp_path / "source" / "config.json").write_text(json.dumps(config | {"rope_parameters": rope}))
    content = json.loads((tmp_path / "source" / "tokenizer.json").read_text())
    content["model"]["vocab"]["beyond"] = LING_VOCAB_SIZE + 100
    (tmp_path / "source" / "tokenizer.json").write_text(json.dumps(content))
    convert(tmp_path / "source", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["rope_parameters"] == rope


def rename_mask(folder):
    """A tokenizer that has its mask token beyond the vocabulary."""
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["vocab"]["<|mask|>"] = LING_VOCAB_SIZE
    (folder / "tokenizer.json").write_text(json.dumps(content))


REFUSED = {
    "the first Ling": (edit_json("config.json", architectures=["BailingMoeForCausalLM"]), ["`architectures`"]),
    "biases": (edit_json("config.json", use_qkv_bias=True), ["`use_qkv_bias` is True"]),
    "no norms of heads": (edit_json("config.json", use_qk_norm=False), ["`use_qk_norm` is False"]),
    "softmax router": (edit_json("config.json", score_function="softmax"), ["`score_function` is 'softmax'"]),
    "stretched positions": (edit_json("config.json", rope_scaling={"type": "yarn"}), ["`rope_scaling`"]),
    "stretched positions, as transformers 5 writes them": (
        edit_json("config.json", rope_parameters={"rope_type": "linear", "factor": 4.0}),
        ["`rope_parameters`", "'linear'"],
    ),
    "a word for a number": (edit_json("config.json", num_nextn_predict_layers="1"), ["predict_layers", "config.json"]),
    "a word that ends texts": (edit_json("config.json", eos_token_id="end"), ["`eos_token_id`", "'end'"]),
    "wide shared expert": (
        edit_json("config.json", moe_shared_expert_intermediate_size=12),
        ["`moe_shared_expert_intermediate_size` is 12"],
    ),
    "quantised": (edit_json("config.json", quantization_config={"quant_method": "fp8"}), ["`quantization_config`"]),
    "one embedding for both": (edit_json("config.json", tie_word_embeddings=True), ["`tie_word_embeddings`"]),
    "a tensor too many": (
        edit_tensors("model-00001-of-00002.safetensors", lambda t: t.update({"model.extra": torch.ones(1)})),
        ["extra: model.extra"],
    ),
    "another size": (edit_json("config.json", hidden_size=32), ["misshapen"]),
    "no room for a mask": (rename_mask, ["`mask_token`", str(LING_VOCAB_SIZE), "`vocab_size`"]),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_has_no_place_is_refused_by_name(ling, tmp_path, what):
    spoil, words = REFUSED[what]
    shutil.copytree(ling, tmp_path / "source")
    spoil(tmp_path / "source")
    with pytest.raises(ValueError) as error:
        convert(tmp_path / "source", tmp_path / "out")
    assert all(word in str(error.value) for word in words), str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_arguments_that_have_no_meaning_are_refused(ling, official_tiny, tmp_path):
    with pytest.raises(ValueError, match="`decoder` is 'turbo'"):
        convert(ling, tmp_path / "out", decoder="turbo")
    with pytest.raises(ValueError, match="`mask_token` is for an autoregressive model"):
        convert(official_tiny, tmp_path / "out", mask_token="<|mask|>")
    for blank in ("", " "):
        with pytest.raises(ValueError, match=f"`mask_token` must be a token, got '{blank}'"):
            convert(ling, tmp_path / "out", mask_token=blank)
    with pytest.raises(ValueError, match="ends or fills texts"):
        convert(ling, tmp_path / "out", mask_token="<|role_end|>")
