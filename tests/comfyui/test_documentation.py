import re

import comfyui

from ..conftest import ROOT


def row_of(name, node):
    kinds = node.INPUT_TYPES()
    inputs = [f"`{name}`" for name in kinds["required"]] + [f"*`{name}`*" for name in kinds.get("optional", {})]
    outputs = [f"`{name}`" for name in getattr(node, "RETURN_NAMES", ())]
    return f"| {name.removeprefix('LLaDA-Uni ')} | {', '.join(inputs)} | {', '.join(outputs)} |"


def test_the_table_of_nodes_has_all_inputs_and_outputs(host):
    text = (ROOT / "docs" / "comfyui.md").read_text()
    names = comfyui.NODE_DISPLAY_NAME_MAPPINGS
    expected = [row_of(name, comfyui.NODE_CLASS_MAPPINGS[kind]) for kind, name in names.items()]
    table = text.partition("| node | inputs | outputs |\n|---|---|---|\n")[2].partition("\n\n")[0]
    assert table.splitlines() == expected


def test_the_table_of_workflows_has_all():
    text = (ROOT / "docs" / "comfyui.md").read_text()
    named = re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)
    assert sorted(named) == sorted(path.stem for path in (ROOT / "comfyui" / "example_workflows").iterdir())
