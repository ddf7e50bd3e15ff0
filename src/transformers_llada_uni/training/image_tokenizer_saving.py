"""What the trainings of the image tokenizer write: its weights in the released layout."""

import json
from pathlib import Path

from safetensors.torch import save_file
from transformers.models.glm_image.modeling_glm_image import GlmImageVisionModel, GlmImageVQVAE

from ..image_processing_llada_uni import LLaDAUniImageProcessor
from ..loading.folder_writing import folder_at_once


def save_image_tokenizer(
    output_dir: str | Path,
    visual: GlmImageVisionModel,
    vqmodel: GlmImageVQVAE,
    image_processor: LLaDAUniImageProcessor,
) -> None:
    """Writes `image_tokenizer/`: `config.json`, `preprocessor_config.json` and `image_tokenizer.safetensors`."""
    configs = {"vision_config": visual.config.to_dict(), "vq_config": vqmodel.config.to_dict()}
    tensors = {
        f"model.{name}.{key}": tensor.contiguous()
        for name, part in (("visual", visual), ("vqmodel", vqmodel))
        for key, tensor in part.state_dict().items()
    }
    with folder_at_once(Path(output_dir) / "image_tokenizer", replace=True) as folder:
        (folder / "config.json").write_text(json.dumps(configs, indent=2), encoding="utf-8")
        image_processor.save_pretrained(folder)
        save_file(tensors, folder / "image_tokenizer.safetensors", metadata={"format": "pt"})
