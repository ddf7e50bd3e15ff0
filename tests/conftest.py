import gc
import os
from pathlib import Path

import pytest
import torch


ROOT = Path(__file__).resolve().parents[1]
# Two workers (see pyproject.toml) share two cores, and the models are tiny.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)
gc.disable()  # until all is imported


@pytest.fixture(scope="session")
def official_tiny() -> Path:
    """A tiny checkpoint in the released layout, with what the released code computes from it under `expected/`."""
    return ROOT / "tests" / "fixtures" / "official_tiny"


@pytest.fixture(scope="session")
def converted_dir(official_tiny, tmp_path_factory) -> Path:
    """`official_tiny` as a pipeline."""
    from llada_uni.conversion.convert_llada_uni_checkpoint import convert_to_diffusers  # of what few tests need

    return convert_to_diffusers(official_tiny, tmp_path_factory.mktemp("converted") / "llada-uni-tiny", progress=False)


@pytest.fixture(scope="session")
def text_only(official_tiny, tmp_path_factory) -> Path:
    """A tiny LLaDA2.1-mini as it lies on the Hub; see `tests/text_only.py`."""
    from tests.text_only import write_text_only  # of what few tests need

    return write_text_only(tmp_path_factory.mktemp("text_only") / "LLaDA2.1-mini", official_tiny)


@pytest.fixture(scope="session")
def ling(official_tiny, tmp_path_factory) -> Path:
    """A tiny Ling-mini-2.0 as it lies on the Hub."""
    from tests.text_only import write_ling

    return write_ling(tmp_path_factory.mktemp("ling") / "Ling-mini-2.0", official_tiny)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # The longest first: at the end one worker would wait for the other.
    items.sort(key=lambda item: "test_documentation" not in item.nodeid)


def pytest_collection_finish() -> None:
    """What is imported stays. To look through it again takes most of a second, and each training asks for that."""
    gc.freeze()
    gc.enable()
