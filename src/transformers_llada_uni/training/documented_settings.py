"""What a setting means is written once, in the docstring of its configuration: command lines show it as help."""

import dataclasses
import inspect
import re
from types import MappingProxyType
from typing import Any, TypeVar


Settings = TypeVar("Settings")
# `name, other (`type`, defaults to `1`): What it means.`, on as many lines as it takes
ENTRY = re.compile(r"^    ([\w, ]+) \(.+?\): (.+(?:\n        .+)*)", re.MULTILINE)
LINK = re.compile(r"\[`~?([\w.]+)`\]")


def documented(config_class: type[Settings]) -> type[Settings]:
    """
    Gives the fields of a dataclass `metadata["help"]`, which `HfArgumentParser` reads: what the docstring says of them
    under "Parameters", or else what a base says of the field of that name.
    """
    helps: dict[str, str] = {}
    for base in reversed(config_class.__mro__[1:]):
        fields: dict[str, dataclasses.Field[Any]] = vars(base).get("__dataclass_fields__", {})
        helps |= {name: field.metadata["help"] for name, field in fields.items() if "help" in field.metadata}
    for names, text in ENTRY.findall(inspect.cleandoc(config_class.__doc__ or "")):
        helps |= dict.fromkeys(names.split(", "), LINK.sub(r"\1", " ".join(text.split())))
    for name in inspect.get_annotations(config_class):
        field = config_class.__dataclass_fields__.get(name)  # type: ignore[attr-defined]  # of every dataclass
        if field is not None and name in helps:
            field.metadata = MappingProxyType({**field.metadata, "help": helps[name]})
    return config_class
