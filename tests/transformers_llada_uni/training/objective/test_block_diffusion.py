"""The objective against forwards of single blocks."""

import itertools

import pytest
import torch

from tests.transformers_llada_uni.training.objective.objective_common import (
    DOCUMENTS,
    TARGETS,
    batch,
    draw,
    headed_model,
    of_documents,
)
from tests.transformers_llada_uni.training.training_common import BLOCK
from transformers_llada_uni.training.objective.block_diffusion import document_ids_of, tokens_of_pass
from transformers_llada_uni.training.objective.noise import BlockDiffusionNoise


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
    columns, copies, is_real = tokens_of_pass(labels, document_ids, 2, BLOCK)
    # The last block that is noised sees those before it; the second document and the second row have only one.
    noised, seen = [4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15], [0, 1, 2, 3, 4, 5, 6, 7]
    assert columns[0].tolist() == noised + noised + seen and bool(is_real[0].all())
    assert copies[0].tolist() == [0] * 12 + [1] * 12 + [2] * 8
    assert columns[1][is_real[1]].tolist() == [0, 1, 2, 3] * 2
    assert copies[1][is_real[1]].tolist() == [0] * 4 + [1] * 4


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
        outputs = of_documents(model, input_ids, labels, masked, weights)
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
            log_probs = of_documents(model, input_ids, labels, masked, weights).log_probs
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
            outputs = of_documents(headed_model(attn_implementation), input_ids, labels, masked, weights)
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
