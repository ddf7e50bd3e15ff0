"""The card of a pipeline's folder or repository: what is in it, and how to load it."""

from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from transformers_llada_uni.hub_card import TAGS, WITHOUT_THE_IMPORT


TEMPLATE = """---
{{ card_data }}
---

# {{ model_name }}

{{ summary or "One masked-diffusion language model that reads and writes text and images: LLaDA2.0-Uni "
"([arXiv 2604.20796](https://arxiv.org/abs/2604.20796)) as a diffusers pipeline, without remote code." }}

- A **semantic image tokenizer** turns an image into codes, one for each 16 x 16 pixels.
- A **mixture-of-experts language model** fills in masked text and image codes, block by block.
- A **diffusion decoder** turns image codes into pixels{% if decoders %}: {% for decoder in decoders %}{{
  "turbo (8 steps, no guidance)" if decoder == "turbo" else "normal (50 steps)" }}{{ " and " if not loop.last }}{%
  endfor %}{% endif %}.

The weights are {{ dtype }}, safetensors only.

## How to use

```bash
pip install llada-uni
```

Images from words, and from images:

```python
import torch
from diffusers import DiffusionPipeline

import diffusers_llada_uni  # lets diffusers find the pipeline

pipe = DiffusionPipeline.from_pretrained("{{ model_name }}", dtype=torch.bfloat16)
if torch.cuda.is_available():
    pipe.enable_model_cpu_offload()

image = pipe("A lighthouse at dusk").images[0]
edited = pipe("Make it snow", image=image).images[0]
```

Words from images:

```python
from transformers import AutoModelForImageTextToText, AutoProcessor

import transformers_llada_uni  # registers the Auto classes

model = AutoModelForImageTextToText.from_pretrained("{{ model_name }}", subfolder="model", device_map="auto")
processor = AutoProcessor.from_pretrained("{{ model_name }}", subfolder="processor")

content = [{"type": "image", "image": image}, {"type": "text", "text": "What is this?"}]
messages = [{"role": "user", "content": content}]
inputs = processor.apply_chat_template(
    messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
).to(model.device)
answer = model.generate(**inputs, max_new_tokens=256)
print(processor.batch_decode(answer[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0])
```

{{ without_the_import }}
{% if training %}

## Training

{{ training }}
{% endif %}
{% if evaluation %}

## Evaluation

{{ evaluation }}
{% endif %}

## Limits

The model repeats what its training data holds, mistakes and prejudices included; what it says about an image may be
wrong, and what it draws may look like a photograph without being one.
"""


def make_pipeline_card(model_name: str, decoders: list[str], dtype: str, **details: Any) -> ModelCard:
    """
    Args:
        model_name: Title of the card, and what the examples load.
        decoders: `"turbo"`, `"normal"` or both.
        dtype: The dtype of the weights.
        details: `license`, `base_model`, and other placeholders of the template: `summary`, `training`, `evaluation`
            (Markdown).
    """
    card_data = ModelCardData(
        license=details.pop("license", None),
        library_name="diffusers",
        pipeline_tag="any-to-any",
        base_model=details.pop("base_model", None),
        tags=[*TAGS, "text-to-image", "image-text-to-text", "image-to-image"],
    )
    values = {"summary": None, "training": None, "evaluation": None, **details}
    return ModelCard.from_template(
        card_data,
        template_str=TEMPLATE,
        model_name=model_name,
        decoders=decoders,
        dtype=dtype,
        without_the_import=WITHOUT_THE_IMPORT,
        **values,
    )
