from pathlib import Path

import pytest

from tests.conversion.conversion_common import copy_released


@pytest.fixture
def released(official_tiny, tmp_path) -> Path:
    return copy_released(official_tiny, tmp_path / "released")
