"""The wheel holds what an installed project needs."""

import os
import shutil
import socket
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("transformers_llada_uni", "diffusers_llada_uni", "llada_uni")


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


def test_all_files_are_in_it(installed):
    """Sources, and what they read: templates, images, checkpoints."""
    files = [path for path in (ROOT / "src").glob("*llada_uni/**/*") if path.is_file() and path.suffix != ".pyc"]
    names = {path.relative_to(ROOT / "src") for path in files}
    names |= {Path("llada_uni", path.relative_to(ROOT)) for path in ROOT.glob("conversion/*.*")}
    assert {Path(package, "py.typed") for package in PACKAGES} < names
    assert [str(name) for name in sorted(names) if not (installed / name).is_file()] == []


def test_the_emoji_checkpoint_has_its_card_and_credit(installed):
    checkpoint = Path("diffusers_llada_uni/checkpoints/emoji")
    files = [path for path in (ROOT / "src" / checkpoint).rglob("*") if path.is_file()]
    assert files and not [path for path in files if not (installed / path.relative_to(ROOT / "src")).is_file()]
    card = (installed / checkpoint / "README.md").read_text()
    assert "license: cc-by-4.0" in card and "Twemoji" in card.split("## Credits")[1]
    metadata = next(installed.glob("*.dist-info/METADATA")).read_text()
    assert "License-Expression: Apache-2.0 AND CC-BY-4.0" in metadata


# What a user does who has no clone, in one process, as importing torch takes longer than all of it
SESSION = """
import importlib.util, os, sys, threading, time, urllib.error, urllib.request
from llada_uni.cli import main

installed, released, port, demo_port = sys.argv[1:]
for package in ("transformers_llada_uni", "diffusers_llada_uni", "llada_uni"):
    assert importlib.import_module(package).__file__.startswith(installed), package

main(["draw", "a red apple"])
main(["ask", "What is this?", "-i", "images/a-red-apple.png"])
main(["edit", "make it green", "-i", "images/a-red-apple.png"])
main(["story", "a story of 2 moon phases from the new moon", "--max-images", "1", "-f", "html"])
main(["convert", released, "converted"])
main(["info", "converted"])

def begin(page, *words):
    threading.Thread(target=main, args=[list(words)], daemon=True).start()
    for _ in range(600):
        try:
            return urllib.request.urlopen(page)
        except urllib.error.URLError:
            time.sleep(0.1)
    sys.exit(f"{words} did not begin")

address = f"http://127.0.0.1:{port}"
begin(f"{address}/health", "serve", "--port", port, "--name", "emoji")
from openai import OpenAI
client = OpenAI(base_url=f"{address}/v1", api_key="none")
message = {"role": "user", "content": "hello"}
assert client.chat.completions.create(model="emoji", messages=[message], max_tokens=8).choices
assert client.images.generate(model="emoji", prompt="a red apple").data[0].b64_json
if importlib.util.find_spec("gradio"):
    assert b"gradio" in begin(f"http://127.0.0.1:{demo_port}/", "demo", "--port", demo_port).read()
print("all done", flush=True)
os._exit(0)
"""


def test_a_user_without_the_clone(installed, official_tiny, tmp_path):
    pytest.importorskip("openai")
    pytest.importorskip("uvicorn")
    ports = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]  # that are free
    numbers = [str(port.getsockname()[1]) for port in ports]
    for port in ports:
        port.close()
    environment = {**os.environ, "PYTHONPATH": str(installed), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", SESSION, str(installed), str(official_tiny), *numbers]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert done.stdout.endswith("all done\n"), done.stdout[-4000:]
    assert (tmp_path / "images" / "make-it-green.png").is_file() and (tmp_path / "story" / "story.html").is_file()
    assert "How to use" in (tmp_path / "converted" / "README.md").read_text()
