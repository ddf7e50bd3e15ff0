"""The model of lm_eval on a small model that knows four texts by heart."""

import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoTokenizer

from diffusers_llada_uni import embedded_checkpoint
from transformers_llada_uni import (
    LLaDA2MoeConfig,
    LLaDA2MoeForBlockDiffusion,
    LLaDAUniForConditionalGeneration,
    LLaDAUniProcessor,
)
from transformers_llada_uni.evaluation import completion_likelihood
from transformers_llada_uni.training.objective.block_diffusion import add_block_diffusion_head
from transformers_llada_uni.training.objective.noise import BlockDiffusionNoise


TEXTS = [
    ("Sky: is", " blue"),
    ("Grass: is", " green"),
    ("Q: one\nA:", " two\n\nQ: a"),
    ("Q: two\nA:", " three\n\nQ: b"),
]


@pytest.fixture(scope="module")
def tokenizer(official_tiny):
    return AutoTokenizer.from_pretrained(official_tiny)


@pytest.fixture(scope="module")
def fitted(tokenizer):
    """A small model that has learnt `TEXTS` by heart."""
    torch.manual_seed(0)
    config = LLaDA2MoeConfig(
        vocab_size=768,
        image_token_offset=512,
        hidden_size=48,
        intermediate_size=64,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        num_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        block_length=8,
        max_position_embeddings=512,
        mask_token_id=tokenizer.mask_token_id,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LLaDA2MoeForBlockDiffusion(config)
    add_block_diffusion_head(model)
    length = 24
    input_ids = torch.full((len(TEXTS), length), tokenizer.eos_token_id)
    labels, document_ids = torch.full_like(input_ids, -100), torch.full_like(input_ids, -1)
    for row, (context, continuation) in enumerate(TEXTS):
        start, ids = len(tokenizer.encode(context)), tokenizer.encode(context + continuation)
        end = (len(ids) // 8 + 1) * 8
        input_ids[row, : len(ids)] = torch.tensor(ids)
        labels[row, start:end] = input_ids[row, start:end]
        document_ids[row, :end] = 0
    noise = BlockDiffusionNoise(num_noise_samples=2, weighting="none", complementary=True)
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(260):
        masked, weights = noise.sample(labels, document_ids, 8, generator)
        outputs = model(
            input_ids, labels=labels, document_ids=document_ids, masked=masked, weights=weights, fused_lm_head=True
        )
        loss = -outputs.log_probs.sum() / len(TEXTS)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    del model.forward
    return model.eval()


class TestLMEval:
    @pytest.fixture(scope="class")
    def harness(self):
        pytest.importorskip("lm_eval")
        from transformers_llada_uni.evaluation.lm_eval_model import LLaDAUniLM

        return LLaDAUniLM

    @pytest.fixture(scope="class")
    def lm(self, harness, fitted, tokenizer):
        return harness(fitted, tokenizer=tokenizer, batch_size=3)

    @staticmethod
    def requests(kind, *arguments):
        from lm_eval.api.instance import Instance

        return [Instance(kind, {}, one, index) for index, one in enumerate(arguments)]

    def test_command(self, converted_dir, tmp_path):
        """The documented way, as a stranger types it, with a task of the user's own."""
        rows = [{"question": "Sky: is", "choices": [" blue", " green"], "gold": 0}]
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        task = {
            "task": "colours",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "{{question}}",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "{{gold}}",
        }
        (tmp_path / "colours.yaml").write_text(json.dumps(task))  # JSON is YAML
        command = (
            f"-m transformers_llada_uni.evaluation run --model llada-uni --tasks colours --include_path {tmp_path}"
        )
        command += f" --model_args pretrained={converted_dir},num_samples=2 --device cpu --output_path {tmp_path}"
        done = subprocess.run([sys.executable, *command.split()], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        (results,) = tmp_path.rglob("results*.json")
        results = json.loads(results.read_text())
        assert results["n-samples"]["colours"]["effective"] == 1 and "acc,none" in results["results"]["colours"]
        assert results["config"]["model"] == "llada-uni"

    def test_is_registered_with_lm_eval(self, harness, converted_dir):
        from lm_eval.api.registry import get_model

        assert get_model("llada-uni") is harness and issubclass(harness, get_model("hf"))
        lm = harness.create_from_arg_string(f"pretrained={converted_dir},num_samples=2,device=cpu")
        assert isinstance(lm.model, LLaDAUniForConditionalGeneration) and lm.num_samples == 2

    def test_an_adapter_is_merged(self, harness):
        """Of the shipped model, whose tokenizer has no image codes."""
        folder = embedded_checkpoint("emoji")
        own, adapted = (
            harness(str(folder), device="cpu", dtype="float32", **settings).model.state_dict()
            for settings in ({}, {"peft": str(folder / "adapter")})
        )
        assert own.keys() == adapted.keys() and own["lm_head.weight"].shape == adapted["lm_head.weight"].shape
        assert sum(not torch.equal(own[name], adapted[name]) for name in own) > 4

    def test_likelihood_is_the_bound(self, lm, fitted, tokenizer):
        pairs = [*TEXTS, ("", "Sky: is"), ("Sky: is", " red and green and yellow")]
        answers = lm.loglikelihood(self.requests("loglikelihood", *pairs), disable_tqdm=True)
        prompts = [tokenizer.encode(context) or [lm.prefix_token_id] for context, _ in pairs]
        completions = [
            tokenizer.encode(context + continuation)[len(tokenizer.encode(context)) :]
            for context, continuation in pairs
        ]
        expected = completion_likelihood(fitted, prompts, completions, batch_size=1).log_likelihoods.tolist()
        assert [answer for answer, _ in answers] == pytest.approx(expected, rel=1e-4)
        assert [is_greedy for _, is_greedy in answers] == [True] * len(TEXTS) + [False, False]

    def test_answers_are_kept_as_they_come(self, harness, fitted, tokenizer, monkeypatch, tmp_path):
        """What is computed before a run is stopped is not computed again."""
        from lm_eval.api.model import CachingLM

        monkeypatch.setattr("transformers_llada_uni.evaluation.lm_eval_model.PART_IN_BATCHES", 1)
        pairs = [(f"{name}: is", f" {colour}") for name in ("Sky", "Grass", "Snow") for colour in ("red", "blue")]
        lm = harness(fitted, tokenizer=tokenizer, batch_size=2, num_samples=2)
        expected = lm.loglikelihood(self.requests("loglikelihood", *pairs), disable_tqdm=True)
        computed, likelihoods = [], lm._likelihoods

        def stopped(pairs, batch_size):
            if len(computed) == 2:
                raise KeyboardInterrupt
            computed.append(pairs)
            return likelihoods(pairs, batch_size)

        monkeypatch.setattr(lm, "_likelihoods", stopped)
        with pytest.raises(KeyboardInterrupt):
            CachingLM(lm, str(tmp_path / "answers.db")).loglikelihood(self.requests("loglikelihood", *pairs))
        assert [len({tuple(context) for context, _ in part}) for part in computed] == [1, 1]  # continued once
        computed.clear()
        found = CachingLM(lm, str(tmp_path / "answers.db")).loglikelihood(self.requests("loglikelihood", *pairs))
        assert [len(part) for part in computed] == [2]
        assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], rel=1e-4)
        assert [is_greedy for _, is_greedy in found] == [is_greedy for _, is_greedy in expected]

    def test_greedy_is_what_generate_writes(self, lm, fitted, tokenizer):
        context = TEXTS[2][0]
        prompt = tokenizer.encode(context)
        new = fitted.generate(torch.tensor([prompt]), max_new_tokens=12)[0, len(prompt) :].tolist()
        pairs = [(prompt, new[:length]) for length in range(1, len(new) + 1)]
        pairs += [(prompt, [*new[:2], (new[2] + 1) % 400]), (prompt, [(new[0] + 1) % 400])]
        assert lm._are_greedy(pairs, 2) == [True] * len(new) + [False, False]

    def test_multiple_choice_takes_what_the_model_has_learnt(self, harness, fitted, tokenizer):
        datasets = pytest.importorskip("datasets")
        from lm_eval.api.task import ConfigurableTask
        from lm_eval.evaluator import evaluate as run_tasks

        questions = [(TEXTS[0][0], 1), (TEXTS[1][0], 0)]
        rows = [
            {"question": question, "gold": gold, "choices": ["green", "blue", "red"]} for question, gold in questions
        ]
        task = ConfigurableTask(
            config={
                "task": "colours",
                "custom_dataset": lambda **kwargs: {"test": datasets.Dataset.from_list(rows)},
                "test_split": "test",
                "output_type": "multiple_choice",
                "doc_to_text": "{{question}}",
                "doc_to_choice": "{{choices}}",
                "doc_to_target": "{{gold}}",
                "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
            }
        )
        lm = harness(fitted, tokenizer=tokenizer, batch_size=4, check_greedy=False)
        results = run_tasks(lm=lm, task_dict={"colours": task}, bootstrap_iters=0)
        assert results["results"]["colours"]["acc,none"] == 1.0

    def test_rolling_likelihood_covers_every_token_once(self, harness, fitted, tokenizer):
        lm = harness(fitted, tokenizer=tokenizer, batch_size=2, max_length=16, num_samples=4)
        text = "some text " * 8
        ids = tokenizer.encode(text)
        (total,) = lm.loglikelihood_rolling(self.requests("loglikelihood_rolling", (text,)), disable_tqdm=True)
        assert len(ids) > 32
        # Windows of 16 tokens, of which the first is context.
        windows = [([lm.prefix_token_id], ids[:15])]
        for start in range(15, len(ids), 15):
            piece = ids[start : start + 15]
            before = ids[max(start + len(piece) - 16, 0) : start]
            windows.append((before, piece))
        expected = completion_likelihood(fitted, *zip(*windows, strict=True), num_samples=4).log_likelihoods.sum()
        assert total == pytest.approx(float(expected), rel=1e-4)

    def test_generated_text_is_that_of_generate_up_to_a_stop(self, lm, fitted, tokenizer):
        contexts = [context for context, _ in TEXTS] + ["Something else"]
        options = {"until": ["\n\n"], "max_gen_toks": 16}
        texts = lm.generate_until(
            self.requests("generate_until", *((context, options) for context in contexts)), disable_tqdm=True
        )
        assert texts[:4] == [" blue", " green", " two", " three"]
        for context, text in zip(contexts, texts, strict=True):
            ids = torch.tensor([tokenizer.encode(context)])
            new = fitted.generate(ids, max_new_tokens=16)[0, ids.shape[1] :]
            assert text == tokenizer.decode(new, skip_special_tokens=True).split("\n\n")[0]

    def test_stop_strings(self, lm):
        context = TEXTS[2][0]
        for until, expected in ((["Q"], " two\n\n"), ([" "], ""), (["w"], " t"), ([], " two\n\nQ: a")):
            options = {"until": until, "max_gen_toks": 16, "do_sample": False}
            assert lm.generate_until(self.requests("generate_until", (context, options)), disable_tqdm=True) == [
                expected
            ]

    def test_stop_string_of_one_token_ends_the_work(self, lm, tokenizer):
        context = torch.tensor([tokenizer.encode(TEXTS[2][0])])
        (end,) = tokenizer.encode("Q", add_special_tokens=False)
        assert lm._end_ids(["Q", "\n\n"]) == sorted({end, tokenizer.eos_token_id})
        new = lm._model_generate(context, context.shape[1] + 16, ["Q"])[0, context.shape[1] :]
        assert int(new[-1]) == end

    @pytest.mark.parametrize(
        "options",
        [
            {"do_sample": True, "temperature": 0, "top_k": 0},
            {"do_sample": False, "temperature": 0.7, "top_p": 0.5, "top_k": 3, "num_beams": 1},
            {"do_sample": True, "temperature": 1.0, "top_k": 1, "repetition_penalty": 1.0},
        ],
    )
    def test_settings_of_other_models_that_mean_the_likeliest_text(self, lm, options):
        request = self.requests("generate_until", (TEXTS[2][0], {"until": ["\n"], "max_gen_toks": 16, **options}))
        assert lm.generate_until(request, disable_tqdm=True) == [" two"]

    @pytest.mark.parametrize("top_k", [0, -1])
    def test_a_top_k_of_nothing_leaves_all_tokens(self, harness, fitted, tokenizer, top_k):
        options = {"until": [], "max_gen_toks": 16, "do_sample": True, "temperature": 100.0}
        texts = []
        for settings in ({}, {"top_k": top_k}, {"top_k": 2}):
            lm = harness(fitted, tokenizer=tokenizer)
            request = self.requests("generate_until", ("Sky", options | settings))
            texts += lm.generate_until(request, disable_tqdm=True)
        assert texts[0] == texts[1] != texts[2]

    def test_samples_with_a_seed(self, harness, fitted, tokenizer):
        options = {"until": [], "max_gen_toks": 16, "do_sample": True, "temperature": 100.0}
        runs = []
        for seed in (0, 0, 1):
            lm = harness(fitted, tokenizer=tokenizer, seed=seed)
            request = self.requests("generate_until", ("Sky", options))
            runs.append([lm.generate_until(request, disable_tqdm=True) for _ in range(2)])
        assert runs[0] == runs[1] != runs[2]
        assert runs[0][0] != runs[0][1]  # repeats of a request differ

    def test_text_chat_template_of_a_processor(self, harness, converted_dir, fitted, tmp_path):
        processor = LLaDAUniProcessor.from_pretrained(converted_dir / "processor")
        processor.tokenizer.chat_template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
        processor.save_pretrained(tmp_path)
        for tokenizer in (str(tmp_path), processor):
            lm = harness(fitted, tokenizer=tokenizer)
            assert lm.apply_chat_template([{"role": "user", "content": "hello"}]) == "<user>hello"

    def test_batch_size_is_found(self, harness, fitted, tokenizer):
        lm = harness(fitted, tokenizer=tokenizer, batch_size="auto", max_batch_size=4)
        answers = lm.loglikelihood(self.requests("loglikelihood", *TEXTS), disable_tqdm=True)
        assert len(answers) == 4 and all(is_greedy for _, is_greedy in answers)

    def test_long_context_loses_its_begin(self, harness, fitted, tokenizer):
        lm = harness(fitted, tokenizer=tokenizer, max_length=16)
        assert lm._truncate(list(range(20)), [1, 2, 3, 4]) == (list(range(8, 20)), [1, 2, 3, 4])
        assert lm._truncate([5, 6], [1, 2]) == ([5, 6], [1, 2])
        with pytest.raises(ValueError, match="longer than `max_length`, 16"):
            lm._truncate([1], list(range(17)))

    @pytest.mark.parametrize("name, value", [("num_samples", 0), ("seed", -1), ("copies_per_forward", "2")])
    def test_bad_input(self, harness, fitted, tokenizer, name, value):
        with pytest.raises((ValueError, TypeError), match=f"`{name}`"):
            harness(fitted, tokenizer=tokenizer, **{name: value})
