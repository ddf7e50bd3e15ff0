"""
Docstrings here are written as those of transformers are: other objects are named as [`Name`] or [`~package.Name`],
types stand as (`int`, *optional*), and a line "> Data" may head some of the arguments. In the site names become links
where they have a place in the reference, and plain code elsewhere; the rest is left out or unadorned.
"""

import re
from typing import Any

import griffe


REFERENCE = re.compile(r"\[`(~?)([\w.]+)`\]")
ARGUMENT = re.compile(r"( +[*\w, ]+ \()(.+?)(\):.*)")
HEADING = re.compile(r" +> \w+")


class HuggingFaceDocstrings(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            lines = obj.docstring.value.splitlines()
            obj.docstring.value = "\n".join(self._line(line, obj) for line in lines if not HEADING.fullmatch(line))

    def _line(self, line: str, obj: griffe.Object) -> str:
        if argument := ARGUMENT.fullmatch(line):
            start, annotation, description = argument.groups()
            annotation = re.sub("[`*]", "", REFERENCE.sub(r"\2", annotation))
            if obj.is_function or any("dataclass" in str(found.value) for found in obj.decorators):
                annotation = re.sub(r",? defaults? to .*", "", annotation)  # the signature shows it
            line = start + annotation + description
        return REFERENCE.sub(lambda found: self._link(found, obj), line)

    @staticmethod
    def _link(found: re.Match[str], obj: griffe.Object) -> str:
        is_short, name = found.groups()
        first, dot, rest = name.partition(".")
        try:
            target = obj.resolve(first) + dot + rest
        except griffe.NameResolutionError:
            target = name
        shown = name.rpartition(".")[2] if is_short else name
        return f'<autoref identifier="{target}" optional><code>{shown}</code></autoref>'
