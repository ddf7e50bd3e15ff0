import pytest
import torch
from PIL import Image

import comfyui

from ..conftest import ROOT
from . import stand_in


@pytest.fixture(scope="session")
def session_host(tmp_path_factory):
    host = stand_in.Host(tmp_path_factory.mktemp("ComfyUI") / "models")
    stand_in.install(host)
    comfyui.register_model_folder()
    yield host
    stand_in.remove()


@pytest.fixture
def host(session_host):
    """ComfyUI, as it is after its start."""
    session_host.reset()
    yield session_host
    session_host.reset()


@pytest.fixture(scope="session")
def model(session_host):
    """What the loader gives for the emoji model."""
    return comfyui.LLaDAUniLoader().load("emoji", "auto", "none", "all")[0]


@pytest.fixture(scope="session")
def image() -> torch.Tensor:
    """A waving hand as ComfyUI's `IMAGE`, (1, height, width, 3)."""
    with Image.open(ROOT / "examples/emoji/pictures/waving_hand.png") as picture:
        pixels = bytearray(picture.convert("RGB").tobytes())
        return torch.frombuffer(pixels, dtype=torch.uint8).view(1, picture.height, picture.width, 3) / 255
