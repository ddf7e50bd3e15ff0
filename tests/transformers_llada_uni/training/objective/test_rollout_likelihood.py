"""Log-probabilities of rollouts, against formulas worked out pass by pass, and what the decoder committed with."""

import pytest
import torch

from tests.transformers_llada_uni.training.training_common import BLOCK, END, MASK, tiny_model
from transformers_llada_uni.generation.canvas import Canvas
from transformers_llada_uni.generation.stopping import RowEnds, make_criteria
from transformers_llada_uni.generation.trajectory import TrajectoryRecorder
from transformers_llada_uni.training.grpo_config import IMAGE_NOISE_RANGE, TEXT_NOISE_RANGE
from transformers_llada_uni.training.objective.noise import BlockDiffusionNoise
from transformers_llada_uni.training.objective.rollout_likelihood import RolloutLikelihood, Rollouts


PROMPTS = [[11, 12, 13, 14, 15], [31, 32, 33], [41, 42, 43, 44, 45, 46]]


def likelihood_of(model, estimate, rollouts=None, trace_shrinkage=1, noise_range=TEXT_NOISE_RANGE):
    noise = BlockDiffusionNoise(noise_range=noise_range, num_noise_samples=3)
    rollouts = Rollouts() if rollouts is None else rollouts
    likelihood = RolloutLikelihood(estimate, noise, BLOCK, MASK, 0, trace_shrinkage, rollouts=lambda: rollouts)
    likelihood.attach(model)
    return likelihood


def batch_of(prompts, answers):
    """As trl lays them out: padding in front of prompts and behind answers."""
    width = max(map(len, prompts))
    length = max(map(len, answers))
    ids = torch.full((len(prompts), width + length), END)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        ids[row, width - len(prompt) : width + len(answer)] = torch.tensor(prompt + answer)
        mask[row, width - len(prompt) : width + len(answer)] = 1
        labels[row, width : width + len(answer)] = torch.tensor(answer)
    return ids, mask, labels


@torch.no_grad()
def seen_log_probs(model, clean, block):
    """Of the last block, from a pass over what a step sees."""
    logits = model(input_ids=torch.tensor([clean + block])).logits[0, len(clean) :]
    return logits.log_softmax(-1)


@pytest.mark.parametrize("noise_range", [TEXT_NOISE_RANGE, IMAGE_NOISE_RANGE])
def test_the_bound_is_that_of_the_whole_answer(noise_range):
    """EBPO, eq. 5: sum over levels and blocks, each with the clean blocks before it, a token a masked one's weight."""
    model = tiny_model()
    likelihood = likelihood_of(model, "elbo", noise_range=noise_range)
    answers = [[21, 22, 23, 24, 25, 26], [27, 28, 29, 30], [51]]
    batch = batch_of(PROMPTS, answers)
    inputs, _ = likelihood.lay_out(*batch)
    masked, weights = inputs["masked"], inputs["weights"]
    low, high = noise_range
    # A weight is 1 / (N t), with t in its stratum of the range.
    levels = 1 / (3 * weights[masked])
    assert levels.min() >= low and levels.max() <= high
    with torch.no_grad():
        terms = model(*batch, fused_lm_head=True)
    for row, (prompt, answer) in enumerate(zip(PROMPTS, answers, strict=True)):
        ids = prompt + answer
        ids += [MASK] * (-len(ids) % BLOCK)
        bound = 0.0
        for copy in range(3):
            for start in range(0, len(ids), BLOCK):
                places = range(start, start + BLOCK)
                block = [MASK if masked[row, copy, place] else ids[place] for place in places]
                log_probs = seen_log_probs(model, ids[:start], block)
                bound += sum(
                    weights[row, copy, place] * log_probs[place - start, ids[place]]
                    for place in places
                    if masked[row, copy, place]
                )
        is_answer = batch[2][row] != -100
        expected = torch.as_tensor(bound / len(answer)).expand(len(answer))
        torch.testing.assert_close(terms.log_probs[row][is_answer], expected, atol=1e-5, rtol=1e-5)
        assert not terms.log_probs[row][~is_answer].any()


def rolled_out(model, seed, **settings):
    """Answers with their trajectory, and the log-probabilities that the decoder committed them with."""
    torch.manual_seed(seed)
    model._never_predicted = lambda config: []  # else its probabilities are those without the mask token
    ends = list(range(25, 35))
    config = model.settle_generation_config(
        None, {"max_new_tokens": 10, "do_sample": True, "eos_token_id": ends, "threshold": 0.03, **settings}
    )
    rows = [torch.tensor(prompt) for prompt in PROMPTS]
    canvas = Canvas.lay_out([rows], 10, BLOCK, MASK)
    ids, _, _ = batch_of(PROMPTS, [[END]] * len(PROMPTS))
    decoder = model.make_decoder(
        config, None, is_done=RowEnds(torch.tensor(ends), ids[:, :-1], make_criteria(config, None))
    )
    decoder.on_step = recorder = TrajectoryRecorder(canvas)
    for _ in decoder.run(canvas):
        pass
    answers, committed = [], []
    for row in range(len(PROMPTS)):
        columns = slice(int(canvas.prompt_end[row]), int(canvas.end[row]))
        answers.append(canvas.ids[0, row, columns].tolist())
        committed.append(canvas.confidence[row, columns].log())
    assert MASK not in sum(answers, [])
    rollouts = Rollouts()
    trajectory = recorder.trajectory(MASK)
    rollouts.record([prompt + answer for prompt, answer in zip(PROMPTS, answers, strict=True)], trajectory)
    return answers, committed, rollouts, trajectory


@pytest.mark.parametrize(
    ("seed", "settings"), [(3, {"num_steps_per_block": 4}), (2, {"num_steps_per_block": 2}), (3, {"threshold": 1.0})]
)
def test_a_trace_has_the_probabilities_that_were_committed_with(seed, settings):
    """Also where an answer ends within a block, whose other tokens were seen; also in a batch of unequal rows."""
    model = tiny_model()
    model.lm_head.weight.data *= 8  # some are surer than others
    answers, committed, rollouts, trajectory = rolled_out(model, seed, **settings)
    ends_within_block = [(len(p) + len(a)) % BLOCK for p, a in zip(PROMPTS, answers, strict=True)]
    assert any(ends_within_block) and len(set(map(len, answers))) > 1
    assert trajectory.steps.max() > 0
    likelihood_of(model, "trace", rollouts)
    batch = batch_of(PROMPTS, answers)
    with torch.no_grad():
        terms = model(*batch, fused_lm_head=True)
    for row, expected in enumerate(committed):
        own = terms.log_probs[row][batch[2][row] != -100]
        torch.testing.assert_close(own, expected, atol=1e-4, rtol=1e-4)


def test_shrinkage_takes_neighbouring_steps_for_one():
    model = tiny_model()
    prompt, block = [11, 12, 13, 14], [21, 22, 23, 24]
    rollouts = Rollouts()
    rollouts.trajectories[torch.tensor(prompt + block[:3]).numpy().tobytes()] = (
        torch.tensor(prompt + block),
        torch.tensor([-1] * 4 + [2, 0, 1, 3]),
    )
    likelihood = likelihood_of(model, "trace", rollouts, trace_shrinkage=2)
    batch = batch_of([prompt], [block[:3]])
    with torch.no_grad():
        terms = model(*batch, fused_lm_head=True)
    first = seen_log_probs(model, prompt, [MASK] * 4)
    second = seen_log_probs(model, prompt, [MASK, 22, 23, MASK])
    expected = torch.stack([second[0, 21], first[1, 22], first[2, 23]])
    torch.testing.assert_close(terms.log_probs[0, 4:], expected, atol=1e-5, rtol=1e-5)
    # Two steps weigh the same, and sum to the answer's three tokens.
    assert likelihood.step_weights(*batch)[0].tolist() == [0, 0, 0, 0, 1.5, 0.75, 0.75]


def test_copies_without_a_prediction_are_left_out():
    """A block that three steps decoded costs three, whatever another took."""
    model = tiny_model()
    rollouts = Rollouts()
    ids, steps = [11, 12, 13, 14, *range(21, 29)], [-1] * 4 + [0, 1, 2, 3] + [0] * 4
    rollouts.trajectories[torch.tensor(ids).numpy().tobytes()] = torch.tensor(ids), torch.tensor(steps)
    likelihood_of(model, "trace", rollouts)
    widths = []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    with torch.no_grad():
        model(*batch_of([ids[:4]], [ids[4:]]), fused_lm_head=True)
    assert widths == [(4 + 1 + 2) * BLOCK]  # noisy ones of both blocks, and two clean ones
