"""What the tests of the objective share."""

import torch

from tests.transformers_llada_uni.training.training_common import BLOCK, tiny_model
from transformers_llada_uni.training.objective.block_diffusion import add_block_diffusion_head


# Two documents and padding; prompts of 5 and 3 tokens.
DOCUMENTS = torch.tensor([[0] * 12 + [1] * 8 + [-1] * 4, [0] * 8 + [1] * 16])
TARGETS = torch.zeros(2, 24, dtype=torch.bool)
TARGETS[0, 5:12] = TARGETS[0, 15:20] = TARGETS[1, 6:8] = TARGETS[1, 17:24] = True


def batch(seed=0):
    input_ids = torch.randint(0, 59, (2, 24), generator=torch.Generator().manual_seed(seed))
    return input_ids, input_ids.masked_fill(~TARGETS, -100)


def draw(noise, labels, seed=0, documents=DOCUMENTS):
    return noise.sample(labels, documents, BLOCK, torch.Generator().manual_seed(seed))


def headed_model(attn_implementation="sdpa"):
    model = tiny_model(attn_implementation=attn_implementation)
    add_block_diffusion_head(model)
    return model


def of_documents(model, input_ids, labels, masked, weights):
    """The outputs of the objective."""
    return model(
        input_ids=input_ids,
        labels=labels,
        document_ids=DOCUMENTS,
        masked=masked,
        weights=weights,
        fused_lm_head=True,
    )
