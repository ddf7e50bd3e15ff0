import copy
import json

import pytest
import torch

from ..conftest import ROOT
from .execution import execute, problems_of, prompt_of


FOLDER = ROOT / "comfyui" / "example_workflows"
NAMES = sorted(path.stem for path in FOLDER.glob("*.json"))


def workflow_of(name):
    return json.loads((FOLDER / f"{name}.json").read_text())


def test_every_task_has_a_workflow():
    assert {"draw", "edit", "fill", "ask", "story"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_workflow_runs_as_it_is_dropped_in(name, host):
    workflow = workflow_of(name)
    assert workflow["version"] == 0.4
    prompt = prompt_of(workflow)
    assert problems_of(prompt) == []
    shown = execute(prompt)
    assert shown.keys() == {number for number, entry in prompt.items() if entry["class_type"].startswith(("Sa", "Pr"))}
    images = [image for of_node in shown.values() for image in of_node.get("images", [])]
    assert images and all(image.shape[1:] == (64, 64, 3) and image.dtype == torch.float32 for image in images)
    assert all(0 <= image.min() < image.max() <= 1 for image in images)
    if name == "story":
        assert len(images[0]) == 4
    texts = [text for of_node in shown.values() for text in of_node.get("text", [])]
    assert len(texts) == (name in ("ask", "story")) and all(texts)
    assert all(bar[-1][0] == bar[-1][1] for bar in host.bars)


def test_what_comfyui_refuses(host):
    prompt = prompt_of(workflow_of("edit"))
    edit = next(number for number, entry in prompt.items() if entry["class_type"] == "LLaDAUniEdit")
    loader = next(number for number, entry in prompt.items() if entry["class_type"] == "LLaDAUniLoader")
    changes = [
        (edit, "prompt", " ", "`prompt` must not be empty."),
        (edit, "image", [loader, 0], "image takes IMAGE, not LLADA_UNI_MODEL"),
        (edit, "seed", -1, "seed may not be -1"),
        (edit, "guidance_rescale", 1.5, "guidance_rescale may not be 1.5"),
        (loader, "model", "nowhere", "model may not be 'nowhere'"),
        (loader, "repository", "../secrets", "`repository` must be owner/name of the Hub, got '../secrets'."),
    ]
    for number, name, value, message in changes:
        changed = copy.deepcopy(prompt)
        changed[number]["inputs"][name] = value
        (problem,) = problems_of(changed)
        assert problem.endswith(message)
