"""
Nodes of ComfyUI for LLaDA2.0-Uni. This folder, copied or linked into `ComfyUI/custom_nodes`, is all that ComfyUI needs
beside the package `llada-uni`; see docs/comfyui.md.

The nodes have the interface that every ComfyUI reads (`INPUT_TYPES`, `RETURN_TYPES`, `FUNCTION`): the newer one of
`comfy_api` gives them nothing and would shut out those of before 2025. Nothing here imports ComfyUI until a node runs.
"""

from .host import register_model_folder
from .nodes_codes import LLaDAUniDecode, LLaDAUniDraw, LLaDAUniEdit, LLaDAUniEncode, LLaDAUniFill
from .nodes_model import LLaDAUniLoader, LLaDAUniUnload
from .nodes_text import LLaDAUniAsk, LLaDAUniStory


NODE_DISPLAY_NAME_MAPPINGS = {
    "LLaDAUniLoader": "LLaDA-Uni Load Model",
    "LLaDAUniDraw": "LLaDA-Uni Draw",
    "LLaDAUniEdit": "LLaDA-Uni Edit",
    "LLaDAUniFill": "LLaDA-Uni Fill",
    "LLaDAUniStory": "LLaDA-Uni Story",
    "LLaDAUniAsk": "LLaDA-Uni Ask",
    "LLaDAUniEncode": "LLaDA-Uni Encode Image",
    "LLaDAUniDecode": "LLaDA-Uni Decode Codes",
    "LLaDAUniUnload": "LLaDA-Uni Unload Model",
}
NODE_CLASS_MAPPINGS = {
    node.__name__: node
    for node in (
        LLaDAUniLoader,
        LLaDAUniDraw,
        LLaDAUniEdit,
        LLaDAUniFill,
        LLaDAUniStory,
        LLaDAUniAsk,
        LLaDAUniEncode,
        LLaDAUniDecode,
        LLaDAUniUnload,
    )
}

register_model_folder()

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
