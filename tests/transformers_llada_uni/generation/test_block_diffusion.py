import copy
import json

import pytest
import torch
from transformers import GenerationConfig, TextStreamer

from tests.transformers_llada_uni.generation.property_cases import random_case, tiny_backbone
from tests.transformers_llada_uni.generation.recorded_steps import recorded_on_cpu
from transformers_llada_uni import BlockDiffusionGenerationConfig, LLaDA2MoeForBlockDiffusion
from transformers_llada_uni.generation import guided_head
from transformers_llada_uni.generation.guided_head import GuidedHead
from transformers_llada_uni.generation.sampling import (
    commit_schedule,
    guided_logits,
    predict_tokens,
    select_positions,
)


@pytest.fixture(scope="module")
def released(official_tiny):
    return LLaDA2MoeForBlockDiffusion.from_pretrained(official_tiny)


@pytest.fixture(scope="module")
def expected(official_tiny):
    return json.loads((official_tiny / "expected" / "generation.json").read_text())


@pytest.fixture(scope="module")
def backbone():
    return tiny_backbone()


def text_arguments(case) -> dict:
    return {
        "max_new_tokens": case["gen_length"],
        "block_length": case["block_length"],
        "num_steps_per_block": case["steps"],
        "threshold": case["threshold"],
        "mask_token_id": 441,
        "eos_token_id": 440,
    }


def image_arguments(case) -> dict:
    arguments = {
        "input_ids": case["cond_ids"],
        "negative_input_ids": case.get("uncond_ids", case.get("no_text_ids")),
        "negative_image_input_ids": case.get("no_image_ids"),
    }
    return {name: torch.tensor([ids]) for name, ids in arguments.items() if ids is not None} | {
        "grid": (case["h"], case["w"]),
        "guidance_scale": case.get("cfg_scale", case.get("cfg_text_scale")),
        "image_guidance_scale": case.get("cfg_image_scale", 0.0),
        "guidance_rescale": case["cfg_rescale"],
        "block_length": case["block_length"],
        "num_steps_per_block": case["steps"],
        "threshold": case["threshold"],
        "mask_token_id": 441,
    }


class TestAgreesWithTheRelease:
    @pytest.mark.parametrize("use_cache", [True, False])
    @pytest.mark.parametrize("index", range(4))
    def test_text(self, released, expected, index, use_cache):
        case = expected["text_generate"][index]
        prompt = torch.tensor([case["prompt_ids"]])
        sequence = released.generate(prompt, use_cache=use_cache, **text_arguments(case))
        assert sequence[0, : prompt.shape[1]].tolist() == case["prompt_ids"]
        assert sequence[0, prompt.shape[1] :].tolist() == case["output_ids"]

    @pytest.mark.parametrize("use_cache", [True, False])
    @pytest.mark.parametrize(
        "task, index", [("text_to_image", i) for i in range(3)] + [("image_edit", 0), ("image_edit", 1)]
    )
    def test_image_codes(self, released, expected, task, index, use_cache):
        case = expected[task][index]
        codes = released.generate_image_codes(use_cache=use_cache, **image_arguments(case))
        assert codes[0].tolist() == case["token_ids"]

    @pytest.mark.parametrize("use_cache", [True, False])
    def test_text_in_a_batch_of_unequal_prompts(self, released, expected, use_cache):
        cases = expected["text_generate"]
        longest = max(len(case["prompt_ids"]) for case in cases)
        ids = torch.full((len(cases), longest), 440)
        attention_mask = torch.zeros_like(ids)
        for row, case in enumerate(cases):
            ids[row, longest - len(case["prompt_ids"]) :] = torch.tensor(case["prompt_ids"])
            attention_mask[row, longest - len(case["prompt_ids"]) :] = 1
        for case in cases:  # the settings of each case for all rows, compared where they are the row's own
            sequences = released.generate(ids, attention_mask, use_cache=use_cache, **text_arguments(case))
            row = cases.index(case)
            assert sequences[row, longest:].tolist() == case["output_ids"]

    def test_guided_images_in_a_batch(self, released, expected):
        """The first prompt twice and, between, a shorter one: the first must not notice."""
        case = image_arguments(expected["text_to_image"][0])
        length = case["input_ids"].shape[1]
        shorter = torch.cat([torch.full((1, 3), 440), case["input_ids"][:, : length - 3]], dim=1)
        case["attention_mask"] = torch.ones(3, length, dtype=torch.long)
        case["attention_mask"][1, :3] = 0
        case["input_ids"] = torch.cat([case["input_ids"], shorter, case["input_ids"]])
        case["negative_input_ids"] = case["negative_input_ids"].repeat(3, 1)
        codes = released.generate_image_codes(**case)
        assert codes[0].tolist() == codes[2].tolist() == expected["text_to_image"][0]["token_ids"]


class TestCacheIsExact:
    """`benchmarks/cache_exactness.py` runs more of the same cases."""

    @pytest.mark.parametrize("seed", range(40))
    def test_same_ids_with_and_without_and_row_by_row(self, backbone, seed):
        method, arguments = random_case(seed)
        generate = getattr(backbone, method)
        cached = generate(**arguments)
        assert torch.equal(cached, generate(**arguments, use_cache=False))
        with recorded_on_cpu():
            assert torch.equal(cached, generate(**arguments, use_cuda_graphs=False))  # static, but not recorded
        for row in range(cached.shape[0]):
            alone = {
                name: value[row : row + 1] if torch.is_tensor(value) else value for name, value in arguments.items()
            }
            single = generate(**alone)
            assert torch.equal(single[0], cached[row, : single.shape[1]])

    @pytest.mark.parametrize("implementation", ["eager"])
    def test_attention_implementations(self, backbone, implementation):
        model = copy.deepcopy(backbone)
        model.set_attn_implementation(implementation)
        for seed in range(6):
            method, arguments = random_case(seed)
            assert torch.equal(getattr(model, method)(**arguments), getattr(backbone, method)(**arguments))

    @pytest.mark.parametrize("use_cache", [True, False])
    def test_last_layer_computes_only_masked_columns(self, backbone, use_cache):
        """Two rows of unequal prompts: the tail of the shorter leaves it more masks in the first block."""
        lengths = []
        hook = backbone.model.layers[-1].register_forward_hook(
            lambda module, args, output: lengths.append(output.shape[1])
        )
        ids = torch.randint(0, 60, (2, 13), generator=torch.Generator().manual_seed(0))
        attention_mask = torch.ones_like(ids)
        attention_mask[1, :2] = 0
        backbone.generate(
            ids,
            attention_mask=attention_mask,
            max_new_tokens=13,
            block_length=8,
            num_steps_per_block=4,
            threshold=1.0,
            eos_token_id=None,
            use_cache=use_cache,
        )
        hook.remove()
        if use_cache:
            # The shorter row starts with 5 masks, the longer with 3; each step fills in two. The last block's rows
            # have room past their ends, which is masked too.
            assert lengths == [5, 3, 1, 8, 6, 4, 2, 8, 6, 4, 2]
        else:
            # The plain loop stays what it is, so that it can tell whether the narrow one is right.
            assert lengths == [16] * 3 + [24] * 4 + [32] * 4

    def test_forwards_only_the_current_block(self, backbone):
        """No step but a block's first forwards more than one block, and committing takes no pass of its own."""
        lengths = []
        hook = backbone.model.layers[0].register_forward_hook(
            lambda module, args, output: lengths.append(output.shape[1])
        )
        ids = torch.randint(0, 60, (1, 20), generator=torch.Generator().manual_seed(0))
        output = backbone.generate(
            ids,
            max_new_tokens=28,
            block_length=8,
            num_steps_per_block=4,
            threshold=1.0,
            eos_token_id=None,
            return_dict_in_generate=True,
        )
        hook.remove()
        # 20 = 2 blocks and a half: two steps fill the other half, then four steps for each of three blocks.
        assert lengths == [24, 8, 16, 8, 8, 8, 16, 8, 8, 8, 16, 8, 8, 8]
        assert output.num_forward_passes == len(lengths)
        assert output.tokens_per_forward == 28 / 14


class TestRules:
    def test_schedule(self):
        assert commit_schedule(8, 3) == [3, 3, 2]
        assert commit_schedule(4, 6) == [1, 1, 1, 1, 0, 0]
        # 32 cos(pi / 2 * 1 / 8) = 31.4 are left after the first of 8 steps, 29.6 after the second.
        assert commit_schedule(32, 8, "cosine") == [1, 2, 3, 4, 5, 5, 6, 6]
        assert commit_schedule(8, 8, "cosine") == [1] * 8
        assert commit_schedule(16, 1, "cosine") == [16]

    def test_steps_follow_the_schedule(self, backbone):
        prompt, arguments = torch.arange(16)[None], {"block_length": 16, "num_steps_per_block": 4, "threshold": 1.0}
        arguments |= {"return_dict_in_generate": True, "output_trajectory": True}
        for masking_schedule, counts in (("linear", [4, 4, 4, 4]), ("cosine", [2, 3, 5, 6])):
            output = backbone.generate_image_codes(prompt, (4, 8), masking_schedule=masking_schedule, **arguments)
            steps = output.trajectory.steps[0, 16:].view(2, 16)
            assert [row.bincount().tolist() for row in steps] == [counts, counts]
        with pytest.raises(ValueError, match="`masking_schedule`"):
            backbone.generate_image_codes(prompt, (4, 8), masking_schedule="sine", **arguments)
        with pytest.raises(ValueError, match="takes no `masking_schedule`"):
            backbone.generate(prompt, masking_schedule="cosine", cache_implementation="sprint")

    def test_text_commits_the_sure_ones_or_else_the_best(self):
        masked = torch.tensor([[True, True, True, False], [True, True, True, False]])
        probabilities = torch.tensor([[0.9, 0.8, 0.1, 1.0], [0.4, 0.9, 0.5, 1.0]])
        chosen = select_positions(masked, probabilities, probabilities, 2, 0.7, at_least_count=False)
        assert chosen.tolist() == [[True, True, False, False], [False, True, True, False]]
        chosen = select_positions(masked, probabilities, probabilities, 1, 0.7, at_least_count=False)
        assert chosen.tolist() == [[True, True, False, False], [False, True, False, False]]

    def test_image_codes_commit_both(self):
        masked = torch.ones(1, 4, dtype=torch.bool)
        probabilities = torch.tensor([[0.9, 0.95, 0.99, 0.1]])
        chosen = select_positions(masked, probabilities, probabilities, 1, 0.92, at_least_count=True)
        assert chosen.tolist() == [[False, True, True, False]]

    def test_guidance_by_hand(self):
        c, u, n = torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[0.0, 1.0, 1.0]]), torch.tensor([[2.0, 0.0, 1.0]])
        plain = u + 3.0 * (c - u) + 1.5 * (u - n)
        assert torch.equal(guided_logits(torch.stack([c, u, n]), 3.0, 1.5, 0.0), plain)
        rescaled = 0.7 * plain * c.std() / (plain.std() + 1e-6) + 0.3 * plain
        torch.testing.assert_close(guided_logits(torch.stack([c, u, n]), 3.0, 1.5, 0.7), rescaled)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    @pytest.mark.parametrize("guidance", [(2.0, 0.0, 0.7), (3.0, 1.5, 1.0), (1.7, 0.4, 0.0)])
    @pytest.mark.parametrize("num_branches", [1, 2, 3])
    def test_head_after_guidance_equals_guidance_after_head(self, num_branches, guidance, dtype):
        generator = torch.Generator().manual_seed(0)
        head = torch.nn.Linear(16, 50, bias=False, dtype=dtype)
        head.weight.data = torch.randn(50, 16, generator=generator, dtype=dtype) + 0.3
        hidden_states = torch.randn(num_branches, 7, 16, generator=generator, dtype=dtype)
        with torch.no_grad():
            expected = guided_logits(head(hidden_states), *guidance)[:, 20:45]
            expected[:, 2] = float("-inf")
            found = GuidedHead(head, (20, 45), [3, 22], guidance, num_branches)(hidden_states)
            biased = torch.nn.Linear(16, 50, dtype=dtype)
            biased.weight = head.weight
            wanted = guided_logits(biased(hidden_states), *guidance)[:, 20:45]
            wanted[:, 2] = float("-inf")
            with_bias = GuidedHead(biased, (20, 45), [3, 22], guidance, num_branches)(hidden_states)
            head.register_forward_hook(lambda module, args, output: output)  # now it is more than a matrix
            called = GuidedHead(head, (20, 45), [3, 22], guidance, num_branches)(hidden_states)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(called, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(with_bias, wanted, rtol=1e-5, atol=1e-5)

    def test_the_spread_matrix_is_made_once_for_a_weight(self, monkeypatch):
        head, made = torch.nn.Linear(16, 50, bias=False), []
        make = guided_head._spread_matrix
        monkeypatch.setattr(guided_head, "ROWS_AT_ONCE", 20)  # the last part is a shorter one
        monkeypatch.setattr(guided_head, "_spread_matrix", lambda weight: made.append(weight) or make(weight))

        def matrix() -> torch.Tensor:
            return GuidedHead(head, None, [], (2.0, 0.0, 0.7), num_branches=2).spread_matrix

        first = matrix()
        assert matrix() is first and len(made) == 1
        torch.testing.assert_close(first, torch.cov(head.weight.detach().T))
        changes = (
            lambda weight: weight[[0, 1]].copy_(weight[[1, 0]]),  # a copy: nothing is changed
            lambda weight: weight[7, 3].neg_(),
            lambda weight: weight.copy_(weight.roll(1, dims=0)),
            lambda weight: weight.copy_(weight.roll(1, dims=1)),
        )
        for count, change in enumerate(changes, start=1):
            change(head.weight.data)  # in its place, past torch's count of versions
            torch.testing.assert_close(matrix(), torch.cov(head.weight.detach().T))
            assert len(made) == count

    def test_confidences_by_hand(self):
        logits = torch.tensor([[0.0, 1.0, 3.0]])
        p = logits.softmax(dim=-1)[0]
        token, probability, ranking = predict_tokens(logits)
        assert token.item() == 2
        torch.testing.assert_close(probability[0], p[2])
        torch.testing.assert_close(ranking[0], p[2])
        torch.testing.assert_close(predict_tokens(logits, confidence="top_k_margin")[2][0], p[2] - p[1])
        entropy = -(p * p.log()).sum()
        torch.testing.assert_close(predict_tokens(logits, confidence="neg_entropy")[2][0], -entropy)

    def test_rows_end_apart(self, backbone):
        ids = torch.randint(0, 60, (2, 16), generator=torch.Generator().manual_seed(3))
        settings = {"max_new_tokens": 48, "block_length": 8, "num_steps_per_block": 2}
        free = backbone.generate(ids, eos_token_id=None, **settings)
        end = int(free[0, 16 + 3])  # what row 0 says fourth ends a row now
        sequences = backbone.generate(ids, eos_token_id=[end, 95], **settings)
        for row in range(2):
            new = free[row, 16:].tolist()
            stops = [index for index, token in enumerate(new) if token in (end, 95)]
            length = stops[0] + 1 if stops else len(new)
            assert sequences[row, 16 : 16 + length].tolist() == new[:length]
            assert set(sequences[row, 16 + length :].tolist()) <= {62}

    def test_fills_gaps_in_the_prompt_and_keeps_the_rest(self, backbone):
        ids = torch.randint(0, 60, (2, 30), generator=torch.Generator().manual_seed(1))
        gaps = torch.zeros_like(ids, dtype=torch.bool)
        gaps[0, [2, 11, 12]] = True
        gaps[1, 25] = True
        filled = backbone.generate(ids.masked_fill(gaps, 63), max_new_tokens=0, block_length=8)
        assert filled.shape == ids.shape
        assert torch.equal(filled[~gaps], ids[~gaps])
        assert bool((filled != 63).all())

    def test_never_predicts_a_mask(self, backbone):
        model = copy.deepcopy(backbone)
        model.lm_head.weight.data[63] = 100 * model.lm_head.weight.data.abs().mean()
        ids = torch.randint(0, 60, (1, 9), generator=torch.Generator().manual_seed(1))
        assert bool((model.generate(ids, max_new_tokens=40, block_length=8)[0, 9:] != 63).all())

    def test_infilling_of_codes_keeps_the_known(self, backbone):
        ids = torch.randint(0, 60, (2, 9), generator=torch.Generator().manual_seed(1))
        codes = torch.randint(0, 32, (2, 24), generator=torch.Generator().manual_seed(2))
        mask = torch.rand(2, 24, generator=torch.Generator().manual_seed(3)) < 0.4
        new = backbone.generate_image_codes(ids, (4, 6), image_codes=codes, image_codes_mask=mask, block_length=8)
        assert torch.equal(new[~mask], codes[~mask])
        assert not torch.equal(new, codes)
        assert int(new.min()) >= 0 and int(new.max()) < 32
        untouched = backbone.generate_image_codes(ids, (4, 6), image_codes=codes, image_codes_mask=mask & False)
        assert torch.equal(untouched, codes)


class TestSampling:
    def test_a_generator_repeats_itself(self, backbone):
        ids = torch.randint(0, 60, (1, 9), generator=torch.Generator().manual_seed(1))

        def sample(seed):
            return backbone.generate(
                ids,
                max_new_tokens=24,
                block_length=8,
                do_sample=True,
                temperature=2.0,
                generator=torch.Generator().manual_seed(seed),
            )

        assert torch.equal(sample(0), sample(0))
        assert not torch.equal(sample(0), sample(1))

    def test_one_generator_per_row_makes_rows_independent(self, backbone):
        ids = torch.randint(0, 60, (1, 9), generator=torch.Generator().manual_seed(1))
        settings = {"grid": (4, 4), "block_length": 8, "do_sample": True}
        together = backbone.generate_image_codes(
            ids.repeat(2, 1), generator=[torch.Generator().manual_seed(seed) for seed in (5, 6)], **settings
        )
        for row, seed in enumerate((5, 6)):
            alone = backbone.generate_image_codes(ids, generator=[torch.Generator().manual_seed(seed)], **settings)
            assert torch.equal(alone[0], together[row])
        assert not torch.equal(together[0], together[1])

    def test_top_k_one_is_greedy(self, backbone):
        ids = torch.randint(0, 60, (1, 9), generator=torch.Generator().manual_seed(1))
        greedy = backbone.generate_image_codes(ids, (4, 4), block_length=8, threshold=1.0, num_steps_per_block=1)
        sampled = backbone.generate_image_codes(
            ids, (4, 4), block_length=8, threshold=1.0, num_steps_per_block=1, do_sample=True, top_k=1
        )
        assert torch.equal(greedy, sampled)


class TestStreaming:
    def test_gets_finished_tokens_block_by_block(self, backbone):
        class Recorder:
            def __init__(self):
                self.puts, self.ended = [], False

            def put(self, value):
                self.puts.append(value)

            def end(self):
                self.ended = True

        ids = torch.randint(0, 60, (1, 13), generator=torch.Generator().manual_seed(1))
        recorder = Recorder()
        sequence = backbone.generate(ids, max_new_tokens=20, block_length=8, eos_token_id=None, streamer=recorder)
        assert torch.equal(recorder.puts[0], ids)
        assert [len(tokens) for tokens in recorder.puts[1:]] == [3, 8, 8, 1]
        assert torch.equal(torch.cat(recorder.puts[1:]), sequence[0, 13:])
        assert recorder.ended

    def test_text_streamer_of_transformers(self, released, official_tiny, capsys):
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(official_tiny)
        ids = tokenizer("a dog", return_tensors="pt").input_ids
        streamer = TextStreamer(tokenizer, skip_prompt=True)
        sequence = released.generate(
            ids, max_new_tokens=12, block_length=4, mask_token_id=441, eos_token_id=440, streamer=streamer
        )
        assert capsys.readouterr().out.strip() == tokenizer.decode(sequence[0, ids.shape[1] :]).strip()


class TestGenerationConfig:
    def test_is_saved_and_loaded_with_the_model(self, released, tmp_path):
        model = copy.deepcopy(released)
        model.generation_config = BlockDiffusionGenerationConfig(
            threshold=0.5, num_steps_per_block=7, eos_token_id=[440, 444], mask_token_id=441, max_new_tokens=3
        )
        model.save_pretrained(tmp_path)
        loaded = LLaDA2MoeForBlockDiffusion.from_pretrained(tmp_path)
        assert isinstance(loaded.generation_config, BlockDiffusionGenerationConfig)
        for name in BlockDiffusionGenerationConfig.defaults():
            assert getattr(loaded.generation_config, name) == getattr(model.generation_config, name), name
        assert loaded.generate(torch.tensor([[1, 2]])).shape == (1, 5)

    def test_a_file_for_autoregressive_generation_gives_its_special_tokens(self, released, tmp_path):
        released.save_pretrained(tmp_path)
        foreign = {"eos_token_id": 444, "num_beams": 4, "transformers_version": "4.51.0"}
        (tmp_path / "generation_config.json").write_text(json.dumps(foreign))
        loaded = LLaDA2MoeForBlockDiffusion.from_pretrained(tmp_path)
        assert loaded.generation_config.eos_token_id == 444
        assert loaded.generation_config.num_steps_per_block == 32

    def test_a_call_does_not_change_the_model(self, backbone):
        before = backbone.generation_config.to_dict()
        backbone.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4, threshold=0.1, block_length=2)
        assert backbone.generation_config.to_dict() == before

    def test_max_length(self, backbone):
        assert backbone.generate(torch.tensor([[1, 2, 3]]), max_length=9, eos_token_id=None).shape == (1, 9)

    @pytest.mark.parametrize(
        "config, given, length",
        [
            (None, {"max_new_tokens": 4, "max_length": 30}, 7),
            ({"max_length": 30}, {"max_new_tokens": 4}, 7),
            ({"max_new_tokens": 20}, {"max_length": 9}, 9),
            ({"max_new_tokens": 4, "max_length": 30}, {}, 7),
        ],
    )
    def test_of_two_lengths_that_of_new_tokens_counts_or_the_later(self, backbone, config, given, length):
        config = None if config is None else GenerationConfig(**config)
        ids = torch.tensor([[1, 2, 3]])
        assert backbone.generate(ids, generation_config=config, eos_token_id=None, **given).shape == (1, length)

    def test_without_a_mask_rows_begin_where_their_padding_ends(self, backbone):
        pad = backbone.config.pad_token_id
        ids = torch.tensor([[pad, pad, 1, 2, 3], [4, 5, 6, 7, 8]])
        settings = {"max_new_tokens": 8, "block_length": 4, "eos_token_id": None}
        masked = backbone.generate(ids, attention_mask=(ids != pad).long(), **settings)
        assert torch.equal(backbone.generate(ids, **settings), masked)
        # A single row is what it is.
        alone = backbone.generate(ids[:1], **settings)
        assert torch.equal(alone, backbone.generate(ids[:1], attention_mask=torch.ones(1, 5), **settings))


def test_generates_while_training_with_checkpointing(backbone):
    """Rollouts of reinforcement learning: gradient checkpointing drops caches, so none is used."""
    model = copy.deepcopy(backbone)
    ids = torch.tensor([[1, 2, 3, 4, 5]])
    expected = model.generate(ids, max_new_tokens=12, block_length=4)
    model.activation_checkpointing_enable()
    model.train()
    assert torch.equal(model.generate(ids, max_new_tokens=12, block_length=4), expected)
