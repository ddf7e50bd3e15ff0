import os
from pathlib import Path

import pytest
import torch


ROOT = Path(__file__).resolve().parents[1]
# Two workers (see pyproject.toml) share two cores, and the models are tiny.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def official_tiny() -> Path:
    """A tiny checkpoint in the released layout, with what the released code computes from it under `expected/`."""
    return ROOT / "tests" / "fixtures" / "official_tiny"


@pytest.fixture(scope="session")
def converted_dir(official_tiny, tmp_path_factory) -> Path:
    """`official_tiny` as a pipeline."""
    from llada_uni.conversion.convert_llada_uni_checkpoint import convert_to_diffusers  # of what few tests need

    return convert_to_diffusers(official_tiny, tmp_path_factory.mktemp("converted") / "llada-uni-tiny", progress=False)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # The longest first: at the end one worker would wait for the other.
    items.sort(key=lambda item: "test_documentation" not in item.nodeid)
