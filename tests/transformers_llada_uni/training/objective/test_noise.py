"""Noise and its weights against their literal definitions."""

import itertools
from types import SimpleNamespace

import pytest
import torch

from tests.transformers_llada_uni.training.objective.objective_common import DOCUMENTS, TARGETS, batch, draw
from tests.transformers_llada_uni.training.training_common import BLOCK
from transformers_llada_uni.training.objective.masking import positions_of
from transformers_llada_uni.training.objective.noise import BlockDiffusionNoise, NoiseStream


@pytest.mark.parametrize("noise_level", ["block", "sample"])
@pytest.mark.parametrize("weighting", ["inverse", "none"])
def test_prompt_and_padding_are_never_masked(noise_level, weighting):
    _, labels = batch()
    noise = BlockDiffusionNoise((0.9, 1.0), noise_level, weighting, complementary=True, num_noise_samples=3)
    masked, weights = draw(noise, labels)
    assert masked.shape == weights.shape == (2, 6, 24)
    assert not masked[~TARGETS[:, None].expand_as(masked)].any()
    assert torch.equal(weights > 0, masked)


@pytest.mark.parametrize("noise_level", ["block", "sample"])
def test_complementary_masks_cover_every_target_once(noise_level):
    _, labels = batch()
    noise = BlockDiffusionNoise(noise_level=noise_level, complementary=True, num_noise_samples=2)
    masked, _ = draw(noise, labels)
    pairs = masked.view(2, 2, 2, 24)  # [b, pair member, s, l]
    assert torch.equal(pairs.sum(dim=1), TARGETS[:, None].expand(2, 2, 24).long())


@pytest.mark.parametrize("complementary", [False, True])
@pytest.mark.parametrize("noise_range", [(1e-3, 1.0), (0.3, 0.8)])
@pytest.mark.parametrize("weighting", ["inverse", "none"])
@pytest.mark.parametrize("image_noise", ["linear", "cosine"])
def test_expected_weight_is_one(weighting, noise_range, complementary, image_noise):
    """And the expected share of masked tokens is what it is said to be: of words (0) and of image codes (7)."""
    labels = 7 * (torch.arange(400_000)[None] % 2)
    further = {"image_noise": image_noise, "image_token_offset": 5}
    noise = BlockDiffusionNoise(noise_range, "block", weighting, complementary, num_noise_samples=2, **further)
    masked, weights = noise.sample(labels, None, 1, torch.Generator().manual_seed(0))
    for kind in (0, 7):
        is_kind = labels[0] == kind
        assert weights.sum(dim=1)[:, is_kind].mean().item() == pytest.approx(1.0, abs=0.02)
        share = masked[:, :, is_kind].float().mean().item()
        assert share == pytest.approx(noise.masked_share(labels)[0, is_kind][0].item(), abs=0.005)
    if image_noise == "cosine" and not complementary:
        assert masked[:, :, 1::2].float().mean() > masked[:, :, ::2].float().mean() + 0.05


def test_weights_are_one_over_the_level():
    """With one level a document, its masked tokens weigh the same, and 1/t fits the share that is masked."""
    labels = torch.zeros(1, 40_000, dtype=torch.long)
    masked, weights = BlockDiffusionNoise(noise_level="sample").sample(
        labels, None, 4, torch.Generator().manual_seed(5)
    )
    level = 1 / weights[masked]
    assert level.unique().numel() == 1
    assert masked.float().mean().item() == pytest.approx(level[0].item(), abs=0.01)


def test_no_weighting_with_complements_is_the_plain_mean():
    _, labels = batch()
    _, weights = draw(BlockDiffusionNoise(weighting="none", complementary=True, num_noise_samples=4), labels)
    torch.testing.assert_close(weights.sum(dim=1), TARGETS.float())


@pytest.mark.parametrize("noise_level", ["block", "sample"])
def test_levels_belong_to_blocks_or_documents(noise_level):
    _, labels = batch()
    labels = labels.masked_fill(labels == -100, 0)  # all tokens, for many levels
    masked, weights = draw(BlockDiffusionNoise((0.5, 1.0), noise_level), labels)
    blocks = positions_of(DOCUMENTS) // BLOCK if noise_level == "block" else torch.zeros_like(DOCUMENTS)
    levels = []
    for row, document, block in itertools.product(range(2), range(2), range(4)):
        own = masked[row, 0] & (DOCUMENTS[row] == document) & (blocks[row] == block)
        if own.any():
            assert weights[row, 0][own].unique().numel() == 1
            levels.append(weights[row, 0][own][0].item())
    assert len(set(levels)) == len(levels) == (11 if noise_level == "block" else 4)


def test_levels_are_stratified_over_samples():
    labels = torch.zeros(1, 4000, dtype=torch.long)
    noise = BlockDiffusionNoise((0.2, 1.0), "sample", num_noise_samples=4)
    masked, weights = noise.sample(labels, None, 4, torch.Generator().manual_seed(1))
    levels = [1 / (4 * weights[0, copy][masked[0, copy]][0].item()) for copy in range(4)]
    assert [int((level - 0.2) / 0.2) for level in levels] == [0, 1, 2, 3]


def test_blocks_of_a_document_are_counted_from_its_begin():
    """Documents that are not whole blocks long: levels change where the document's blocks change."""
    documents = torch.tensor([[0] * 6 + [1] * 6])
    labels = torch.zeros(1, 12, dtype=torch.long)
    seen = set()
    for seed in range(40):
        masked, weights = draw(BlockDiffusionNoise((0.5, 1.0)), labels, seed, documents)
        level = weights[0, 0].masked_fill(~masked[0, 0], float("nan"))
        for i, j in itertools.combinations(range(12), 2):
            if level[i] == level[j]:
                seen.add((i, j))
    groups = [range(0, 4), range(4, 6), range(6, 10), range(10, 12)]
    assert seen == {pair for group in groups for pair in itertools.combinations(group, 2)}


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"noise_range": (0.5, 0.2)}, "noise_range"),
        ({"noise_range": (-0.1, 0.2)}, "noise_range"),
        ({"noise_range": (0.1, 1.2)}, "noise_range"),
        ({"noise_range": 0.5}, "noise_range"),
        ({"noise_level": "token"}, "noise_level"),
        ({"weighting": "linear"}, "weighting"),
        ({"num_noise_samples": 0}, "num_noise_samples"),
    ],
)
def test_bad_noise_is_refused(settings, name):
    with pytest.raises(ValueError, match=f"`{name}`"):
        BlockDiffusionNoise(**settings)


def test_a_rows_noise_does_not_depend_on_companions_or_padding():
    _, labels = batch()
    noise = BlockDiffusionNoise(complementary=True, num_noise_samples=2)
    generators = lambda rows: [torch.Generator().manual_seed(row) for row in rows]  # noqa: E731
    masked, weights = noise.sample(labels, DOCUMENTS, BLOCK, generators([0, 1]))
    own_masked, own_weights = noise.sample(labels[:1, :20], DOCUMENTS[:1, :20], BLOCK, generators([0]))
    assert torch.equal(own_masked[0], masked[0, :, :20]) and torch.equal(own_weights[0], weights[0, :, :20])


def trainer(seed=1, step=0, process=0, num_processes=1, is_training=True):
    """What [`NoiseStream`] looks at."""
    return SimpleNamespace(
        args=SimpleNamespace(seed=seed, process_index=process, world_size=num_processes),
        state=SimpleNamespace(global_step=step),
        model=SimpleNamespace(training=is_training),
        get_tp_size=lambda: 1,
    )


def draws(stream, *calls):
    """The first number of every row's generator; `calls` are pairs of a trainer and a number of rows."""
    stream.on_step_begin(None, None, None)
    generators = [generator for one, num_rows in calls for generator in stream.generators(one, num_rows)]
    return [torch.rand((), generator=generator).item() for generator in generators]


def test_noise_stream_depends_on_seed_step_row_and_mode_only():
    stream = NoiseStream()
    first = draws(stream, (trainer(), 4))
    assert len(set(first)) == 4
    assert draws(stream, (trainer(), 4)) == first == draws(NoiseStream(), (trainer(), 4))
    others = [trainer(seed=2), trainer(step=1), trainer(is_training=False)]
    assert len({*first, *(number for other in others for number in draws(stream, (other, 4)))}) == 16


def test_noise_stream_is_the_same_however_a_step_is_split():
    whole = draws(NoiseStream(), (trainer(), 8))
    assert draws(NoiseStream(), (trainer(), 4), (trainer(), 4)) == whole
    first, second = (draws(NoiseStream(), *[(trainer(process=p, num_processes=2), 2)] * 2) for p in (0, 1))
    assert [*first[:2], *second[:2], *first[2:], *second[2:]] == whole


def test_evaluation_draws_the_same_noise_every_time():
    stream = NoiseStream()
    results = []
    for step in (3, 9):
        results.append(draws(stream, (trainer(step=step, is_training=False), 2)))
        stream.on_evaluate(None, None, None)
    assert results[0] == results[1]
