"""Workflows as ComfyUI reads, checks and runs them, and those of its own nodes that the examples use."""

from typing import Any

import torch

from comfyui import NODE_CLASS_MAPPINGS


WIDGETS = {"INT": int, "FLOAT": float, "STRING": str, "BOOLEAN": bool}
Prompt = dict[str, dict[str, Any]]


class SaveImage:
    FUNCTION, OUTPUT_NODE, RETURN_TYPES = "save", True, ()

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"images": ("IMAGE",), "filename_prefix": ("STRING", {"default": "ComfyUI"})}}

    def save(self, images, filename_prefix="ComfyUI"):
        return {"ui": {"images": [images]}}


class PreviewImage(SaveImage):
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"images": ("IMAGE",)}}


class PreviewAny:
    FUNCTION, OUTPUT_NODE, RETURN_TYPES = "main", True, ("STRING",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"source": ("*", {})}}

    def main(self, source=None):
        return {"ui": {"text": [source]}, "result": (source,)}


class SolidMask:
    FUNCTION, RETURN_TYPES = "solid", ("MASK",)

    @classmethod
    def INPUT_TYPES(cls):
        side = ("INT", {"default": 512, "min": 1, "max": 16384})
        return {
            "required": {"value": ("FLOAT", {"default": 1.0, "min": 0.0, "max": 1.0}), "width": side, "height": side}
        }

    def solid(self, value, width, height):
        return (torch.full((1, height, width), value),)


class MaskComposite:
    FUNCTION, RETURN_TYPES = "combine", ("MASK",)

    @classmethod
    def INPUT_TYPES(cls):
        place = ("INT", {"default": 0, "min": 0, "max": 16384})
        masks = {"destination": ("MASK",), "source": ("MASK",)}
        return {"required": {**masks, "x": place, "y": place, "operation": (["multiply", "add", "subtract"],)}}

    def combine(self, destination, source, x, y, operation):
        assert operation == "add"
        result = destination.clone()
        result[:, y : y + source.shape[1], x : x + source.shape[2]] += source
        return (result,)


OWN_NODES = {node.__name__: node for node in (SaveImage, PreviewImage, PreviewAny, SolidMask, MaskComposite)}


def nodes() -> dict[str, type]:
    return {**OWN_NODES, **NODE_CLASS_MAPPINGS}


def inputs_of(node: type) -> dict[str, tuple]:
    kinds = node.INPUT_TYPES()
    return {**kinds["required"], **kinds.get("optional", {})}


def is_widget(kind: Any) -> bool:
    return isinstance(kind, list) or kind in WIDGETS


def prompt_of(workflow: dict[str, Any]) -> Prompt:
    """What the page sends to run a workflow: of each node its class, and its inputs as values or `[node, output]`."""
    links = {link[0]: link for link in workflow["links"]}
    by_id = {node["id"]: node for node in workflow["nodes"]}
    prompt: Prompt = {}
    for node in workflow["nodes"]:
        values, inputs = list(node["widgets_values"]), {}
        known = inputs_of(nodes()[node["type"]])
        assert [given["name"] for given in node["inputs"]] == list(known), node["type"]
        for index, given in enumerate(node["inputs"]):
            name, kind, options = given["name"], known[given["name"]][0], known[given["name"]][1:]
            if is_widget(kind):
                inputs[name] = values.pop(0)
                if options and options[0].get("control_after_generate"):
                    assert values.pop(0) in ("fixed", "randomize", "increment", "decrement")
            elif given["link"] is not None:
                number, source, output, target, place, link_kind = links.pop(given["link"])
                assert (target, place) == (node["id"], index)
                assert number in by_id[source]["outputs"][output]["links"]
                assert link_kind == by_id[source]["outputs"][output]["type"]
                inputs[name] = [str(source), output]
        assert not values, f"{node['type']}: widgets without an input"
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    assert not links, "links that no input has"
    return prompt


def problems_of(prompt: Prompt) -> list[str]:
    """What ComfyUI refuses before it runs anything."""
    problems = []
    for number, entry in prompt.items():
        node = nodes()[entry["class_type"]]
        where = f"{number} {entry['class_type']}"
        required, known = node.INPUT_TYPES()["required"], inputs_of(node)
        problems += [f"{where}: {name} is missing" for name in required if name not in entry["inputs"]]
        problems += [f"{where}: {name} is unknown" for name in entry["inputs"] if name not in known]
        constants = {}
        for name, value in entry["inputs"].items():
            kind, options = known[name][0], (known[name][1] if len(known[name]) > 1 else {})
            if isinstance(value, list):
                given = nodes()[prompt[value[0]]["class_type"]].RETURN_TYPES[value[1]]
                if given != kind and kind != "*":
                    problems.append(f"{where}: {name} takes {kind}, not {given}")
                continue
            constants[name] = value
            if isinstance(kind, list):
                is_fine = value in kind
            else:
                is_fine = type(value) is WIDGETS[kind] or (kind == "FLOAT" and type(value) is int)
                if is_fine and kind in ("INT", "FLOAT"):
                    is_fine = options.get("min", value) <= value <= options.get("max", value)
            if not is_fine:
                problems.append(f"{where}: {name} may not be {value!r}")
        if hasattr(node, "VALIDATE_INPUTS"):
            code = node.VALIDATE_INPUTS.__func__.__code__
            names = code.co_varnames[1 : code.co_argcount]
            answer = node.VALIDATE_INPUTS(**{name: constants[name] for name in names if name in constants})
            problems += [] if answer is True else [f"{where}: {answer}"]
    return problems


def execute(prompt: Prompt) -> dict[str, dict[str, list]]:
    """Of each node that shows something what it shows."""
    outputs: dict[str, list[list]] = {}
    shown: dict[str, dict[str, list]] = {}

    def run(number: str) -> None:
        if number in outputs:
            return
        node = nodes()[prompt[number]["class_type"]]
        inputs: dict[str, list] = {}
        for name, value in prompt[number]["inputs"].items():
            if isinstance(value, list):
                run(value[0])
                inputs[name] = outputs[value[0]][value[1]]
            else:
                inputs[name] = [value]
        outputs[number] = [[] for _ in node.RETURN_TYPES]
        # A node gets one item of each list after the other; of a shorter list the last one again.
        for index in range(max((len(values) for values in inputs.values()), default=1)):
            arguments = {name: values[min(index, len(values) - 1)] for name, values in inputs.items()}
            with torch.inference_mode():
                result = getattr(node(), node.FUNCTION)(**arguments)
            if isinstance(result, dict):
                for name, values in result["ui"].items():
                    shown.setdefault(number, {}).setdefault(name, []).extend(values)
                result = result.get("result", ())
            is_list = getattr(node, "OUTPUT_IS_LIST", [False] * len(result))
            assert len(result) == len(node.RETURN_TYPES) == len(is_list)
            for values, value, is_one_of_many in zip(outputs[number], result, is_list, strict=True):
                values.extend(value if is_one_of_many else [value])

    for number, entry in prompt.items():
        if getattr(nodes()[entry["class_type"]], "OUTPUT_NODE", False):
            run(number)
    return shown
