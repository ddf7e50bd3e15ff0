"""
The file `load_llada_uni.py` in a checkpoint, for people who have not imported this package, or do not have it.

The Auto classes of transformers know nothing of us then; they know that a checkpoint may bring code (`auto_map`), and
run it where they are told `trust_remote_code=True`. Ours imports the installed package, or says how to install it.
Whoever has imported the package is not asked, and the file is not run.
"""

import os
from pathlib import Path
from typing import Any


MODULE = "load_llada_uni"
# Of each class that is saved with the file: what the Auto classes are to find by it, as in `auto_registration`.
AUTO_NAMES = {
    "LLaDA2MoeConfig": {
        "AutoConfig": "LLaDA2MoeConfig",
        "AutoModel": "LLaDA2MoeModel",
        "AutoModelForCausalLM": "LLaDA2MoeForBlockDiffusion",
        "AutoModelForMaskedLM": "LLaDA2MoeForBlockDiffusion",
    },
    "LLaDAUniConfig": {
        "AutoConfig": "LLaDAUniConfig",
        "AutoModel": "LLaDAUniModel",
        "AutoModelForImageTextToText": "LLaDAUniForConditionalGeneration",
        "AutoModelForMultimodalLM": "LLaDAUniForConditionalGeneration",
    },
    "LLaDAUniProcessor": {"AutoProcessor": "LLaDAUniProcessor"},
}
_CLASSES = sorted({name for names in AUTO_NAMES.values() for name in names.values()})
CONTENT = f'''"""The classes of the package llada-uni, for `trust_remote_code=True`; no code of a model is here."""

try:
    from transformers_llada_uni import (
{"".join(f"        {name},{chr(10)}" for name in _CLASSES)}    )
except ImportError as error:
    raise ImportError("This checkpoint needs the package llada-uni: `pip install llada-uni`.") from error
'''


class CodeStaysHere:
    """For classes that are found by way of the file: transformers would copy their code into what they save."""

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Does nothing: a checkpoint names the class, and holds no copy of it."""


class SavedWithStub(CodeStaysHere):
    """For configurations and processors: they are saved with the file beside them, and with `auto_map`, its names."""

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> Any:
        names = AUTO_NAMES.get(type(self).__name__)  # a class that a user has derived is not in the package
        if names is not None and not os.path.isfile(save_directory):
            self.auto_map = {auto_class: f"{MODULE}.{name}" for auto_class, name in names.items()}
            os.makedirs(save_directory, exist_ok=True)
            Path(save_directory, f"{MODULE}.py").write_text(CONTENT, encoding="utf-8")
        return super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]  # what it is mixed into
