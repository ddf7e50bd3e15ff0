"""The card of a repository on the Hub that has none: what is in it, and how to load it."""

import inspect
import os
from typing import Any

from huggingface_hub import ModelCard, ModelCardData, create_repo, file_exists

from .checkpoint_stub import AUTO_NAMES, MODULE


TAGS = ["llada-uni", "masked-diffusion"]
WITHOUT_THE_IMPORT = (
    f"Tools that import nothing but transformers load it with `trust_remote_code=True`: `{MODULE}.py` imports the "
    "installed package, and holds no code of a model."
)
TASKS = {"AutoModelForImageTextToText": "image-text-to-text", "AutoModelForCausalLM": "text-generation"}
TEMPLATE = """---
{{ card_data }}
---

# {{ repo_id }}

A {{ class_name }} of the package [llada-uni](https://pypi.org/project/llada-uni), which transformers loads with it:

```bash
pip install llada-uni
```

```python
from transformers import {{ auto_class }}

import transformers_llada_uni  # makes the Auto classes know the model

model = {{ auto_class }}.from_pretrained("{{ repo_id }}")
```

{{ without_the_import }}
"""


class PushedWithCard:
    """For models and pipelines: a repository that has no card gets one that says how to load what is in it."""

    def push_to_hub(self, repo_id: str, *args: Any, **kwargs: Any) -> str:
        """As upstream's. A repository without a card gets one; not with `create_pr` or on a branch."""
        push = super().push_to_hub  # type: ignore[misc]  # what it is mixed into
        given = inspect.signature(push).bind(repo_id, *args, **kwargs).arguments
        self._push_card(**(given | kwargs))
        return push(repo_id, *args, **kwargs)

    def save_pretrained(
        self, save_directory: str | os.PathLike, *args: Any, push_to_hub: bool = False, **kwargs: Any
    ) -> Any:
        if push_to_hub:
            self._push_card(**{"repo_id": os.path.basename(save_directory), **kwargs})
        return super().save_pretrained(  # type: ignore[misc]  # what it is mixed into
            save_directory, *args, push_to_hub=push_to_hub, **kwargs
        )

    def make_card(self, repo_id: str) -> ModelCard | None:
        """The card for a repository of this name; None for a class that the package does not have."""
        class_name = type(self).__name__
        auto_classes = [auto for names in AUTO_NAMES.values() for auto, name in names.items() if name == class_name]
        if not auto_classes:
            return None
        data = ModelCardData(library_name="transformers", pipeline_tag=TASKS.get(auto_classes[0]), tags=list(TAGS))
        return ModelCard.from_template(
            data,
            template_str=TEMPLATE,
            repo_id=repo_id,
            class_name=class_name,
            auto_class=auto_classes[0],
            without_the_import=WITHOUT_THE_IMPORT,
        )

    def _push_card(
        self,
        repo_id: str,
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        subfolder: str | None = None,
        revision: str | None = None,
        **kwargs: Any,
    ) -> None:
        if create_pr or subfolder or revision:
            return
        repo_id = create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
        card = None if file_exists(repo_id, "README.md", token=token) else self.make_card(repo_id)
        if card is not None:
            card.push_to_hub(repo_id, token=token, commit_message="Say how to load it")
