"""Starts the tests of the kernels in Triton's interpreter, where there is no GPU, and their benchmark."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch


FILES = [
    "test_experts_triton.py",
    "test_groupwise_linear.py",
    "test_normalization.py",
    "test_prefix_attention.py",
    "test_rotary.py",
    "test_router.py",
]
ROOT = Path(__file__).resolve().parents[3]
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def run(*arguments: str) -> None:
    finished = subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="they run on the GPU, by themselves")
def test_in_the_interpreter():
    files = [str(Path(__file__).with_name(file)) for file in FILES]
    run("-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", *files)


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton 3.6, which torch for GPUs comes with, interprets less")
def test_benchmark_in_the_interpreter(tmp_path):
    run("benchmarks/experts_gpu.py", "--tiny", "--output", str(tmp_path / "figures.json"))
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["errors"].keys() >= {f"{kind} torch.float32" for kind in ("plain", "float8", "int8", "int4")}
    errors = [*figures["errors"].values(), *(tile["error"] for tile in figures["tiles"])]
    assert max(errors) < 1e-6
    assert {(row["kind"], row["tokens"]) for row in figures["comparison"]} == {("plain", 4), ("plain", 9), ("int4", 4)}
