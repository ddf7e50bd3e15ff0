"""Nodes that load a model and let it go."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from . import host
from .managed_pipeline import ManagedPipeline
from .node_inputs import CATEGORY, MODEL, choice, text


if TYPE_CHECKING:
    from diffusers_llada_uni import LLaDAUniPipeline

EMBEDDED = "emoji"
QUANTIZATIONS = {"none": None, "8 bits": 8, "4 bits": 4}


class LLaDAUniLoader:
    DESCRIPTION = (
        "Loads a LLaDA-Uni pipeline into main memory; the other nodes bring its parts to the card when they need them."
    )
    CATEGORY, FUNCTION = CATEGORY, "load"
    RETURN_TYPES, RETURN_NAMES = (MODEL,), ("model",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": choice(
                    "`emoji` comes with the package and draws emoji, also on a CPU. All others are folders of "
                    "models/LLaDA-Uni; `llada-uni convert` makes one of the released checkpoint.",
                    EMBEDDED,
                    *_model_names(),
                ),
                "dtype": choice("Of the weights. auto: bfloat16 on a card, float32 on a CPU.", "auto", *_DTYPES),
                "quantization": choice(
                    "Of the language model, as it is loaded: the released one takes 33 GB in bfloat16, 18 in 8 bits, "
                    "10 in 4. On one that is saved in few bits: none.",
                    *QUANTIZATIONS,
                ),
                "decoders": choice(
                    "Which to load: turbo takes 8 steps, normal 50. Of the released model each takes 12 GB.",
                    "all",
                    "turbo",
                    "normal",
                ),
            },
            "optional": {
                "repository": text(
                    "owner/name of a pipeline on the Hugging Face Hub, in place of `model`. It is downloaded once, "
                    "into the cache of the Hub.",
                    multiline=False,
                )
            },
        }

    @classmethod
    def VALIDATE_INPUTS(cls, repository: str | None = None) -> bool | str:
        if not repository or re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", repository.strip()):
            return True
        return f"`repository` must be owner/name of the Hub, got {repository!r}."

    def load(
        self, model: str, dtype: str, quantization: str, decoders: str, repository: str = ""
    ) -> tuple[ManagedPipeline]:
        if (refusal := self.VALIDATE_INPUTS(repository)) is not True:  # ComfyUI does not ask for what is linked
            raise ValueError(refusal)
        settings: dict[str, Any] = {"dtype": _dtype_of(dtype)}
        pipeline_class = _pipeline_class()
        if (bits := QUANTIZATIONS[quantization]) is not None:
            from diffusers import PipelineQuantizationConfig

            from transformers_llada_uni import GroupwiseQuantizationConfig

            weights: Any = {"model": GroupwiseQuantizationConfig(bits=bits)}
            settings["quantization_config"] = PipelineQuantizationConfig(quant_mapping=weights)
        if decoders != "all":
            from diffusers_llada_uni.decoders import DECODERS

            others = [name for name in DECODERS if name != decoders]
            settings |= dict.fromkeys(part for name in others for part in DECODERS[name])
        # ComfyUI's inference mode would make weights that can never be changed.
        with torch.inference_mode(False):
            pipe = pipeline_class.from_pretrained(repository.strip() or _folder_of(model), **settings)
        if decoders != "all" and not pipe.loaded_decoders:
            raise ValueError(f"`decoders` is {decoders!r}, but the model does not have that decoder.")
        return (ManagedPipeline(pipe),)


class AnyType(str):
    """What may be linked to outputs of all types, as ComfyUI compares types by `!=`."""

    def __ne__(self, other: object) -> bool:
        return False


class LLaDAUniUnload:
    DESCRIPTION = (
        "Takes the model off the card at once. ComfyUI does so by itself when another model needs the room. `after`: "
        "waits for what is linked here."
    )
    CATEGORY, FUNCTION, OUTPUT_NODE = CATEGORY, "unload", True
    RETURN_TYPES = ()

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"model": (MODEL,)}, "optional": {"after": (AnyType("*"),)}}

    def unload(self, model: ManagedPipeline, after: object = None) -> tuple[()]:
        model.unload()
        return ()


_DTYPES = ("bfloat16", "float16", "float32")


def _dtype_of(name: str) -> torch.dtype:
    if name == "auto":
        name = "bfloat16" if host.takes_bfloat16(host.device()) else "float32"
    return getattr(torch, name)


def _model_names() -> list[str]:
    """Pipelines in the folders of models, also two deep as in owner/name."""
    names = {
        index.parent.relative_to(folder).as_posix()
        for folder in host.model_folders()
        for pattern in ("*", "*/*")
        for index in folder.glob(f"{pattern}/model_index.json")
    }
    return sorted(names - {EMBEDDED})


def _folder_of(name: str) -> Path:
    from diffusers_llada_uni import embedded_checkpoint

    if name == EMBEDDED:
        return embedded_checkpoint(name)
    folders = [folder / name for folder in host.model_folders() if (folder / name / "model_index.json").is_file()]
    if not folders:
        raise ValueError(f"`model` {name!r} is in none of {', '.join(map(str, host.model_folders()))}.")
    return folders[0]


def _pipeline_class() -> "type[LLaDAUniPipeline]":
    try:
        from diffusers_llada_uni import LLaDAUniPipeline
    except ModuleNotFoundError as error:
        if error.name != "diffusers_llada_uni":
            raise
        requirements = Path(__file__).with_name("requirements.txt")
        raise ModuleNotFoundError(
            f'llada-uni is not installed in the Python of ComfyUI: python -m pip install -r "{requirements}"',
            name=error.name,
        ) from error
    return LLaDAUniPipeline
