"""The options of a training stage: of the command line and of a configuration file, the project's own ones first."""

import argparse
import difflib
from collections.abc import Sequence
from typing import Any

from trl import TrlParser

from transformers_llada_uni.input_checks import check_choice
from transformers_llada_uni.training import RECIPES, LLaDAUniSFTConfig


OWN_PACKAGES = ("transformers_llada_uni", "diffusers_llada_uni", "llada_uni")
OWN, MODEL_AND_DATA = "options of this stage", "model and data"


def section_of(option: str, dataclasses: Sequence[type]) -> str:
    """Under which heading `--help` shows an option: by the class that declares it."""
    for dataclass in dataclasses:
        for owner in dataclass.__mro__:
            if option not in owner.__dict__.get("__annotations__", {}):
                continue
            if owner.__module__.split(".")[0] in OWN_PACKAGES:
                return OWN
            is_training = hasattr(dataclass, "output_dir")
            return f"{owner.__name__} of {owner.__module__.split('.')[0]}" if is_training else MODEL_AND_DATA
    return OWN  # --help


class StageParser(TrlParser):
    """
    trl's parser for the options of `llada-uni train <stage>`.

    Args:
        stage: Its name.
        dataclasses: Whose fields are the options.
    """

    def __init__(self, stage: str, dataclasses: Sequence[type]):
        self._dataclasses = dataclasses
        self._recipe: str | None = None
        self._has_recipes = LLaDAUniSFTConfig in dataclasses
        # Read before the others: it sets their defaults.
        self._first = argparse.ArgumentParser(prog=f"llada-uni train {stage}", add_help=False, allow_abbrev=False)
        if self._has_recipes:
            published = f"Published settings in the place of defaults: {', '.join(RECIPES)}; see docs/training.md."
            self._first.add_argument("--recipe", choices=list(RECIPES), default=argparse.SUPPRESS, help=published)
        super().__init__(
            dataclasses,  # type: ignore[arg-type]  # trl's name for classes of dataclasses
            prog=self._first.prog,
            parents=[self._first],
            allow_abbrev=False,  # a typing error in the last letters is one, too
            usage="%(prog)s [--config FILE.yaml] [--option value ...]",
            description="Options are read from a YAML file and from the command line, which has the last word.",
        )

    def format_help(self) -> str:
        sections: dict[str, list[argparse.Action]] = {OWN: [], MODEL_AND_DATA: []}
        for action in self._actions:
            sections.setdefault(section_of(action.dest, self._dataclasses), []).append(action)
        formatter = self._get_formatter()
        formatter.add_usage(self.usage, [], [])
        formatter.add_text(self.description)
        for heading in sorted(sections, key=lambda heading: heading.endswith("of transformers")):
            formatter.start_section(heading)
            formatter.add_arguments(sections[heading])
            formatter.end_section()
        return formatter.format_help()

    def set_defaults_with_config(self, **config: Any) -> list[str]:
        """The options of a file become defaults, those of its recipe, or of the one that was typed, before them."""
        if self._has_recipes:
            recipe = config.pop("recipe", None)
            if recipe is not None:
                check_choice("recipe", recipe, RECIPES)
            super().set_defaults_with_config(**RECIPES.get(self._recipe or recipe, {}))
        return super().set_defaults_with_config(**config)

    def parse(self, arguments: Sequence[str]) -> tuple[Any, ...]:
        """
        An instance of each dataclass.

        Raises:
            ValueError: for an option that nobody knows, or a value that its dataclass refuses.
        """
        words: list[str] = []
        for argument in arguments:
            words += argument.split("=", 1) if argument.startswith("--config=") else [argument]
        if words and words[-1] == "--config":
            self.error("argument --config: expected a file")
        if self._has_recipes:
            typed, words = self._first.parse_known_args(words)
            self._recipe = getattr(typed, "recipe", None)
            self.set_defaults_with_config()
        *parsed, unknown = self.parse_args_and_config(words, return_remaining_strings=True)
        if unknown:
            name = unknown[0].partition("=")[0].lstrip("-")
            options = [option.lstrip("-") for option in self._option_string_actions]
            alike = difflib.get_close_matches(name, options, n=1) or [o for o in options if o.startswith(name)][:1]
            meant = f" Did you mean `{alike[0]}`?" if alike else ""
            raise ValueError(f"`{name}` is no option of `{self.prog}`.{meant}")
        return tuple(parsed)
