"""`benchmarks/gpu.py --tiny`: every section runs, on a CPU too."""

import json
import math
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[2]
# Columns without which a table would not say what it is for.
SECTIONS = {
    "machine": {"copy, TB/s read and written", "read, TB/s", "bfloat16 product, TFLOP/s", "torch", "transformers"},
    "model": {"parameters, B", "GB", "experts_implementation"},
    "first_calls": {"first, s", "second, s", "extra, s"},
    "experts": {"tokens", "experts used of 16", "by uniform choice", "GB a step reads", "floor, ms"},
    "guided": {"codes/s", "ms a forward", "floor, ms", "time / floor", "speed-up", "same codes"},
    "text": {"tokens/s", "forwards", "ms a forward", "time / floor"},
    "batches": {"codes/s", "time / floor"},
    "kernels": {"kernels a forward", "busy / wall"},
    "exactness": {"recorded", "not recorded", "with a hook", "all three off"},
    "rounding": {"hidden states, median", "logits, median", "same best id"},
    "float8": set(),
    "decoder": {"first, s", "seconds"},
    "picture": {"codes, s", "read the decoder, s", "pixels, s", "seconds", "speed-up"},
    "memory": {"weights, GB", "peak in the call, GB", "kept after it, GB", "graphs, GB"},
    "training": {"a step, s", "peak, GB", "loss"},
    "compiled_decoder": {"first, s", "seconds"},
    "small_cards": set(),  # of each row its own
    "normal_decoder": {"first, s", "seconds"},
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory, official_tiny):
    """What the command wrote to its files, and to standard output."""
    output = tmp_path_factory.mktemp("gpu") / "gpu.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--tiny", "--seconds", "1800"]
    process = subprocess.run(
        [*command, "--output", str(output), "--fixture", str(official_tiny)],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    return json.loads(output.read_text()), output.with_suffix(".md").read_text(), process.stdout, process.stderr


def test_every_section_ran(finished):
    report, _, _, progress = finished
    assert list(report["sections"]) == list(SECTIONS)
    for name, columns in SECTIONS.items():
        rows = report["sections"][name]["rows"]
        assert rows
        for row in rows:
            assert row["what"]
            if name == "float8":  # there are no such kernels for a CPU
                assert "GPU" in row["failed"]
            else:
                assert "failed" not in row, (name, row, progress)
                assert columns <= set(row), (name, row)
                assert all(math.isfinite(value) for value in row.values() if isinstance(value, float)), (name, row)


def test_no_cell_of_the_tables_is_empty(finished):
    _, markdown, printed, _ = finished
    assert markdown.strip() == printed.strip()
    assert markdown.count("## ") == len(SECTIONS)
    tables = [line for line in markdown.splitlines() if line.startswith("|")]
    assert all(cell.strip() for line in tables for cell in line.strip("|").split("|"))


def test_small_cards_are_told_what_they_ask(finished):
    rows = finished[0]["sections"]["small_cards"]["rows"]
    wanted = (
        "backbone, GB",
        "ms a forward",
        "ms a forward",
        "ms a forward",
        "peak of all on the card, GB",
        "a step, s",
    )
    assert [column in row for column, row in zip(wanted, rows, strict=True)] == [True] * 6


def test_paths_agree(finished):
    sections = finished[0]["sections"]
    for row in sections["exactness"]["rows"]:
        assert all(value is True for name, value in row.items() if name != "what"), row
    assert {row["same codes"] for row in sections["guided"]["rows"]} == {1.0}


def test_an_unknown_section_is_refused_by_name(monkeypatch, capsys):
    script = ROOT / "benchmarks" / "gpu.py"
    monkeypatch.setattr(sys, "argv", [str(script), "--tiny", "--sections", "machine,pictures"])
    monkeypatch.syspath_prepend(script.parent)
    with pytest.raises(SystemExit) as raised:
        runpy.run_path(str(script), run_name="__main__")
    assert raised.value.code == 2
    assert "no pictures" in capsys.readouterr().err
