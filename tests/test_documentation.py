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
import socket
import subprocess
import sys
import time
import tomllib
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffusers_llada_uni import embedded_checkpoint
from diffusers_llada_uni.pipeline_card import make_pipeline_card
from llada_uni.conversion.convert_llada_uni_checkpoint import convert_to_released

from .documentation import blocks_of, runnable_blocks, sections_of
from .text_only import write_ling, write_text_only
from .warm_python import listening, write_command


ROOT = Path(__file__).resolve().parents[1]
PLACES = ("*.md", "docs/**/*.md", "examples/**/*.md", "comfyui/**/*.md", "src/*/checkpoints/**/*.md")
DOCUMENTS = sorted(str(path.relative_to(ROOT)) for place in PLACES for path in ROOT.glob(place))
CONVERTED_CARD = "the card of a converted checkpoint"
MOST_NOT_RUN = 12
RELEASED = "path/to/LLaDA2.0-Uni"
RELATIVES = {"path/to/LLaDA2.1-mini": write_text_only, "path/to/Ling-mini-2.0": write_ling}
SERVER = "http://127.0.0.1:8000"

# The command of the reader; training that does not say how long it takes is stopped after one step.
COMMAND = """#!/usr/bin/env bash
if [ "${1-}" = train ] && [[ "$*" != *--max_steps* ]]; then set -- "$@" --max_steps 1; fi
if [ "${2-}" = grpo ]; then set -- "$@" --max_completion_length 32; fi
exec "$(dirname "$0")/python" -m llada_uni.cli "$@"
"""


def text_of(document: str) -> str:
    if document == CONVERTED_CARD:
        return str(make_pipeline_card("llada-uni", ["turbo", "normal"], "bfloat16"))
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


def write_working_directory(folder: Path, files: Path, environment: Path, makes_checkpoint: bool) -> None:
    """
    What a reader has in his working directory.

    Args:
        folder: To be made.
        files: With `llada-uni` and `path/to/`, which the sections of a document share.
        environment: The reader's virtual environment.
        makes_checkpoint: Whether the section itself writes `llada-uni`.
    """
    folder.mkdir()
    for entry in ROOT.iterdir():
        if entry.name not in ("examples", "outputs", "runs", "build", ".git", ".venv"):
            (folder / entry.name).symlink_to(entry)
    shutil.copytree(ROOT / "examples", folder / "examples")  # quickstart.py writes beside them
    for name in ("path", *(() if makes_checkpoint else ("llada-uni",))):
        (folder / name).symlink_to(files / name)
    (folder / ".venv").symlink_to(environment)
    shutil.copy(ROOT / "examples/emoji/pictures/waving_hand.png", folder / "photo.png")
    mask = Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 64, 32))
    mask.save(folder / "mask.png")
    (folder / "my_rewards.py").write_text(
        "def correctness(completions, **columns):\n    return [0.0 for _ in completions]\n"
    )


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    """The environment variables of a reader, whose `bin/` has a `python` that has done its imports."""
    folder = tmp_path_factory.mktemp("reader")
    (folder / "bin").mkdir()
    write_command(folder / "bin" / "python", f"{folder}/socket")
    (folder / "bin" / "llada-uni").write_text(COMMAND)
    (folder / "bin" / "llada-uni").chmod(0o755)
    variables = {
        **os.environ,
        "VIRTUAL_ENV": str(folder),
        "PATH": f"{folder / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(folder / "cache"),
    }
    with listening(f"{folder}/socket", variables):
        yield variables


@contextmanager
def served(reader):
    """Where the emoji model is served, as `llada-uni serve --api-key secret` does, on a port that is free."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    command = [f"{reader['VIRTUAL_ENV']}/bin/llada-uni", "serve", "--api-key", "secret", "--port", str(port)]
    with subprocess.Popen(command, env=reader, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while True:
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                break
            except ConnectionRefusedError:
                assert process.poll() is None
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
        process.terminate()


def compare_images(text: str, folder: Path, made: Path) -> None:
    """
    `![...](images/tasks/NAME)` shows the image that a block of the document writes to NAME.

    With the environment variable `UPDATE_IMAGES` the document's images become what its blocks make.
    """
    for shown in sorted(set(re.findall(r"\]\((images/tasks/[^)]+)\)", text))):
        (written,) = {
            path.read_bytes(): path for path in made.glob(f"*/{shown.removeprefix('images/tasks/')}")
        }.values()
        if os.environ.get("UPDATE_IMAGES"):
            (folder / shown).parent.mkdir(parents=True, exist_ok=True)
            Image.open(written).convert("RGB").quantize(64).save(folder / shown, optimize=True)
        pixels = [np.asarray(Image.open(path).convert("RGB"), dtype=float) for path in (written, folder / shown)]
        assert np.abs(pixels[0] - pixels[1]).mean() < 4, shown


@pytest.mark.parametrize("document", [*DOCUMENTS, CONVERTED_CARD])
def test_every_block_runs_as_printed(document, reader, tmp_path):
    text = text_of(document)
    if not sections_of(text):
        return
    with (
        served(reader) if any(SERVER in block.code for block in runnable_blocks(text)) else nullcontext(SERVER) as url
    ):
        run_as_printed(document, text.replace(SERVER, url), reader, tmp_path)
    if document != CONVERTED_CARD:
        compare_images(text, (ROOT / document).parent, tmp_path)


def run_as_printed(document: str, text: str, reader: dict[str, str], tmp_path: Path) -> None:
    sections = sections_of(text)
    if "torchao" in text and find_spec("torchao") is None:
        pytest.skip("torchao is not installed")
    path, files = tmp_path / Path(document).name, tmp_path / "files"
    path.write_text(text)
    write_data(files / "path" / "to")
    shutil.copytree(embedded_checkpoint("emoji"), files / "llada-uni")
    (files / "path" / "to" / "llada-uni").symlink_to(files / "llada-uni")
    if RELEASED in text:
        convert_to_released(files / "llada-uni", files / RELEASED, progress=False)
    for relative, write in RELATIVES.items():
        if relative in text:
            write(files / relative, ROOT / "tests" / "fixtures" / "official_tiny")
    failed = []
    for number, blocks in enumerate(sections):
        makes_checkpoint = any(f"{RELEASED} llada-uni" in block.code for block in blocks)
        folder = tmp_path / str(number)
        write_working_directory(folder, files, Path(reader["VIRTUAL_ENV"]), makes_checkpoint)
        process = subprocess.run(
            [f"{reader['VIRTUAL_ENV']}/bin/python", str(ROOT / "tests" / "documentation.py"), str(path), str(number)],
            cwd=folder,
            env=reader,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=600,
        )
        if process.returncode:
            failed.append(process.stdout[-4000:])
    assert not failed, "\n\n".join(failed)


def test_a_block_that_fails_is_told_and_others_run_in_fresh_processes(reader, tmp_path):
    text = """# One
```python
import sys
assert not [name for name in sys.modules if "llada_uni" in name]
left = open("left.txt", "w").write("here")
```
# Two
```bash
llada-uni draw --size 3
```
# Three
```python
import os
assert "left" not in globals() and not os.path.exists("left.txt")
```
"""
    with pytest.raises(AssertionError) as failure:
        run_as_printed("some.md", text, reader, tmp_path)
    assert "`size` must be WIDTHxHEIGHT" in str(failure.value) and "under 'Two'" in str(failure.value)
    assert "under 'One'" not in str(failure.value) and "under 'Three'" not in str(failure.value)


def test_photo_and_mask_are_those_that_tasks_makes(tmp_path):
    block = next(block for block in runnable_blocks(text_of("docs/tasks.md")) if "photo.png" in block.code)
    write_working_directory(tmp_path / "reader", tmp_path, tmp_path, makes_checkpoint=False)
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "examples").symlink_to(ROOT / "examples")
    code = block.code.replace("python -c", f"{sys.executable} -c")
    subprocess.run(["bash", "-euc", code], cwd=tmp_path / "made", check=True)
    for name in ("photo.png", "mask.png"):
        assert (tmp_path / "made" / name).read_bytes() == (tmp_path / "reader" / name).read_bytes()


def test_little_is_not_run():
    blocks = [block for document in [*DOCUMENTS, CONVERTED_CARD] for block in blocks_of(text_of(document))]
    assert {block.language for block in blocks} >= {"python", "bash"}
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
        if heading and f"::: {heading}" not in file.read_text():
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


OTHERS = ("torch", "transformers", "diffusers", "datasets", "the system")  # that say something


def test_troubleshooting_quotes_what_is_said():
    """The messages in `docs/troubleshooting.md` are the code's, with `...` for what differs."""
    said = []
    for path in ROOT.glob("src/**/*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "\0" for part in node.values]
                said.append("".join(parts).replace("`", ""))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                said.append(node.value.replace("`", ""))
    rows = re.findall(r"^\| ([^|]+) \|", (ROOT / "docs/troubleshooting.md").read_text(), re.MULTILINE)
    messages = [row for row in rows if "`" in row and not row.startswith(OTHERS)]
    assert len(messages) > 30
    pieces = [piece.strip(" `.") for message in messages for piece in re.sub(r"^\d+ ", "", message).split("...")]
    unsaid = [piece for piece in pieces if not any(piece.replace("`", "") in text for text in said)]
    assert not unsaid


def test_the_site_asks_nobody():
    """When it is read: neither fonts nor scripts, neither numbers of GitHub nor of who reads it."""
    settings = (ROOT / "mkdocs.yml").read_text()
    assert "font: false" in settings and "http" not in settings
    assert not re.search(r"^(repo_url|google_analytics|extra_javascript)|analytics:", settings, re.MULTILINE)
    pages = [ROOT / name for name in DOCUMENTS if name.startswith("docs/")]
    styles = [*ROOT.glob("docs/stylesheets/*.css")]
    fetched = r"!\[[^]]*\]\(http|<(?:img|script|link|iframe)[^>]*http|url\(|@import"
    assert not [str(path) for path in [*pages, *styles] if re.search(fetched, path.read_text())]
