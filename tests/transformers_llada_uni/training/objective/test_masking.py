"""The mask of training, cell by cell."""

import itertools

import pytest
import torch

from tests.common import uncompiled
from tests.transformers_llada_uni.training.objective.objective_common import DOCUMENTS
from tests.transformers_llada_uni.training.training_common import BLOCK
from transformers_llada_uni import LLaDA2MoeConfig
from transformers_llada_uni.training.objective.masking import create_noisy_clean_mask, positions_of


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager", "flex_attention"])
def test_mask_equals_the_three_pieces_written_out(attn_implementation):
    """[noisy ; clean] of two documents: block-diagonal, offset block-causal and block-causal, cell by cell."""
    config = LLaDA2MoeConfig()
    config._attn_implementation = attn_implementation
    documents = DOCUMENTS[:1].repeat(1, 2)
    positions = positions_of(DOCUMENTS[:1])
    blocks = (positions // BLOCK).repeat(1, 2)
    copies = torch.tensor([[0] * 24 + [1] * 24])
    with uncompiled():
        mask = create_noisy_clean_mask(config, copies, blocks, documents, clean_copy=1, dtype=torch.float32)

    literal = torch.zeros(48, 48, dtype=torch.bool)
    for q, k in itertools.product(range(48), repeat=2):
        q_place, k_place = q % 24, k % 24
        if DOCUMENTS[0, q_place] != DOCUMENTS[0, k_place]:
            continue
        q_block, k_block = int(positions[0, q_place]) // BLOCK, int(positions[0, k_place]) // BLOCK
        q_noisy, k_noisy = q < 24, k < 24
        block_diagonal = q_noisy and k_noisy and q_block == k_block
        offset_block_causal = q_noisy and not k_noisy and k_block < q_block
        block_causal = not q_noisy and not k_noisy and k_block <= q_block
        literal[q, k] = block_diagonal or offset_block_causal or block_causal

    if attn_implementation == "eager":
        mask = mask == 0
    elif attn_implementation == "flex_attention":
        queries, keys = torch.meshgrid(torch.arange(48), torch.arange(48), indexing="ij")
        mask = mask.mask_mod(torch.tensor(0), torch.tensor(0), queries, keys)[None, None]
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
