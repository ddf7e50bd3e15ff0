"""The pipeline where there is a GPU: what is moved there, and moved there only while it computes."""

import pytest
import torch
from diffusers import DiffusionPipeline

from tests.diffusers_llada_uni.test_pipeline_llada_uni import quiet, run_all


pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def group_offload(pipe: DiffusionPipeline, offload_type: str, **settings) -> None:
    pipe.enable_group_offload(
        onload_device=torch.device("cuda"),
        offload_device=torch.device("cpu"),
        offload_type=offload_type,
        **settings,
    )


OFFLOADS = {
    "model": lambda pipe: pipe.enable_model_cpu_offload(),
    "sequential": lambda pipe: pipe.enable_sequential_cpu_offload(),
    "groups of leaves": lambda pipe: group_offload(pipe, "leaf_level"),
    "groups of leaves, a stream": lambda pipe: group_offload(pipe, "leaf_level", use_stream=True),
    "groups of blocks": lambda pipe: group_offload(pipe, "block_level", num_blocks_per_group=1),
}


@pytest.fixture(scope="module")
def reference(converted_dir):
    return run_all(loaded(converted_dir).to("cuda"))


def loaded(converted_dir) -> DiffusionPipeline:
    pipe = quiet(DiffusionPipeline.from_pretrained(converted_dir))
    pipe.processor.image_processor.editing_max_pixels = 12 * 32 * 32
    return pipe


@pytest.mark.parametrize("offload", OFFLOADS)
def test_offloading(converted_dir, reference, offload):
    pipe = loaded(converted_dir)
    OFFLOADS[offload](pipe)
    for _ in range(2):
        for ours, theirs in zip(run_all(pipe), reference, strict=True):
            if isinstance(ours, str):
                assert ours == theirs
            else:
                torch.testing.assert_close(ours.cpu(), theirs.cpu(), rtol=0, atol=1e-3)
