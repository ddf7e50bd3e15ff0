"""`benchmarks/serving.py`: the real server, few clients; it loses nothing, and says so."""

import subprocess
import sys
from pathlib import Path


ROOT = Path(__file__).resolve().parents[2]


def test_it_compares_and_soaks():
    command = [sys.executable, "benchmarks/serving.py", "--kinds", "text", "drawings", "--clients", "3"]
    command += ["--different", "1", "--rounds", "1", "--soak", "3", "--seconds", "120"]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    header, _, *rows, _, memory, soaked = process.stdout.strip().splitlines()
    assert [row.split(" | ")[0] for row in rows] == ["| text", "| drawings"]
    for row in rows:
        assert len(row.split("|")) == len(header.split("|"))
        *_, asked, lost, different, _ = (cell.strip() for cell in row.split("|"))
        assert (asked, lost, different) == ("3", "0", "0")
    assert len(memory.split(":")[1].split()) == 3
    assert soaked.startswith("3 requests in ") and soaked.endswith(", 0 lost")
