"""Attention of one document at a time against attention under a mask."""

import torch
import torch.nn.functional as F

from tests.transformers_llada_uni.training.objective.objective_common import batch, draw, headed_model, of_documents
from transformers_llada_uni import document_attention
from transformers_llada_uni.document_attention import PackedDocuments, attention_within_documents
from transformers_llada_uni.training.objective.noise import BlockDiffusionNoise


def states(num_heads, batch_size=2, length=9):
    generator = torch.Generator().manual_seed(num_heads)
    return torch.randn(batch_size, num_heads, length, 8, generator=generator, dtype=torch.float64).requires_grad_()


def test_documents_alone_give_what_the_mask_gives():
    """Also where a document's tokens lie apart, numbers come again in another row, and the mask hides more."""
    document_ids = torch.tensor([[5, 5, 0, 0, 0, 5, 5, -1, -1], [0, 0, 0, 0, 7, 7, 7, 7, 5]])
    mask = (document_ids[:, None] == document_ids[:, :, None])[:, None]
    mask &= torch.ones(9, 9, dtype=torch.bool).tril(2)
    documents = PackedDocuments.of(document_ids, mask)
    assert sorted(documents.lengths) == [1, 2, 3, 4, 4, 4]
    query, key, value = states(4), states(2), states(1).expand(-1, 2, -1, -1)
    found = attention_within_documents(query, key, value, documents, scaling=0.3)
    wanted = F.scaled_dot_product_attention(query, key, value, mask, scale=0.3, enable_gqa=True).transpose(1, 2)
    torch.testing.assert_close(found, wanted)
    towards = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for ours, theirs in zip(
        torch.autograd.grad(found, (query, key), towards),
        torch.autograd.grad(wanted, (query, key), towards),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


def test_training_computes_no_attention_between_documents(monkeypatch):
    model = headed_model()
    input_ids, labels = batch()
    masked, weights = draw(BlockDiffusionNoise(), labels)
    lengths = []
    attend = F.scaled_dot_product_attention

    def noted(query, key, value, **settings):
        assert len(query) == len(key) == 1 and query.shape[-2] == key.shape[-2]
        lengths.append(query.shape[-2])
        return attend(query, key, value, **settings)

    monkeypatch.setattr(document_attention.F, "scaled_dot_product_attention", noted)
    of_documents(model, input_ids, labels, masked, weights)
    of_layer = lengths[: len(lengths) // model.config.num_hidden_layers]
    assert lengths == of_layer * model.config.num_hidden_layers
    # Row 0 has documents of 12 and 8 tokens, row 1 of 8 and 16, in blocks of 4: of each the noisy blocks with targets
    # (2 and 2, 1 and 2), and the clean ones before the last of these (2 and 1, 1 and 3).
    assert sorted(of_layer) == [8, 12, 16, 20]
