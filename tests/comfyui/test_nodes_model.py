import shutil
import subprocess
import sys
import tomllib
from operator import ne

import pytest
import torch

import comfyui
from comfyui import LLaDAUniLoader, LLaDAUniUnload
from diffusers_llada_uni import embedded_checkpoint

from ..conftest import ROOT
from .execution import WIDGETS, inputs_of, is_widget
from .test_nodes_codes import draw


def test_the_folder_imports_without_comfyui_and_without_the_pipeline():
    program = (
        "import sys, comfyui; from comfyui import NODE_CLASS_MAPPINGS; assert len(NODE_CLASS_MAPPINGS) == 9; "
        "assert not {'comfy', 'folder_paths', 'diffusers', 'transformers', 'diffusers_llada_uni'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


def test_every_node_has_comfyuis_interface(host):
    assert comfyui.NODE_CLASS_MAPPINGS.keys() == comfyui.NODE_DISPLAY_NAME_MAPPINGS.keys()
    for node in comfyui.NODE_CLASS_MAPPINGS.values():
        assert callable(getattr(node(), node.FUNCTION)) and node.CATEGORY == "LLaDA-Uni" and node.DESCRIPTION
        assert len(getattr(node, "RETURN_NAMES", ())) == len(node.RETURN_TYPES)
        assert set(node.INPUT_TYPES()) <= {"required", "optional", "hidden"}
        for name, (kind, *options) in inputs_of(node).items():
            if not is_widget(kind):
                continue
            default = options[0]["default"]
            if isinstance(kind, list):
                assert default == kind[0], name
            else:
                assert type(default) is WIDGETS[kind], name
            if kind in ("INT", "FLOAT"):
                assert options[0]["min"] <= default <= options[0]["max"], name
            assert options[0]["tooltip"], name


def test_the_registry_finds_what_it_needs():
    project = tomllib.loads((ROOT / "comfyui" / "pyproject.toml").read_text())
    ours = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["project"]["version"] == ours["version"]
    assert project["project"]["requires-python"] == ours["requires-python"]
    requirements = (ROOT / "comfyui" / "requirements.txt").read_text().split()
    assert project["project"]["dependencies"] == requirements == [ours["name"]]
    assert project["tool"]["comfy"]["DisplayName"] == "LLaDA-Uni"


def test_emoji_is_the_first_choice_and_folders_follow(host):
    def names():
        return LLaDAUniLoader.INPUT_TYPES()["required"]["model"][0]

    assert names() == ["emoji"]
    folder = host.models_dir / "LLaDA-Uni"
    for name in ("mine", "owner/theirs"):
        (folder / name).mkdir(parents=True)
        (folder / name / "model_index.json").touch()
    (folder / "no pipeline").mkdir()
    try:
        assert names() == ["emoji", "mine", "owner/theirs"]
    finally:
        shutil.rmtree(folder)
    with pytest.raises(ValueError, match="`model` 'mine' is in none of .*LLaDA-Uni"):
        LLaDAUniLoader().load("mine", "auto", "none", "all")


def test_a_folder_loads_in_few_bits_with_one_decoder(host, image):
    folder = host.models_dir / "LLaDA-Uni" / "mine"
    folder.parent.mkdir(parents=True)
    folder.symlink_to(embedded_checkpoint("emoji"))
    try:
        (model,) = LLaDAUniLoader().load("mine", "bfloat16", "8 bits", "turbo")
    finally:
        shutil.rmtree(folder.parent)
    assert model.pipe.loaded_decoders == ["turbo"] and model.pipe.scheduler is None
    assert model.pipe.vae.dtype == torch.bfloat16
    assert model.pipe.model.config.quantization_config.bits == 8
    assert not any(parameter.is_inference() for parameter in model.pipe.model.parameters())
    draw(model)


def test_a_repository_takes_the_place_of_the_folder(host, monkeypatch):
    from diffusers_llada_uni import LLaDAUniPipeline

    asked = []
    monkeypatch.setattr(
        LLaDAUniPipeline, "from_pretrained", lambda name, **settings: asked.append((name, settings)) or "pipe"
    )
    monkeypatch.setattr("comfyui.nodes_model.ManagedPipeline", lambda pipe: pipe)
    assert LLaDAUniLoader().load("emoji", "auto", "none", "all", " owner/name ") == ("pipe",)
    assert asked == [("owner/name", {"dtype": torch.float32})]  # auto, on a CPU
    with pytest.raises(ValueError, match="`repository` must be owner/name of the Hub"):
        LLaDAUniLoader().load("emoji", "auto", "none", "all", "../secrets")  # of another node


def test_a_missing_package_is_told_with_its_cure(host, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("diffusers_llada_uni")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [_Without("diffusers_llada_uni"), *sys.meta_path])
    with pytest.raises(ModuleNotFoundError, match=r"llada-uni is not installed .* pip install -r .*requirements.txt"):
        LLaDAUniLoader().load("emoji", "auto", "none", "all")


class _Without:
    def __init__(self, name):
        self.name = name

    def find_spec(self, name, path=None, target=None):
        if name == self.name:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def test_unload_takes_the_model_off_the_card(host, model):
    draw(model)
    assert host.card.classes() == ["LLaDAUniForConditionalGeneration"]
    assert LLaDAUniUnload().unload(model, after="anything") == ()
    assert host.card.classes() == [] and host.card.num_emptied == 1
    kind = LLaDAUniUnload.INPUT_TYPES()["optional"]["after"][0]
    assert not ne("IMAGE", kind) and not ne(kind, "LLADA_UNI_CODES")  # as ComfyUI compares types
