"""
Every fenced block of the documents runs as it is printed; what the documents name, exists.

The blocks run in a directory like the reader's: the repository, `llada-uni` (the emoji model in place of the released
one), and some images and data. `llada-uni train` stops after one step there.
"""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest
from PIL import Image

from diffusers_llada_uni import embedded_checkpoint
from llada_uni.conversion.convert_llada_uni_checkpoint import convert_to_released, make_model_card

from .documentation import blocks_of, sections_of


ROOT = Path(__file__).resolve().parents[1]
EMOJI_CARD = "src/diffusers_llada_uni/checkpoints/emoji/README.md"
DOCUMENTS = ["README.md", "CONTRIBUTING.md", "docs/training.md", "docs/performance.md", EMOJI_CARD]
CONVERTED_CARD = "the card of a converted checkpoint"
MOST_NOT_RUN = 4
RELEASED = "path/to/LLaDA2.0-Uni"

# The command of the reader, stopped after one step
COMMAND = """#!/usr/bin/env bash
if [ "$1" = train ]; then set -- "$@" --max_steps 1; fi
if [ "${{2-}}" = grpo ]; then set -- "$@" --max_completion_length 32; fi
exec "{python}" -m llada_uni.cli "$@"
"""


def text_of(document: str) -> str:
    if document == CONVERTED_CARD:
        return str(make_model_card("llada-uni", ["turbo", "normal"], "bfloat16"))
    return (ROOT / document).read_text()


def write_rows(folder: Path, rows: list[dict]) -> None:
    folder.mkdir(parents=True)
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_images(folder: Path, captions: list[str | None]) -> None:
    """What `load_dataset` reads as images, with a column `caption` where there are any."""
    folder.mkdir(parents=True)
    names = [f"{number}.png" for number in range(len(captions))]
    for name, color in zip(names, ("red", "green", "blue", "yellow"), strict=True):
        Image.new("RGB", (64, 64), color).save(folder / name)
    if captions[0] is not None:
        rows = [{"file_name": name, "caption": caption} for name, caption in zip(names, captions, strict=True)]
        (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_data(folder: Path) -> None:
    """`path/to/...` of the documents."""
    question = [{"role": "user", "content": "Up or down?"}]
    good, bad = ([{"role": "assistant", "content": answer}] for answer in ("Up.", "Down."))
    write_rows(folder / "conversations", [{"messages": question + good}] * 4)
    write_rows(folder / "preferences", [{"prompt": question, "chosen": good, "rejected": bad}] * 4)
    write_rows(folder / "prompts", [{"prompt": "a red apple", "grid": [4, 4]}] * 4)
    write_images(folder / "images", [None] * 4)
    write_images(folder / "codes", [None] * 4)
    write_images(folder / "captions", ["red", "green", "blue", "yellow"])


def write_working_directory(folder: Path, files: Path, makes_checkpoint: bool) -> None:
    """
    What a reader has in his working directory.

    Args:
        folder: To be made.
        files: With `llada-uni`, `path/to/` and `bin/`, which the sections of a document share.
        makes_checkpoint: Whether the section itself writes `llada-uni`.
    """
    folder.mkdir()
    for entry in ROOT.iterdir():
        if entry.name not in ("examples", "outputs", "runs", "build", ".git", ".venv"):
            (folder / entry.name).symlink_to(entry)
    shutil.copytree(ROOT / "examples", folder / "examples")  # quickstart.py writes beside them
    for name in ("path", *(() if makes_checkpoint else ("llada-uni",))):
        (folder / name).symlink_to(files / name)
    (folder / ".venv").symlink_to(sys.prefix)
    picture = Image.open(ROOT / "examples/emoji/pictures/waving_hand.png").convert("RGB")
    picture.save(folder / "photo.png")
    mask = Image.new("L", picture.size)
    mask.paste(255, (0, 0, picture.width, picture.height // 2))
    mask.save(folder / "mask.png")
    (folder / "my_rewards.py").write_text(
        "def correctness(completions, **columns):\n    return [0.0 for _ in completions]\n"
    )


@pytest.mark.parametrize("document", [*DOCUMENTS, CONVERTED_CARD])
def test_every_block_runs_as_printed(document, tmp_path):
    text = text_of(document)
    if "torchao" in text and find_spec("torchao") is None:
        pytest.skip("torchao is not installed")
    path, files = tmp_path / Path(document).name, tmp_path / "files"
    path.write_text(text)
    write_data(files / "path" / "to")
    shutil.copytree(embedded_checkpoint("emoji"), files / "llada-uni")
    (files / "path" / "to" / "llada-uni").symlink_to(files / "llada-uni")
    if RELEASED in text:
        convert_to_released(files / "llada-uni", files / RELEASED, progress=False)
    (files / "bin").mkdir()
    command = files / "bin" / "llada-uni"
    command.write_text(COMMAND.format(python=sys.executable))
    command.chmod(0o755)
    for number, blocks in enumerate(sections_of(text)):
        makes_checkpoint = any(f"{RELEASED} llada-uni" in block.code for block in blocks)
        write_working_directory(tmp_path / str(number), files, makes_checkpoint)
    environment = {
        **os.environ,
        "PATH": f"{files / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(files / "cache"),
    }
    process = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "documentation.py"), str(path), str(tmp_path)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    assert process.returncode == 0, process.stdout[-8000:]


def test_little_is_not_run():
    blocks = [block for document in [*DOCUMENTS, CONVERTED_CARD] for block in blocks_of(text_of(document))]
    assert {block.language for block in blocks} == {"python", "bash"}
    not_run = [block for block in blocks if block.not_run]
    assert len(not_run) <= MOST_NOT_RUN, [block.not_run for block in not_run]
    assert len(not_run) < len(blocks) / 5


def test_what_is_installed_exists():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for document in [*DOCUMENTS, CONVERTED_CARD]:
        for line in re.findall(r"pip install [^`\n]*", text_of(document)):
            *options, name, extras = re.search(r'(-c \S+)? ?(?:-e )?"?(\.|[\w-]+)(?:\[([\w,-]+)\])?"?$', line).groups()
            assert name in (".", "llada-uni"), line
            assert set((extras or "").split(",")) - {""} <= set(project["optional-dependencies"]), line
            assert all((ROOT / option.removeprefix("-c ")).is_file() for option in options if option), line


# Written by the commands beside them
WRITTEN = ("outputs/", "runs/", "data/")


@pytest.mark.parametrize("document", DOCUMENTS)
def test_what_is_named_exists(document):
    """Links between the documents, with their headings, and paths of the repository that stand in the text."""
    text, folder = (ROOT / document).read_text(), (ROOT / document).parent
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        name, _, heading = target.partition("#")
        file = folder / name if name else ROOT / document
        assert file.exists(), target
        if heading:
            headings = [line.strip("# ") for line in file.read_text().splitlines() if line.startswith("#")]
            assert heading in [re.sub(r"[^\w\- ]", "", found).lower().replace(" ", "-") for found in headings], target
    folders = "|".join(entry.name for entry in ROOT.iterdir() if entry.is_dir() and entry.name[0] != ".")
    for name in re.findall(rf"(?<![\w./-])(?:{folders})/[\w./*-]*", text):
        if not name.startswith(WRITTEN):
            assert list(ROOT.glob(name.rstrip("/."))), name


def test_the_map_has_every_package():
    """The table of CONTRIBUTING.md, under "Where things are"."""
    packages = [path.parent.relative_to(ROOT) for path in ROOT.glob("src/**/__init__.py")]
    text = (ROOT / "CONTRIBUTING.md").read_text()
    assert packages and not [str(package) for package in packages if f"| `{package}/` |" not in text]


def test_every_package_says_what_lives_there():
    packages = [*ROOT.glob("src/**/__init__.py"), *ROOT.glob("tests/**/__init__.py"), ROOT / "conversion/__init__.py"]
    assert [str(path) for path in packages if not ast.get_docstring(ast.parse(path.read_text()))] == []
