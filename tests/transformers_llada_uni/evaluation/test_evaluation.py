"""Likelihood bounds against sums over all orders, lm_eval's model, visual question answering, text-to-image runs."""

import copy
import itertools
import math
import subprocess
import sys

import evaluate
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoTokenizer,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTokenizer,
)

from diffusers_llada_uni import LLaDAUniPipeline
from diffusers_llada_uni.evaluation import (
    CLIPScore,
    FrechetDistance,
    evaluate_text_to_image,
    frechet_distance,
    generate_pictures,
    score_pictures,
)
from tests.transformers_llada_uni.generation.property_cases import tiny_backbone
from transformers_llada_uni import (
    LLaDA2MoeConfig,
    LLaDA2MoeForBlockDiffusion,
    LLaDAUniForConditionalGeneration,
    LLaDAUniProcessor,
)
from transformers_llada_uni.evaluation import (
    LikelihoodNoise,
    VisualQuestionAnsweringAccuracy,
    completion_likelihood,
    evaluate_visual_question_answering,
    normalize_answer,
    visual_question_answering_accuracy,
)
from transformers_llada_uni.evaluation import visual_question_answering as vqa_module
from transformers_llada_uni.training.objective.block_diffusion import add_block_diffusion_head
from transformers_llada_uni.training.objective.noise import BlockDiffusionNoise


MASK = 63
PROMPTS = [[1, 2, 3, 4, 5, 6], [7, 8], [9] * 11, []]
COMPLETIONS = [[10, 11, 12, 13], [14, 15, 16, 17, 18], [19], [20, 21, 22]]


@pytest.fixture(scope="module")
def model():
    return tiny_backbone().float()


@torch.no_grad()
def log_probs(model, ids, block_length):
    """Of every token at every position, `(length, vocabulary)`, by a plain forward."""
    return model(torch.tensor([ids]), block_length=block_length).logits[0].log_softmax(dim=-1)


def orders_of_block(model, clean, targets, end, block_length):
    """For each order in which `targets` (positions of one block) may be written, the log-likelihood of doing so."""
    totals = []
    for order in itertools.permutations(targets):
        canvas, total = clean[:end] + [MASK] * (-end % block_length), 0.0
        for position in targets:
            canvas[position] = MASK
        for position in order:
            total += float(log_probs(model, canvas, block_length)[position, clean[position]])
            canvas[position] = clean[position]
        totals.append(total)
    return totals


def blocks_by_hand(model, prompt, completion, block_length):
    clean = prompt + completion
    blocks = {}
    for position in range(len(prompt), len(clean)):
        blocks.setdefault(position // block_length, []).append(position)
    ends = {block: min((block + 1) * block_length, len(clean)) for block in blocks}
    return [orders_of_block(model, clean, targets, ends[block], block_length) for block, targets in blocks.items()]


class TestLikelihood:
    def test_blocks_of_one_token_give_the_likelihood_itself(self, model):
        bound = completion_likelihood(model, PROMPTS[:3], COMPLETIONS[:3], block_length=1, num_samples=1)
        for prompt, completion, tokens in zip(PROMPTS, COMPLETIONS, bound.token_log_likelihoods, strict=False):
            for number, token in enumerate(completion):
                ids = [*prompt, *completion[:number], MASK]
                expected = float(log_probs(model, ids, 1)[-1, token])
                assert float(tokens[number]) == pytest.approx(expected, abs=1e-4)
        assert bound.log_likelihoods.tolist() == pytest.approx(
            [float(row.sum()) for row in bound.token_log_likelihoods]
        )
        num_tokens = sum(map(len, COMPLETIONS[:3]))
        assert bound.perplexity() == pytest.approx(
            math.exp(-float(bound.log_likelihoods.sum()) / num_tokens), rel=1e-5
        )

    @pytest.mark.parametrize("block_length", [2, 4])
    def test_is_the_mean_over_all_orders_of_writing(self, model, block_length):
        bound = completion_likelihood(model, PROMPTS, COMPLETIONS, block_length=block_length, num_samples=15)
        for prompt, completion, estimate in zip(PROMPTS, COMPLETIONS, bound.log_likelihoods.tolist(), strict=True):
            blocks = blocks_by_hand(model, prompt, completion, block_length)
            assert estimate == pytest.approx(sum(sum(orders) / len(orders) for orders in blocks), abs=1e-3)
            # The likelihood of writing the text in an order drawn at random is at least that.
            exact = sum(float(torch.tensor(orders).logsumexp(0)) - math.log(len(orders)) for orders in blocks)
            assert estimate <= exact + 1e-3
            assert len(completion) == 1 or estimate < exact

    def test_last_block_may_end_with_the_completion(self, model):
        prompt, completion = PROMPTS[0], COMPLETIONS[0][:1]
        bounds = [
            completion_likelihood(model, [prompt], [completion], block_length=16, fill_last_block=fill)
            for fill in (True, False)
        ]
        ids = [*prompt, MASK]
        for bound, canvas in zip(bounds, (ids + [MASK] * 9, ids), strict=True):
            expected = float(log_probs(model, canvas, 16)[len(prompt), completion[0]])
            assert float(bound.log_likelihoods) == pytest.approx(expected, abs=1e-4)

    @pytest.mark.parametrize(
        "noise", [LikelihoodNoise(num_samples=8), BlockDiffusionNoise(noise_range=(0.0, 1.0), num_noise_samples=8)]
    )
    def test_samples_are_unbiased(self, model, noise):
        prompt, completion = PROMPTS[1], [10, 11, 12, 13, 14, 15]

        def estimate(noise, seed=0):
            return float(
                completion_likelihood(
                    model, [prompt], [completion], block_length=8, noise=noise, seed=seed, copies_per_forward=64
                ).log_likelihoods
            )

        exact = estimate(LikelihoodNoise(num_samples=63))  # all 2^6 - 1 sets
        estimates = torch.tensor([estimate(noise, seed) for seed in range(60)])
        assert float(estimates.std()) > 0
        assert abs(float(estimates.mean()) - exact) < 4 * float(estimates.std()) / 60**0.5

    def test_weights_by_hand(self):
        labels = torch.tensor([[-100, -100, 3, 4, 5, 6, 7, 8]])
        masked, weights = LikelihoodNoise(num_samples=15).sample(labels, None, 4, torch.Generator().manual_seed(0))
        assert not masked[:, :, :2].any()
        assert bool((weights[~masked] == 0).all())
        # Two tokens: both hidden, weight 1 / (2 * 1); one hidden, weight 1 / (1 * 2). The rest is not needed.
        assert masked[0, :4, 2:4].tolist() in (
            [[True, True], [False, True], [True, False], [False, False]],
            [[True, True], [True, False], [False, True], [False, False]],
        )
        assert bool((weights[0, :3, 2:4][masked[0, :3, 2:4]] == 0.5).all())
        # Four tokens: every set once, weight 1 / (k * binomial(4, k)).
        sets = [tuple(row) for row in masked[0, :, 4:].tolist()]
        assert len(set(sets)) == 15 and (False,) * 4 not in sets
        for chosen, weight in zip(sets, weights[0, :, 4:].amax(dim=1).tolist(), strict=True):
            assert weight == pytest.approx(1 / (sum(chosen) * math.comb(4, sum(chosen))))

    @pytest.mark.parametrize("num_samples", [1, 4, 10, 200])
    def test_weights_of_a_block_sum_to_its_tokens(self, num_samples):
        labels = torch.arange(20).view(2, 10)
        generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
        masked, weights = LikelihoodNoise(num_samples).sample(labels, None, 7, generators)
        assert masked.shape == weights.shape == (2, num_samples, 10)
        for block in (slice(0, 7), slice(7, 10)):
            torch.testing.assert_close(
                weights[:, :, block].sum(dim=(1, 2)), torch.full((2,), len(range(10)[block]) * 1.0)
            )
        if num_samples == 10:  # more than 7 levels, each used
            assert set(masked[0, :, :7].sum(dim=1).tolist()) == set(range(1, 8))

    def test_depends_on_seed_and_prompt_only(self, model):
        long = [list(range(10, 30)), list(range(20, 45)), list(range(5, 12)), list(range(30, 50))]

        def run(prompts=PROMPTS, completions=long, **kwargs):
            kwargs = {"block_length": 8, "num_samples": 6} | kwargs
            return completion_likelihood(model, prompts, completions, **kwargs).log_likelihoods

        together = run(batch_size=4)
        assert torch.equal(together, run(batch_size=4))
        for settings in ({"batch_size": 1}, {"batch_size": 3, "copies_per_forward": 2}, {"copies_per_forward": 5}):
            torch.testing.assert_close(run(**settings), together, rtol=1e-5, atol=1e-3)
        torch.testing.assert_close(run(PROMPTS[::-1], long[::-1]).flip(0), together, rtol=1e-5, atol=1e-3)
        assert float((run(seed=1) - together).abs().min()) > 1e-2

    def test_leaves_the_model_as_it_was(self, model):
        model = copy.deepcopy(model).train()
        completion_likelihood(model, PROMPTS[:1], COMPLETIONS[:1])
        assert model.training and "forward" not in model.__dict__
        add_block_diffusion_head(model)
        own = model.forward
        completion_likelihood(model, PROMPTS[:1], COMPLETIONS[:1])
        assert model.forward == own

    def test_whole_model_equals_its_backbone(self, converted_dir):
        whole = LLaDAUniForConditionalGeneration.from_pretrained(converted_dir / "model").eval()
        backbone = LLaDA2MoeForBlockDiffusion(whole.config.text_config).eval()
        backbone.model.load_state_dict(whole.model.language_model.state_dict())
        backbone.lm_head.load_state_dict(whole.lm_head.state_dict())
        bounds = [completion_likelihood(one, PROMPTS, COMPLETIONS).log_likelihoods for one in (whole, backbone)]
        torch.testing.assert_close(*bounds)

    def test_adapted_model(self, model):
        peft = pytest.importorskip("peft")
        adapted = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=2, target_modules=["dense"]))
        expected = completion_likelihood(model, PROMPTS, COMPLETIONS).log_likelihoods
        torch.testing.assert_close(completion_likelihood(adapted, PROMPTS, COMPLETIONS).log_likelihoods, expected)

    @pytest.mark.parametrize(
        "arguments, message",
        [
            ({"completions": [[1]]}, "`prompts` has 2 rows, but `completions` has 1"),
            ({"completions": [[1], []]}, "Row 1 of `completions` is empty"),
            ({"completions": [[1], [96]]}, "Row 1 of `completions` holds ids outside of the vocabulary of 96"),
            ({"prompts": [[-1], [1]]}, "Row 0 of `prompts` holds ids outside"),
            ({"prompts": ["a", [1]]}, "`prompts`"),
            ({"prompts": [[1], [1] * 512]}, "`max_position_embeddings` \\(512\\)"),
            ({"block_length": 0}, "`block_length`"),
            ({"num_samples": 0}, "`num_samples`"),
            ({"batch_size": 0}, "`batch_size`"),
            ({"copies_per_forward": True}, "`copies_per_forward`"),
            ({"seed": -1}, "`seed`"),
        ],
    )
    def test_bad_input(self, model, arguments, message):
        with pytest.raises((ValueError, TypeError), match=message):
            completion_likelihood(model, **({"prompts": [[1], [2]], "completions": [[1], [2]]} | arguments))


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

    def test_is_registered_with_lm_eval(self, converted_dir):
        pytest.importorskip("lm_eval")
        script = (
            "import transformers_llada_uni.evaluation.lm_eval_model;"
            "from lm_eval.api.registry import get_model; get_model('hf'); model = get_model('llada-uni');"
            f"lm = model.create_from_arg_string('pretrained={converted_dir},num_samples=2,device=cpu');"
            "print(type(lm).__name__, type(lm.model).__name__, lm.num_samples)"
        )
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert done.stdout.split()[-3:] == ["LLaDAUniLM", "LLaDAUniForConditionalGeneration", "2"]

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
        with pytest.raises(ValueError, match=f"`{name}`"):
            harness(fitted, tokenizer=tokenizer, **{name: value})


class TestVisualQuestionAnswering:
    @pytest.mark.parametrize(
        "answer, normal",
        [
            ("Yes.", "yes"),
            ("The  Two dogs", "2 dogs"),
            ("a man's hat", "mans hat"),
            ("don't", "dont"),
            ("10,000", "10000"),
            ("3.5 feet", "3.5 feet"),
            ("red,white and blue", "red white and blue"),
            ("None", "0"),
            ("left/right?", "left right"),
            ("U.S.A.", "usa"),
        ],
    )
    def test_normal_form(self, answer, normal):
        assert normalize_answer(answer) == normal

    @pytest.mark.parametrize("matches, expected", [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
    def test_accuracy_by_hand(self, matches, expected):
        # With m of 10 people agreeing, m times one of them is left out: (m min((m-1)/3, 1) + (10-m) min(m/3, 1)) / 10
        answers = ["Two"] * matches + ["three"] * (10 - matches)
        assert visual_question_answering_accuracy("2.", answers) == pytest.approx(expected)

    def test_single_answer_is_compared(self):
        assert visual_question_answering_accuracy("The cat", ["cat"]) == 1.0
        assert visual_question_answering_accuracy("dog", ["cat"]) == 0.0
        with pytest.raises(ValueError, match="`answers` is empty"):
            visual_question_answering_accuracy("dog", [])

    @pytest.mark.parametrize("load", ["class", "file"])
    def test_is_a_metric_of_evaluate(self, load, tmp_path, monkeypatch):
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        if load == "class":
            metric = VisualQuestionAnsweringAccuracy()
        else:
            metric = evaluate.load(vqa_module.__file__, cache_dir=str(tmp_path))
        references = [["cat"] * 2 + ["dog"] * 8, ["2"]]
        assert metric.compute(predictions=["a cat", "two"], references=references) == {"accuracy": pytest.approx(0.8)}
        metric.add_batch(predictions=["a cat"], references=references[:1])
        metric.add_batch(predictions=["3"], references=references[1:])
        assert metric.compute() == {"accuracy": pytest.approx(0.3)}

    @pytest.fixture(scope="class")
    def parts(self, converted_dir):
        model = LLaDAUniForConditionalGeneration.from_pretrained(converted_dir / "model").eval()
        return model, LLaDAUniProcessor.from_pretrained(converted_dir / "processor")

    @staticmethod
    def dataset():
        pictures = [Image.new("RGB", size, colour) for size, colour in (((64, 64), "red"), ((96, 64), "blue"))]
        return [
            {"image": pictures[0], "question": "What colour?", "answers": ["red"] * 10},
            {"image": pictures[1], "question": "What colour is it here?", "answers": [{"answer": "blue"}] * 10},
            {"image": pictures, "question": "Are they one?", "answers": ["no"]},
        ]

    def test_answers_are_those_of_generate(self, parts):
        model, processor = parts
        dataset = self.dataset()
        settings = {"max_new_tokens": 8, "num_steps_per_block": 4}
        by_hand = []
        for row in dataset:
            pictures = row["image"] if isinstance(row["image"], list) else [row["image"]]
            inputs = processor(images=[pictures], text=[row["question"] + "?!"], task="understanding")
            new = model.generate(**inputs, **settings)[0, inputs["input_ids"].shape[1] :]
            by_hand.append(processor.post_process_image_text_to_text(new[None])[0].strip())
        dataset[1]["answers"] = [{"answer": by_hand[1]}] * 3 + [{"answer": "else"}] * 7
        for batch_size in (1, 2, 8):
            results = evaluate_visual_question_answering(
                model,
                processor,
                iter(dataset) if batch_size == 2 else dataset,
                batch_size=batch_size,
                prompt_template="{question}?!",
                show_progress_bar=False,
                **settings,
            )
            assert results["predictions"] == by_hand
            assert results["accuracies"][1] == pytest.approx(0.9)
            assert results["accuracy"] == pytest.approx(sum(results["accuracies"]) / 3)

    @pytest.mark.parametrize(
        "arguments, message",
        [
            ({"dataset": []}, "`dataset` is empty"),
            ({"dataset": [{"image": 1, "question": "what"}]}, "Row 0 of `dataset` has no `answers`"),
            ({"dataset": [{"image": 1, "question": "what", "answers": []}]}, "Row 0 of `dataset` has an empty list"),
            ({"batch_size": 0}, "`batch_size`"),
            ({"prompt_template": "what?"}, "`prompt_template`"),
        ],
    )
    def test_bad_input(self, parts, arguments, message):
        with pytest.raises(ValueError, match=message):
            evaluate_visual_question_answering(*parts, **({"dataset": self.dataset()} | arguments))


class Painter:
    """Stands for a pipeline: pictures that show the prompt's length and the generator's first number."""

    def __init__(self, stop_after=None):
        self.num_made, self.stop_after = 0, stop_after

    def __call__(self, prompt, generator, shade=0):
        pictures = []
        for text, one in zip(prompt, generator, strict=True):
            if self.num_made == self.stop_after:
                raise KeyboardInterrupt
            noise = int(torch.randint(256, (), generator=one))
            pictures.append(Image.new("RGB", (4, 4), (len(text), noise, shade)))
            self.num_made += 1
        return pictures


def pixels(pictures):
    return [picture.getpixel((0, 0)) for picture in pictures]


class TestTextToImage:
    PROMPTS = ["a", "bb", "ccc"]

    def test_seeds_belong_to_the_picture(self, tmp_path):
        runs = [
            pixels(
                generate_pictures(
                    Painter(),
                    self.PROMPTS,
                    tmp_path / str(batch_size),
                    num_images_per_prompt=2,
                    batch_size=batch_size,
                    show_progress_bar=False,
                    shade=7,
                )
            )
            for batch_size in (1, 4)
        ]
        assert runs[0] == runs[1]
        assert [red for red, _, _ in runs[0]] == [1, 1, 2, 2, 3, 3]
        assert len({green for _, green, _ in runs[0]}) == 6
        assert {blue for _, _, blue in runs[0]} == {7}
        other = generate_pictures(Painter(), self.PROMPTS, tmp_path / "other", seed=1, show_progress_bar=False)
        assert pixels(other) != runs[0][::2]

    def test_goes_on_where_it_was_stopped(self, tmp_path):
        expected = pixels(generate_pictures(Painter(), self.PROMPTS, tmp_path / "whole", show_progress_bar=False))
        folder = tmp_path / "stopped"
        with pytest.raises(KeyboardInterrupt):
            generate_pictures(Painter(stop_after=2), self.PROMPTS, folder, show_progress_bar=False)
        assert sorted(path.name for path in folder.glob("*.png")) == ["00000-00.png", "00001-00.png"]
        (folder / "00002-00.tmp").write_bytes(b"half a picture")  # as a kill would leave it
        painter = Painter()
        assert pixels(generate_pictures(painter, self.PROMPTS, folder, show_progress_bar=False)) == expected
        assert painter.num_made == 1
        assert not list(folder.glob("*.tmp"))
        generate_pictures(painter, self.PROMPTS, folder, show_progress_bar=False)
        assert painter.num_made == 1

    @pytest.mark.parametrize("change", [{"seed": 1}, {"prompts": ["a", "bb", "x"]}, {"shade": 3}])
    def test_refuses_the_pictures_of_another_run(self, tmp_path, change):
        arguments = {"prompts": self.PROMPTS, "output_dir": tmp_path, "show_progress_bar": False}
        generate_pictures(Painter(), **arguments)
        name = "pipeline_kwargs" if "shade" in change else next(iter(change))
        with pytest.raises(ValueError, match=f"its {name} differ"):
            generate_pictures(Painter(), **(arguments | change))

    def test_refuses_unknown_pictures(self, tmp_path):
        Image.new("RGB", (2, 2)).save(tmp_path / "holiday.png")
        with pytest.raises(ValueError, match="holds pictures, but no settings.json"):
            generate_pictures(Painter(), self.PROMPTS, tmp_path)

    def test_scores_and_results(self, tmp_path):
        def brightness(prompts, pictures):
            return [
                len(prompt) + picture.getpixel((0, 0))[2] for prompt, picture in zip(prompts, pictures, strict=True)
            ]

        results = evaluate_text_to_image(
            Painter(),
            self.PROMPTS,
            tmp_path,
            {"brightness": brightness},
            num_images_per_prompt=2,
            metric_batch_size=4,
            show_progress_bar=False,
            shade=10,
            reference_pictures=[Image.new("RGB", (1, 1))],
            distances={"count": lambda made, references: len(made) - len(references)},
        )
        assert results["brightness"] == {"mean": 12.0, "scores": [11.0, 11.0, 12.0, 12.0, 13.0, 13.0]}
        assert results["count"] == 5.0
        assert (tmp_path / "results.json").exists()

    def test_scores_by_a_metric_of_evaluate(self):
        datasets = pytest.importorskip("datasets")

        class Widths(evaluate.Metric):
            def _info(self):
                features = {"predictions": datasets.Image(), "references": datasets.Value("string")}
                return evaluate.MetricInfo(description="", citation="", features=datasets.Features(features))

            def _compute(self, predictions, references):
                return {
                    "agree": all(image.width == len(text) for image, text in zip(predictions, references, strict=True))
                }

        pictures = [Image.new("RGB", (width, 1)) for width in (1, 2, 3)]
        assert score_pictures(Widths(), self.PROMPTS, pictures, batch_size=2) == {"agree": True}

    def test_pipeline(self, converted_dir, tmp_path):
        pipeline = LLaDAUniPipeline.from_pretrained(converted_dir)
        pipeline.set_progress_bar_config(disable=True)
        settings = {"height": 64, "width": 64, "num_inference_steps": 2, "show_progress_bar": False}
        runs = [
            generate_pictures(
                pipeline, ["a cat", "a dog"], tmp_path / str(batch_size), batch_size=batch_size, **settings
            )
            for batch_size in (1, 2)
        ]
        for alone, together in zip(*runs, strict=True):
            assert alone.size == together.size == (64, 64)
            difference = np.abs(np.asarray(alone, dtype=int) - np.asarray(together, dtype=int))
            assert difference.max() <= 2
        assert runs[0][0].tobytes() != runs[0][1].tobytes()

    @pytest.mark.parametrize(
        "arguments, message",
        [
            ({"prompts": "a cat"}, "`prompts`"),
            ({"prompts": []}, "`prompts`"),
            ({"prompts": ["a", ""]}, "`prompts` must hold texts, got '' in row 1"),
            ({"num_images_per_prompt": 0}, "`num_images_per_prompt`"),
            ({"batch_size": 0}, "`batch_size`"),
            ({"seed": -1}, "`seed`"),
            ({"generator": None}, "`generator` is set"),
            ({"pipeline": lambda **kwargs: []}, "`pipeline` gave 0 pictures for 1"),
            ({"pipeline": 3}, "`pipeline` must be callable"),
        ],
    )
    def test_bad_input(self, tmp_path, arguments, message):
        settings = {"pipeline": Painter(), "prompts": ["a"], "output_dir": tmp_path, "show_progress_bar": False}
        with pytest.raises((ValueError, TypeError), match=message):
            generate_pictures(**(settings | arguments))

    def test_bad_metrics(self, tmp_path):
        with pytest.raises(ValueError, match="go together"):
            evaluate_text_to_image(Painter(), ["a"], tmp_path, {}, distances={"a": len})
        with pytest.raises(TypeError, match="`clip`"):
            evaluate_text_to_image(Painter(), ["a"], tmp_path, {"clip": 3})
        with pytest.raises(ValueError, match="as many, got 2 and 1"):
            score_pictures(len, ["a", "b"], [Image.new("RGB", (1, 1))])
        with pytest.raises(ValueError, match="gave 1 scores for 2"):
            score_pictures(lambda prompts, pictures: [1.0], ["a", "b"], [Image.new("RGB", (1, 1))] * 2)


class TestPictureMetrics:
    @pytest.fixture(scope="class")
    def clip(self, tmp_path_factory):
        torch.manual_seed(0)
        vocabulary = {letter + end: 0 for letter in "abcdefgh" for end in ("", "</w>")}
        vocabulary = {token: index for index, token in enumerate([*vocabulary, "<|startoftext|>", "<|endoftext|>"])}
        tokenizer = CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=8)
        processor = CLIPProcessor(CLIPImageProcessor(size=16, crop_size=16), tokenizer)
        text = {
            "vocab_size": len(vocabulary),
            "max_position_embeddings": 8,
            "eos_token_id": vocabulary["<|endoftext|>"],
        }
        text |= {"bos_token_id": vocabulary["<|startoftext|>"]}
        sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        config = CLIPConfig(
            text_config=text | sizes, vision_config={"image_size": 16, "patch_size": 8} | sizes, projection_dim=8
        )
        folder = tmp_path_factory.mktemp("clip")
        CLIPModel(config).save_pretrained(folder)
        processor.save_pretrained(folder)
        return folder

    def test_clip_score_by_hand(self, clip):
        prompts = ["a", "b c d", "a b c d e f g h a b c d"]  # the last is longer than the model reads
        pictures = [Image.new("RGB", (20, 30), colour) for colour in ("red", "green", "blue")]
        pictures[1] = pictures[1].convert("RGBA")
        scores = CLIPScore(str(clip))(prompts, pictures)
        model, processor = CLIPModel.from_pretrained(clip), CLIPProcessor.from_pretrained(clip)
        for prompt, picture, score in zip(prompts, pictures, scores, strict=True):
            inputs = processor(
                text=[prompt], images=[picture.convert("RGB")], return_tensors="pt", truncation=True, padding=True
            )
            with torch.no_grad():
                cosine = model(**inputs).logits_per_image / model.logit_scale.exp()
            assert score == pytest.approx(max(100 * float(cosine), 0.0), abs=1e-3)
        assert CLIPScore(model, processor)(prompts, pictures) == pytest.approx(scores)

    def test_clip_score_refuses(self, clip):
        with pytest.raises(ValueError, match="`processor` is needed"):
            CLIPScore(CLIPModel.from_pretrained(clip))
        with pytest.raises(ValueError, match="`prompts` are 2, but `pictures` are 1"):
            CLIPScore(str(clip))(["a", "b"], [Image.new("RGB", (8, 8))])

    def test_frechet_distance_by_hand(self):
        # Uncorrelated dimensions: |m - m'|^2 + sum (s - s')^2
        square = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
        scale, other, shift = torch.tensor([2.0, 3.0]), torch.tensor([5.0, 1.0]), torch.tensor([0.5, -2.0])
        deviation = (4 / 3) ** 0.5
        expected = float(shift.square().sum() + ((scale - other) * deviation).square().sum())
        assert frechet_distance(square * scale, square * other + shift) == pytest.approx(expected)
        # A rotation of both changes nothing, but makes the dimensions depend on one another.
        rotation = torch.tensor([[0.6, -0.8], [0.8, 0.6]])
        rotated = [features @ rotation for features in (square * scale, square * other + shift)]
        assert frechet_distance(*rotated) == pytest.approx(expected, rel=1e-5)
        assert frechet_distance(rotated[0], rotated[0]) == pytest.approx(0.0, abs=1e-6)

    def test_frechet_distance_of_few_samples(self):
        # Singular covariances, as with fewer pictures than features, must not give NaN.
        features = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
        assert math.isfinite(frechet_distance(features, features + 1))
        assert frechet_distance(features, features + 1) == pytest.approx(32.0, rel=1e-4)

    def test_frechet_distance_of_pictures(self):
        def mean_colour(pictures):
            return torch.tensor([picture.resize((1, 1)).getpixel((0, 0)) for picture in pictures]).float()

        first = [Image.new("RGB", (4, 4), (red, 0, 0)) for red in (10, 20, 30)]
        second = [Image.new("L", (4, 4), 0).convert("RGB"), *first[:2]]
        for batch_size in (1, 2, 16):
            distance = FrechetDistance(mean_colour, batch_size)(first, second)
            assert distance == pytest.approx(100.0)  # means 20 and 10, the same variance

    def test_bad_input(self):
        with pytest.raises(ValueError, match="`features` must be"):
            frechet_distance(torch.zeros(1, 2), torch.zeros(2, 2))
        with pytest.raises(ValueError, match="2 dimensions, but `reference_features` 3"):
            frechet_distance(torch.zeros(2, 2), torch.zeros(2, 3))
        with pytest.raises(TypeError, match="`extract_features`"):
            FrechetDistance(None)
        with pytest.raises(ValueError, match="`batch_size`"):
            FrechetDistance(len, batch_size=0)
