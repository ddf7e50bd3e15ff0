"""The wheel holds what an installed project needs."""

import shutil
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with what the wheel would install."""
    if find_spec("setuptools") is None:
        pytest.skip("setuptools is not installed")
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # building writes beside the sources
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("src", "conversion"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(folder)]
    subprocess.run([*command, str(source)], check=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "installed")
    return folder / "installed"


def test_all_sources_are_in_it(installed):
    for package in ("transformers_llada_uni", "diffusers_llada_uni", "llada_uni"):
        files = {path.relative_to(ROOT / "src") for path in (ROOT / "src" / package).rglob("*.py")}
        files |= {Path("llada_uni", path.relative_to(ROOT)) for path in ROOT.glob("conversion/*.py")}
        assert files and not [name for name in files if not (installed / name).is_file()]
        assert (installed / package / "py.typed").is_file()


def test_the_emoji_checkpoint_has_its_card_and_credit(installed):
    checkpoint = Path("diffusers_llada_uni/checkpoints/emoji")
    files = [path for path in (ROOT / "src" / checkpoint).rglob("*") if path.is_file()]
    assert files and not [path for path in files if not (installed / path.relative_to(ROOT / "src")).is_file()]
    card = (installed / checkpoint / "README.md").read_text()
    assert "license: cc-by-4.0" in card and "Twemoji" in card.split("## Credits")[1]
    metadata = next(installed.glob("*.dist-info/METADATA")).read_text()
    assert "License-Expression: Apache-2.0 AND CC-BY-4.0" in metadata


def test_the_converter_runs_from_it(installed, official_tiny, tmp_path):
    """Without the repository: also the template of the card it writes has to be there."""
    command = [
        sys.executable,
        "-m",
        "llada_uni.conversion.convert_llada_uni_checkpoint",
        str(official_tiny),
        "converted",
    ]
    subprocess.run(command, check=True, cwd=tmp_path, env={"PYTHONPATH": str(installed)}, capture_output=True)
    assert "How to use" in (tmp_path / "converted" / "README.md").read_text()
