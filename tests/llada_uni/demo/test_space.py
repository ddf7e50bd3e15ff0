"""The template of a Space, which is to run as it is."""

import runpy
import tomllib
from pathlib import Path

import gradio as gr
import yaml
from packaging.requirements import Requirement

from llada_uni.demo.app import Demo


ROOT = Path(__file__).resolve().parents[3]
SPACE = ROOT / "examples" / "space"


def test_the_app_builds_the_page(monkeypatch):
    launched = []
    monkeypatch.delenv("MODEL", raising=False)
    monkeypatch.setattr(Demo, "launch", lambda demo, **settings: launched.append(demo))
    demo = runpy.run_path(str(SPACE / "app.py"), run_name="__main__")["demo"]
    try:
        assert launched == [demo] and isinstance(demo.page, gr.Blocks)
        labels = [block.label for block in demo.page.blocks.values() if isinstance(block, gr.Tab)]
        assert labels == ["Draw", "Edit", "Chat", "Story"]
    finally:
        demo.close()


def test_its_header_is_what_spaces_read():
    header = yaml.safe_load((SPACE / "README.md").read_text().split("---\n")[1])
    assert header["sdk"] == "gradio" and (SPACE / header["app_file"]).is_file()
    assert len(header["short_description"]) <= 60
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (needed,) = (Requirement(line) for line in project["optional-dependencies"]["demo"])
    assert header["sdk_version"] in needed.specifier
    assert f"gradio=={header['sdk_version']}\n" in (ROOT / "constraints.txt").read_text()


def test_it_installs_the_demo():
    (requirement,) = (Requirement(line) for line in (SPACE / "requirements.txt").read_text().splitlines())
    assert requirement.name == "llada-uni" and requirement.extras == {"demo"}
