import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, DynamicCache

from tests.common import ModelTesterMixin, assert_is_one_graph, saved_tensors
from tests.transformers_llada_uni.generation.property_cases import tiny_backbone
from transformers_llada_uni import LLaDA2MoeConfig, LLaDA2MoeForBlockDiffusion, LLaDA2MoeModel
from transformers_llada_uni.masking_block_causal import create_block_causal_mask
from transformers_llada_uni.modeling_llada2_moe import LLaDA2MoeTopkRouter


@pytest.fixture(scope="module")
def expected(official_tiny):
    return load_file(official_tiny / "expected" / "backbone.safetensors")


@pytest.fixture(scope="module")
def model(official_tiny):
    return LLaDA2MoeForBlockDiffusion.from_pretrained(official_tiny)


class TestCommon(ModelTesterMixin):
    attention_implementations = ("eager", "flex_attention")
    has_experts = True
    splits_over_devices = True
    supports_gradient_checkpointing = True

    def model(self):
        torch.manual_seed(0)
        config = LLaDA2MoeConfig(
            vocab_size=96,
            hidden_size=32,
            intermediate_size=48,
            moe_intermediate_size=16,
            num_hidden_layers=3,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            num_experts=8,
            num_experts_per_tok=2,
            n_group=2,
            topk_group=1,
            max_position_embeddings=128,
            initializer_range=0.1,
        )
        return LLaDA2MoeForBlockDiffusion(config).eval()

    def inputs(self):
        ids = torch.randint(0, 96, (2, 24), generator=torch.Generator().manual_seed(0))
        return {"input_ids": ids, "block_length": 8}

    def output(self, outputs):
        return outputs.logits

    def disk_map(self):
        layers = {f"model.layers.{layer}": "disk" if layer == 1 else "cpu" for layer in range(3)}
        placed = {name: "cpu" for name in ("model.word_embeddings", "model.norm", "model.rotary_emb", "lm_head")}
        return {**layers, **placed}


class TestAgreesWithTheRelease:
    @pytest.mark.parametrize("implementation", ["sdpa", "eager", "flex_attention"])
    def test_logits_hidden_states_and_router(self, model, expected, implementation):
        model.set_attn_implementation(implementation)
        with torch.no_grad():
            outputs = model(
                expected["forward.input_ids"], block_length=8, output_hidden_states=True, output_router_logits=True
            )
        model.set_attn_implementation("sdpa")
        torch.testing.assert_close(outputs.logits, expected["forward.logits"], rtol=0, atol=1e-4)
        assert len(outputs.hidden_states) == 4
        for layer, hidden_states in enumerate(outputs.hidden_states):
            torch.testing.assert_close(hidden_states, expected[f"forward.hidden_states.{layer}"], rtol=0, atol=1e-4)
        assert len(outputs.router_logits) == 2
        for layer, router_logits in enumerate(outputs.router_logits):
            torch.testing.assert_close(
                router_logits.view(2, 24, -1), expected[f"forward.router_logits.{layer}"], rtol=0, atol=1e-4
            )

    def test_router_choices(self, model, expected):
        choices = []
        hooks = [
            module.register_forward_hook(lambda module, args, output: choices.append(output[2]))
            for module in model.modules()
            if isinstance(module, LLaDA2MoeTopkRouter)
        ]
        with torch.no_grad():
            model(expected["forward.input_ids"], block_length=8)
        for hook in hooks:
            hook.remove()
        for layer, choice in enumerate(choices):
            chosen = choice.view(2, 24, -1).sort(dim=-1).values
            assert torch.equal(chosen, expected[f"forward.router_topk.{layer}"])

    @pytest.mark.parametrize("padding", [3, 8, 13])
    def test_left_padding_changes_nothing(self, model, expected, padding):
        ids = expected["forward.input_ids"]
        padded = torch.cat([torch.full((2, padding), 440), ids], dim=1)
        attention_mask = torch.ones_like(padded)
        attention_mask[:, :padding] = 0
        for implementation in ("sdpa", "eager"):
            model.set_attn_implementation(implementation)
            with torch.no_grad():
                logits = model(padded, attention_mask=attention_mask, block_length=8).logits
            torch.testing.assert_close(logits[:, padding:], expected["forward.logits"], rtol=0, atol=1e-4)
        model.set_attn_implementation("sdpa")

    def test_right_padding_changes_nothing(self, model, expected):
        ids = F.pad(expected["forward.input_ids"], (0, 5), value=440)
        attention_mask = torch.ones_like(ids)
        attention_mask[:, 24:] = 0
        with torch.no_grad():
            logits = model(ids, attention_mask=attention_mask, block_length=8).logits
        torch.testing.assert_close(logits[:, :24], expected["forward.logits"], rtol=0, atol=1e-4)

    def test_block_by_block_with_a_dynamic_cache(self, model, expected):
        past_key_values, parts = None, []
        for block in expected["forward.input_ids"].split(8, dim=1):
            with torch.no_grad():
                outputs = model(block, past_key_values=past_key_values, use_cache=True, block_length=8)
            past_key_values = outputs.past_key_values
            parts.append(outputs.logits)
        torch.testing.assert_close(torch.cat(parts, dim=1), expected["forward.logits"], rtol=0, atol=1e-4)

    def test_router_by_hand(self):
        """Four experts in two groups: the bias decides who is chosen, the unbiased scores how much each counts."""
        config = LLaDA2MoeConfig(
            hidden_size=4, num_experts=4, num_experts_per_tok=2, n_group=2, topk_group=1, num_attention_heads=4
        )
        router = LLaDA2MoeTopkRouter(config)
        router.weight.data = torch.eye(4)
        router.expert_bias = torch.tensor([0.0, 0.0, 0.0, 5.0])
        logits = torch.tensor([[3.0, 2.0, -1.0, -2.0]])
        _, weights, index = router(logits)
        # Groups score 0.953 + 0.881 and 0.269 + 5.119: the second wins although its unbiased scores are small.
        assert index[0].sort().values.tolist() == [2, 3]
        scores = logits.sigmoid()[0]
        expected = scores[index[0]] / (scores[2] + scores[3]) * 2.5
        torch.testing.assert_close(weights[0], expected)


class TestLoading:
    @pytest.mark.parametrize("auto_class", [AutoModelForCausalLM, AutoModelForMaskedLM])
    def test_auto_classes(self, official_tiny, auto_class):
        loaded, info = auto_class.from_pretrained(official_tiny, output_loading_info=True)
        assert type(loaded) is LLaDA2MoeForBlockDiffusion
        assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))

    def test_auto_model_and_config(self, official_tiny):
        assert type(AutoConfig.from_pretrained(official_tiny)) is LLaDA2MoeConfig
        assert type(AutoModel.from_pretrained(official_tiny)) is LLaDA2MoeModel

    @pytest.mark.parametrize(
        "imports",
        [
            "import transformers_llada_uni; from transformers import AutoModelForCausalLM",
            "from transformers import AutoModelForCausalLM; import transformers_llada_uni",
        ],
    )
    def test_no_question_about_remote_code_in_either_order(self, official_tiny, imports):
        code = f"{imports}; print(type(AutoModelForCausalLM.from_pretrained({str(official_tiny)!r})).__name__)"
        run = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, stdin=subprocess.DEVNULL, check=True
        )
        assert run.stdout.strip() == "LLaDA2MoeForBlockDiffusion"
        assert "custom code" not in run.stdout + run.stderr

    def test_saves_the_released_layout(self, official_tiny, model, tmp_path):
        model.save_pretrained(tmp_path)
        saved, released = saved_tensors(tmp_path), saved_tensors(official_tiny)
        assert saved.keys() == released.keys()
        for name, tensor in released.items():
            assert torch.equal(saved[name], tensor), name

    def test_router_bias_stays_in_float32(self, official_tiny):
        loaded = AutoModelForCausalLM.from_pretrained(official_tiny, dtype=torch.bfloat16)
        assert loaded.lm_head.weight.dtype == torch.bfloat16
        assert loaded.model.layers[1].mlp.gate.expert_bias.dtype == torch.float32

    @pytest.mark.parametrize("cast", [lambda model: model.to(torch.bfloat16), lambda model: model.half()])
    def test_a_model_that_is_cast_is_one_that_was_loaded_so(self, official_tiny, cast):
        cast_one = cast(AutoModelForCausalLM.from_pretrained(official_tiny, dtype=torch.float32))
        loaded = AutoModelForCausalLM.from_pretrained(official_tiny, dtype=cast_one.dtype)
        found, wanted = ({**dict(one.named_parameters()), **dict(one.named_buffers())} for one in (cast_one, loaded))
        assert found.keys() == wanted.keys()
        for name, tensor in wanted.items():
            assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name

    def test_rotary_buffer_survives_meta_loading_and_casts(self, official_tiny):
        loaded = AutoModelForCausalLM.from_pretrained(official_tiny, device_map="cpu", dtype=torch.bfloat16)
        inverse = 1.0 / 600000.0 ** (torch.arange(0, 8, 2) / 8)
        torch.testing.assert_close(loaded.model.rotary_emb.inv_freq.float(), inverse)
        assert "model.rotary_emb.inv_freq" not in loaded.state_dict()

    def test_text_only_checkpoint(self, official_tiny, tmp_path):
        config = json.loads((official_tiny / "config.json").read_text())
        for name in ("image_token_offset", "rope_parameters"):
            del config[name]
        config["rope_scaling"] = None
        (tmp_path / "config.json").write_text(json.dumps(config))
        for path in official_tiny.glob("model*"):
            shutil.copy(path, tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert loaded.config.image_token_offset is None
        assert loaded.config.rope_parameters["partial_rotary_factor"] == 0.5
        assert loaded.config.rope_parameters["rope_theta"] == 600000.0
        with pytest.raises(ValueError, match="no image codes"):
            loaded.generate_image_codes(torch.tensor([[1]]), (2, 2), mask_token_id=441)

    def test_missing_shard_is_named(self, official_tiny, tmp_path):
        for path in [*official_tiny.glob("model*"), official_tiny / "config.json"]:
            shutil.copy(path, tmp_path)
        os.remove(tmp_path / "model-00002-of-00002.safetensors")
        with pytest.raises(OSError, match="model-00002-of-00002"):
            AutoModelForCausalLM.from_pretrained(tmp_path)

    def test_initialisation_is_trainable(self):
        torch.manual_seed(0)
        model = TestCommon().model().train()
        ids = torch.randint(0, 96, (4, 16))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        masked = ids.clone()
        masked[:, ::4] = 95
        labels = torch.where(masked == ids, -100, ids)
        losses = []
        for _ in range(30):
            loss = model(masked, labels=labels, block_length=8).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[-1] < 0.2 * losses[0]

    def test_loss_is_the_cross_entropy_of_labelled_positions(self, model, expected):
        ids = expected["forward.input_ids"]
        labels = torch.full_like(ids, -100)
        labels[:, 3:7] = 5
        with torch.no_grad():
            loss = model(ids, labels=labels, block_length=8).loss
        by_hand = -expected["forward.logits"].log_softmax(dim=-1)[:, 3:7, 5].mean()
        torch.testing.assert_close(loss, by_hand, rtol=1e-4, atol=1e-4)

    def test_every_parallel_plan_names_real_modules(self, model):
        config = model.config
        names = dict(model.model.named_modules()) | dict(model.model.named_parameters())
        patterns = [*config.base_model_tp_plan, *config.base_model_ep_plan, *config.base_model_fsdp_plan]
        for pattern in patterns:
            assert any(
                len(parts := pattern.split(".")) == len(name.split("."))
                and all(a in ("*", b) for a, b in zip(parts, name.split("."), strict=True))
                for name in names
            ), pattern


@pytest.mark.parametrize("implementation", ["sdpa", "eager", "flex_attention"])
@pytest.mark.parametrize("padding", [0, 3])
@torch.no_grad()
def test_positions_to_keep_changes_only_what_is_computed(official_tiny, implementation, padding):
    """What is kept, whatever its order, is that of the whole forward, and the cache takes in all positions."""
    model = LLaDA2MoeModel.from_pretrained(official_tiny, attn_implementation=implementation)
    ids = torch.randint(0, 400, (2, 24), generator=torch.Generator().manual_seed(0))
    attention_mask = torch.ones_like(ids)
    attention_mask[1, :padding] = 0
    arguments = {"input_ids": ids, "attention_mask": attention_mask, "block_length": 8}
    whole = model(**arguments, past_key_values=DynamicCache())
    positions = torch.tensor([[4, 23, 9], [8, 7, 21]])
    last_mlp_lengths = []
    hook = model.layers[-1].mlp.register_forward_hook(lambda *call: last_mlp_lengths.append(call[-1].shape[1]))
    some = model(**arguments, past_key_values=DynamicCache(), positions_to_keep=positions)
    hook.remove()
    expected = torch.stack([whole.last_hidden_state[row, positions[row]] for row in range(2)])
    torch.testing.assert_close(some.last_hidden_state, expected, rtol=1e-4, atol=1e-4)
    for layer, expected_layer in zip(some.past_key_values.layers, whole.past_key_values.layers, strict=True):
        assert torch.equal(layer.keys, expected_layer.keys) and torch.equal(layer.values, expected_layer.values)
    # flex attention's masks cannot be narrowed
    assert last_mlp_lengths == [24 if implementation == "flex_attention" else 3]


@torch.no_grad()
def test_positions_to_keep_with_one_mask_for_all_rows():
    model = tiny_backbone().model
    ids = torch.randint(0, 60, (2, 16), generator=torch.Generator().manual_seed(0))
    visible = torch.rand(1, 1, 16, 16, generator=torch.Generator().manual_seed(1)) < 0.7
    visible |= torch.eye(16, dtype=torch.bool)
    whole = model(input_ids=ids, attention_mask=visible).last_hidden_state
    positions = torch.tensor([[3, 15], [0, 6]])
    some = model(input_ids=ids, attention_mask=visible, positions_to_keep=positions).last_hidden_state
    expected = torch.stack([whole[row, positions[row]] for row in range(2)])
    torch.testing.assert_close(some, expected, rtol=1e-9, atol=1e-9)


PACKED = torch.cat([torch.arange(10), torch.arange(14)])[None]


@pytest.mark.parametrize(
    "implementation, given", [("sdpa", "attention_mask"), ("sdpa", "position_ids"), ("eager", "attention_mask")]
)
def test_forward_is_one_graph(implementation, given):
    model = TestCommon().model()
    model.set_attn_implementation(implementation)
    attention_mask = torch.ones(2, 24, dtype=torch.long)
    attention_mask[0, :3] = 0
    inputs = {"attention_mask": attention_mask, "position_ids": PACKED}
    assert_is_one_graph(model, **TestCommon().inputs(), **{given: inputs[given]})


@pytest.mark.parametrize(
    "implementation, block_length", [("sdpa", 8), ("sdpa", 32), ("eager", 8), ("flex_attention", 8)]
)
@torch.no_grad()
def test_packed_documents_do_not_see_each_other(implementation, block_length):
    """Positions that start again are another document, as everywhere in transformers."""
    model = TestCommon().model()
    ids = TestCommon().inputs()["input_ids"]
    alone = [model(document, block_length=block_length).logits for document in ids.split([10, 14], dim=1)]
    model.set_attn_implementation(implementation)
    packed = model(ids, position_ids=PACKED, block_length=block_length).logits
    torch.testing.assert_close(packed, torch.cat(alone, dim=1), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_packed_rows_with_documents_of_their_own_and_a_whole_row():
    model = TestCommon().model()
    ids = TestCommon().inputs()["input_ids"]
    position_ids = torch.cat([PACKED, torch.arange(24)[None]])
    packed = model(ids, position_ids=position_ids, block_length=8, use_cache=True).logits
    torch.testing.assert_close(packed[1], model(ids, block_length=8).logits[1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(packed[0, 10:], model(ids[:1, 10:], block_length=8).logits[0], rtol=1e-4, atol=1e-5)


class TestResizing:
    def test_a_text_only_checkpoint_saves_and_loads(self, tmp_path):
        model = TestCommon().model()
        model.resize_token_embeddings(100, mean_resizing=False)
        model.save_pretrained(tmp_path)
        loaded = LLaDA2MoeForBlockDiffusion.from_pretrained(tmp_path).eval()
        ids = torch.tensor([[99, 3, 98]])
        with torch.no_grad():
            assert loaded(ids).logits.shape == (1, 3, 100)
            torch.testing.assert_close(loaded(ids).logits, model(ids).logits)

    @pytest.mark.parametrize("arguments", [{"new_num_tokens": 770}, {"pad_to_multiple_of": 500}])
    def test_image_codes_are_the_last_ids(self, model, arguments):
        with pytest.raises(ValueError, match="`new_num_tokens`.*vocabulary of 768.*image codes, from 512"):
            model.resize_token_embeddings(**arguments)
        assert model.config.vocab_size == len(model.get_input_embeddings().weight) == 768
        assert model.resize_token_embeddings(768, pad_to_multiple_of=64) is model.model.word_embeddings


def test_flash_attention_refuses_what_it_cannot_mask():
    config = LLaDA2MoeConfig()
    config._attn_implementation_internal = "flash_attention_2"
    embeds = torch.zeros(1, 48, 4)
    with pytest.raises(ValueError, match="one block of `block_length=32`"):
        create_block_causal_mask(config, embeds, None, None, 32)
    assert create_block_causal_mask(config, embeds[:, :32], None, None, 32) is None
    with pytest.raises(ValueError, match="documents that `position_ids` packs"):
        create_block_causal_mask(config, embeds[:, :24], None, None, 32, position_ids=PACKED)
    assert (
        create_block_causal_mask(config, embeds[:, :24], None, None, 32, position_ids=torch.arange(24)[None]) is None
    )


def test_attention_without_a_mask_function_is_refused():
    config = LLaDA2MoeConfig()
    config._attn_implementation_internal = "of_another_engine"
    with pytest.raises(ValueError, match="'of_another_engine'.*mask function"):
        create_block_causal_mask(config, torch.zeros(1, 48, 4), None, None, 32)
