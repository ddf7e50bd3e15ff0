"""Likelihood bounds against sums over all orders of writing."""

import copy
import itertools
import math

import pytest
import torch

from tests.transformers_llada_uni.generation.property_cases import tiny_backbone
from transformers_llada_uni import LLaDA2MoeForBlockDiffusion, LLaDAUniForConditionalGeneration
from transformers_llada_uni.evaluation import LikelihoodNoise, completion_likelihood
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
