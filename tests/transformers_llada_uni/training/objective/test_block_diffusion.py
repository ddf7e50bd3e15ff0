"""Noise, mask and objective against their literal definitions."""

import itertools
from types import SimpleNamespace

import pytest
import torch

from tests.transformers_llada_uni.training.training_common import BLOCK, tiny_model
from transformers_llada_uni import LLaDA2MoeConfig
from transformers_llada_uni.training.objective.block_diffusion import (
    add_block_diffusion_head,
    columns_of_pass,
    document_ids_of,
)
from transformers_llada_uni.training.objective.masking import create_noisy_clean_mask, positions_of
from transformers_llada_uni.training.objective.noise import BlockDiffusionNoise, NoiseStream


# Two documents and padding; prompts of 5 and 3 tokens.
DOCUMENTS = torch.tensor([[0] * 12 + [1] * 8 + [-1] * 4, [0] * 8 + [1] * 16])
TARGETS = torch.zeros(2, 24, dtype=torch.bool)
TARGETS[0, 5:12] = TARGETS[0, 15:20] = TARGETS[1, 6:8] = TARGETS[1, 17:24] = True


def headed_model(attn_implementation="sdpa"):
    model = tiny_model(attn_implementation=attn_implementation)
    add_block_diffusion_head(model)
    return model


def batch(seed=0):
    input_ids = torch.randint(0, 59, (2, 24), generator=torch.Generator().manual_seed(seed))
    return input_ids, input_ids.masked_fill(~TARGETS, -100)


def draw(noise, labels, seed=0, documents=DOCUMENTS):
    return noise.sample(labels, documents, BLOCK, torch.Generator().manual_seed(seed))


def log_probs_by_hand(model, input_ids, labels, documents, masked, weights):
    """Every document, block and copy with a forward of its own: clean blocks before it, then the noisy block."""
    result = torch.zeros(input_ids.shape)
    for row, document in itertools.product(range(input_ids.shape[0]), range(int(documents.max()) + 1)):
        places = (documents[row] == document).nonzero().flatten().tolist()
        for begin, copy in itertools.product(range(0, len(places), BLOCK), range(masked.shape[1])):
            seen, block = places[: begin + BLOCK], places[begin : begin + BLOCK]
            ids = input_ids[row, seen].clone()
            hidden = [i for i, place in enumerate(seen) if place in block and masked[row, copy, place]]
            ids[hidden] = model.config.mask_token_id
            log_probs = model(input_ids=ids[None]).logits[0].log_softmax(dim=-1)
            for i in hidden:
                place = seen[i]
                result[row, place] = result[row, place] + weights[row, copy, place] * log_probs[i, labels[row, place]]
    return result


# Noise


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
def test_expected_weight_is_one(weighting, noise_range, complementary):
    labels = torch.zeros(1, 200_000, dtype=torch.long)
    noise = BlockDiffusionNoise(noise_range, "block", weighting, complementary, num_noise_samples=2)
    _, weights = noise.sample(labels, None, 1, torch.Generator().manual_seed(0))
    assert weights.sum(dim=1).mean().item() == pytest.approx(1.0, abs=0.02)


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


# Mask


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager", "flex_attention"])
def test_mask_equals_the_three_pieces_written_out(attn_implementation):
    """[noisy ; clean] of two documents: block-diagonal, offset block-causal and block-causal, cell by cell."""
    config = LLaDA2MoeConfig()
    config._attn_implementation = attn_implementation
    documents = DOCUMENTS[:1].repeat(1, 2)
    positions = positions_of(DOCUMENTS[:1])
    blocks = (positions // BLOCK).repeat(1, 2)
    copies = torch.tensor([[0] * 24 + [1] * 24])
    mask = create_noisy_clean_mask(config, copies, blocks, documents, clean_copy=1, dtype=torch.float32)

    literal = torch.zeros(48, 48, dtype=torch.bool)
    for q, k in itertools.product(range(48), repeat=2):
        q_column, k_column = q % 24, k % 24
        if DOCUMENTS[0, q_column] != DOCUMENTS[0, k_column]:
            continue
        q_block, k_block = int(positions[0, q_column]) // BLOCK, int(positions[0, k_column]) // BLOCK
        q_noisy, k_noisy = q < 24, k < 24
        block_diagonal = q_noisy and k_noisy and q_block == k_block
        offset_block_causal = q_noisy and not k_noisy and k_block < q_block
        block_causal = not q_noisy and not k_noisy and k_block <= q_block
        literal[q, k] = block_diagonal or offset_block_causal or block_causal

    if attn_implementation == "eager":
        mask = mask == 0
    elif attn_implementation == "flex_attention":
        rows, columns = torch.meshgrid(torch.arange(48), torch.arange(48), indexing="ij")
        mask = mask.mask_mod(torch.tensor(0), torch.tensor(0), rows, columns)[None, None]
    assert torch.equal(mask[0, 0], literal)


def test_copies_do_not_see_each_other():
    config = LLaDA2MoeConfig()
    config._attn_implementation = "sdpa"
    copies = torch.tensor([[0] * 4 + [1] * 4 + [2] * 4])
    same = torch.zeros(1, 12, dtype=torch.long)
    mask = create_noisy_clean_mask(config, copies, same, same, clean_copy=2, dtype=torch.float32)
    assert torch.equal(mask[0, 0], torch.block_diag(*[torch.ones(4, 4)] * 3).bool())


def test_flash_attention_is_refused():
    config = LLaDA2MoeConfig()
    config._attn_implementation = "flash_attention_2"
    same = torch.zeros(1, 4, dtype=torch.long)
    with pytest.raises(ValueError, match="attn_implementation"):
        create_noisy_clean_mask(config, same, same, same, 1, torch.float32)


def test_documents_from_what_collators_give():
    labels = torch.zeros(1, 6, dtype=torch.long)
    assert document_ids_of(labels).tolist() == [[0] * 6]
    attention_mask = torch.tensor([[1, 1, 1, 1, 0, 0]])
    assert document_ids_of(labels, attention_mask).tolist() == [[0, 0, 0, 0, -1, -1]]
    position_ids = torch.tensor([[0, 1, 2, 0, 1, 0]])
    assert document_ids_of(labels, position_ids=position_ids).tolist() == [[0, 0, 0, 1, 1, 2]]


def test_only_blocks_that_are_needed_are_computed():
    labels = torch.full((2, 20), -100)
    labels[0, 5] = labels[0, 9] = labels[0, 14] = labels[1, 2] = 1
    document_ids = torch.tensor([[3] * 12 + [7] * 8, [0] * 12 + [-1] * 8])
    columns, copies, is_real = columns_of_pass(labels, document_ids, 2, BLOCK)
    # The last block that is noised sees those before it; the second document and the second row have only one.
    noised, seen = [4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15], [0, 1, 2, 3, 4, 5, 6, 7]
    assert columns[0].tolist() == noised + noised + seen and bool(is_real[0].all())
    assert copies[0].tolist() == [0] * 12 + [1] * 12 + [2] * 8
    assert columns[1][is_real[1]].tolist() == [0, 1, 2, 3] * 2
    assert copies[1][is_real[1]].tolist() == [0] * 4 + [1] * 4


# Objective


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "noise",
    [
        BlockDiffusionNoise(),
        BlockDiffusionNoise(noise_level="sample", weighting="none"),
        BlockDiffusionNoise(complementary=True, num_noise_samples=2),
    ],
)
def test_log_probs_equal_single_forwards(noise, attn_implementation):
    model = headed_model(attn_implementation)
    input_ids, labels = batch()
    masked, weights = draw(noise, labels)
    with torch.no_grad():
        outputs = model(
            input_ids=input_ids,
            labels=labels,
            document_ids=DOCUMENTS,
            masked=masked,
            weights=weights,
            fused_lm_head=True,
        )
        expected = log_probs_by_hand(model, input_ids, labels, DOCUMENTS, masked, weights)
    assert expected.abs().sum() > 0
    torch.testing.assert_close(outputs.log_probs, expected, atol=2e-5, rtol=2e-5)
    assert torch.equal(outputs.label_mask, TARGETS)


def test_gradient_equals_that_of_single_forwards():
    input_ids, labels = batch()
    masked, weights = draw(BlockDiffusionNoise(complementary=True), labels)
    gradients = []
    for by_hand in (False, True):
        model = headed_model()
        if by_hand:
            log_probs = log_probs_by_hand(model, input_ids, labels, DOCUMENTS, masked, weights)
        else:
            log_probs = model(
                input_ids=input_ids,
                labels=labels,
                document_ids=DOCUMENTS,
                masked=masked,
                weights=weights,
                fused_lm_head=True,
            ).log_probs
        log_probs.sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) > 10
    for name, gradient in gradients[1].items():
        torch.testing.assert_close(gradients[0][name], gradient, atol=1e-4, rtol=1e-4, msg=name)


def test_flex_attention_gives_the_loss_of_sdpa():
    input_ids, labels = batch()
    masked, weights = draw(BlockDiffusionNoise(complementary=True), labels)
    results = []
    for attn_implementation in ("sdpa", "flex_attention"):
        with torch.no_grad():
            outputs = headed_model(attn_implementation)(
                input_ids=input_ids,
                labels=labels,
                document_ids=DOCUMENTS,
                masked=masked,
                weights=weights,
                fused_lm_head=True,
            )
        results.append(outputs.log_probs)
    torch.testing.assert_close(results[0], results[1], atol=2e-5, rtol=2e-5)


def test_packed_documents_equal_documents_alone():
    model = headed_model()
    input_ids, labels = batch()
    masked, weights = draw(BlockDiffusionNoise(), labels)
    terms = {"masked": masked, "weights": weights, "fused_lm_head": True}
    with torch.no_grad():
        packed = model(input_ids=input_ids, labels=labels, document_ids=DOCUMENTS, **terms).log_probs
        for row, document in [(0, 0), (0, 1), (1, 0), (1, 1)]:
            own = DOCUMENTS[row] == document
            alone = model(
                input_ids=input_ids[row, own][None],
                labels=labels[row, own][None],
                masked=masked[row, :, own][None],
                weights=weights[row, :, own][None],
                fused_lm_head=True,
            ).log_probs
            torch.testing.assert_close(packed[row, own], alone[0], atol=2e-5, rtol=2e-5)


def test_accuracy_and_entropy_are_those_of_the_predictions():
    model = headed_model()
    input_ids, labels = batch()
    masked, weights = TARGETS[:, None].repeat(1, 2, 1), TARGETS[:, None].repeat(1, 2, 1) / 2
    with torch.no_grad():
        document = DOCUMENTS[:1, :12]
        own = {"labels": labels[:1, :12], "masked": masked[:1, :, :12], "weights": weights[:1, :, :12]}
        outputs = model(input_ids=input_ids[:1, :12], document_ids=document, **own, fused_lm_head=True)
        hidden = input_ids[:1, :12].clone()
        hidden[:, 8:] = model.config.mask_token_id
        log_probs = model(input_ids=hidden).logits[0, 8:].log_softmax(dim=-1)
    entropy = -(log_probs.exp() * log_probs).sum(dim=-1)
    torch.testing.assert_close(outputs.entropy[0, 8:], entropy, atol=1e-5, rtol=1e-5)
    assert torch.equal(outputs.is_top1[0, 8:], (log_probs.argmax(dim=-1) == input_ids[0, 8:12]).float())
    assert outputs.log_probs[0, :5].abs().sum() == 0


def test_nothing_masked_gives_a_zero_that_can_be_differentiated():
    model = headed_model()
    input_ids, labels = batch()
    nothing = torch.zeros(2, 1, 24, dtype=torch.bool)
    outputs = model(input_ids=input_ids, labels=labels, masked=nothing, weights=nothing.float(), fused_lm_head=True)
    outputs.log_probs.sum().backward()
    assert outputs.log_probs.abs().sum() == 0
    assert all(p.grad is None or p.grad.abs().sum() == 0 for p in model.parameters())


def test_gradient_checkpointing_changes_nothing():
    input_ids, labels = batch()
    masked, weights = draw(BlockDiffusionNoise(), labels)
    norms = []
    for checkpointing in (False, True):
        model = headed_model().train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        outputs = model(input_ids=input_ids, labels=labels, masked=masked, weights=weights, fused_lm_head=True)
        outputs.log_probs.sum().backward()
        norms.append(torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]))
    torch.testing.assert_close(norms[0], norms[1])


def test_the_plain_forward_is_left_alone():
    model = headed_model()
    input_ids, labels = batch()
    outputs = model(input_ids=input_ids, labels=labels)
    assert outputs.logits.shape == (2, 24, 61) and outputs.loss.ndim == 0
    assert model.generate(input_ids[:1], max_new_tokens=4, block_length=4).shape == (1, 28)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"labels": torch.zeros(2, 23, dtype=torch.long)}, "labels"),
        ({"masked": torch.zeros(2, 24, dtype=torch.bool)}, "masked"),
        ({"masked": None}, "masked"),
        ({"weights": torch.zeros(2, 3, 24)}, "weights"),
        ({"document_ids": torch.zeros(2, 12, dtype=torch.long)}, "document_ids"),
        ({"block_length": 0}, "block_length"),
        ({"input_ids": torch.zeros(24, dtype=torch.long)}, "input_ids"),
    ],
)
def test_bad_input_is_refused(change, name):
    input_ids, labels = batch()
    masked, weights = draw(BlockDiffusionNoise(), labels)
    call = {"input_ids": input_ids, "labels": labels, "masked": masked, "weights": weights, **change}
    with pytest.raises((ValueError, TypeError), match=f"`{name}`"):
        headed_model()(**call, fused_lm_head=True)
