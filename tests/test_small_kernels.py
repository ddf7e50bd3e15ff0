"""Starts the tests of the small operations' kernels in Triton's interpreter, where there is no GPU to run them on."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch


FILES = [
    "test_groupwise_linear.py",
    "test_normalization.py",
    "test_prefix_attention.py",
    "test_rotary.py",
    "test_router.py",
]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.skipif(torch.cuda.is_available(), reason="they run on the GPU, by themselves")
def test_in_the_interpreter():
    folder = Path(__file__).parent / "kernels"
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider"]
    finished = subprocess.run(
        command + [str(folder / file) for file in FILES],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=folder.parents[1],
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
