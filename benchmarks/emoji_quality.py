"""
What the faster but not exact settings cost in quality: the shipped emoji model, same subjects, same seeds.

    python benchmarks/emoji_quality.py packages        # examples/emoji/packages.py says what it holds

Shares of exact names and of right drawings (of all emoji, the asked one is the nearest to the drawn one), the passes
of the language model that each took, and seconds. A branch of guidance is a pass of its own, as it costs as much.
The model was trained on these emoji; its card has held-out ones. "int8" and "float8" are torchao's and need `pip
install torchao`; those with groups are [`GroupwiseQuantizationConfig`].
"""

import argparse
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline, ZImageTransformer2DModel
from diffusers.hooks import FirstBlockCacheConfig
from transformers import AutoModelForImageTextToText
from transformers.utils import is_torchao_available

from diffusers_llada_uni import embedded_checkpoint
from transformers_llada_uni import GroupwiseQuantizationConfig, backbone_quantization_config


sys.path.insert(0, str(Path(__file__).parent.parent / "examples" / "emoji"))
from emoji_table import load_emoji
from evaluate import Evaluation, timed
from wishes import BEFORE


@dataclass
class Setting:
    """
    What of a pipeline is set otherwise: of `generate` and `generate_image_codes`, of one of them alone, of the
    decoder's cache, of the weights (torchao's names, or a configuration of ours).
    """

    generation: dict[str, Any] = field(default_factory=dict)
    text_generation: dict[str, Any] = field(default_factory=dict)
    image_generation: dict[str, Any] = field(default_factory=dict)
    cache_threshold: float | None = None
    backbone_weights: str | GroupwiseQuantizationConfig | None = None
    decoder_weights: str | None = None


GENTLE_RATIOS = {"text_keep_ratio": 1.0, "image_keep_ratio": 0.8}
INT8, FLOAT8 = "Int8WeightOnlyConfig", "Float8WeightOnlyConfig"
SETTINGS = {
    "exact": Setting(),
    "threshold 0.85 in place of 0.95": Setting({"threshold": 0.85}),
    "threshold 0.7": Setting({"threshold": 0.7}),
    "credit": Setting({"credit_alpha": 0.7}),
    "credit, threshold 0.85": Setting({"credit_alpha": 0.7, "threshold": 0.85}),
    "4 steps a block": Setting({"num_steps_per_block": 4}),
    "4 steps a block, cosine": Setting({"num_steps_per_block": 4, "masking_schedule": "cosine"}),
    "2 steps a block": Setting({"num_steps_per_block": 2}),
    "2 steps a block, cosine": Setting({"num_steps_per_block": 2, "masking_schedule": "cosine"}),
    "no guidance": Setting(image_generation={"guidance_scale": 1.0}),
    "guidance rising all the time": Setting(image_generation={"guidance_ramp": (0.0, 1.0)}),
    "guidance from a half on": Setting(image_generation={"guidance_ramp": (0.5, 0.5)}),
    "SPRINT, text 1.0, images 0.8": Setting({"cache_implementation": "sprint", "cache_config": GENTLE_RATIOS}),
    "SPRINT, 0.5 of all": Setting({"cache_implementation": "sprint"}),
    "token editing above 0.9": Setting({"editing_threshold": 0.9}),
    "re-masking below 0.05": Setting({"remasking_threshold": 0.05}),
    "2 steps a block, re-masking below 0.05": Setting({"num_steps_per_block": 2, "remasking_threshold": 0.05}),
    "blocks of one token": Setting(text_generation={"block_length": 1}),
    "blocks of one token by self-speculation": Setting(
        text_generation={"self_speculation": True, "num_steps_per_block": 1}
    ),
    "first block cache at 0.05": Setting(cache_threshold=0.05),
    "first block cache at 0.2": Setting(cache_threshold=0.2),
    "int8 backbone": Setting(backbone_weights=INT8),
    "int8 backbone and decoder": Setting(backbone_weights=INT8, decoder_weights=INT8),
    "float8 backbone": Setting(backbone_weights=FLOAT8),
    "float8 backbone and decoder": Setting(backbone_weights=FLOAT8, decoder_weights=FLOAT8),
    "8-bit backbone, groups of 64": Setting(backbone_weights=GroupwiseQuantizationConfig(bits=8)),
    "4-bit backbone, groups of 64": Setting(backbone_weights=GroupwiseQuantizationConfig(bits=4)),
    "4-bit backbone, groups of 32": Setting(backbone_weights=GroupwiseQuantizationConfig(bits=4, group_size=32)),
}


def quantized_backbone(folder: Path, weights: str | GroupwiseQuantizationConfig) -> torch.nn.Module:
    if isinstance(weights, str):
        from torchao import quantization

        config = backbone_quantization_config(getattr(quantization, weights)())
    else:
        config = weights
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, quantization_config=config).eval()


def quantized_decoder(folder: Path, weights: str) -> torch.nn.Module:
    from torchao import quantization

    config = diffusers.TorchAoConfig(getattr(quantization, weights)())
    return ZImageTransformer2DModel.from_pretrained(folder, dtype=torch.float32, quantization_config=config).eval()


def make_pipeline(folder: Path, setting: Setting) -> DiffusionPipeline:
    components = {}
    if setting.backbone_weights is not None:
        components["model"] = quantized_backbone(folder / "model", setting.backbone_weights)
    if setting.decoder_weights is not None:
        components["transformer_turbo"] = quantized_decoder(folder / "transformer_turbo", setting.decoder_weights)
    pipe = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32, **components)
    if setting.cache_threshold is not None:
        pipe.enable_decoder_cache(FirstBlockCacheConfig(threshold=setting.cache_threshold))
    return pipe


class Passes:
    """Counts the rows that a language model computes, of the batch and of the branches of guidance."""

    def __init__(self, backbone: torch.nn.Module) -> None:
        self.num_rows = 0
        backbone.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module: torch.nn.Module, arguments: tuple, settings: dict[str, Any]) -> None:
        self.num_rows += len(settings["input_ids"])

    def measure(self, num_subjects: int, measure: Callable[..., float], *args: Any, **settings: Any) -> list[str]:
        """Cells of the table: the share that is right, passes a subject, seconds."""
        before = self.num_rows
        share, seconds = timed(measure, *args, **settings)
        passes = (self.num_rows - before) / num_subjects
        return [f"{100 * share:.1f}%", f"{passes:.1f}", f"{seconds:.0f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", type=Path, help="The folder of the npm packages, see examples/emoji/packages.py.")
    parser.add_argument("--subjects", type=int, default=512, help="emoji to name and to draw")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    table = load_emoji(arguments.packages)
    trained = [emoji for emoji in table if not emoji.is_held_out]
    subjects = random.Random(arguments.seed).sample(trained, arguments.subjects)
    print(f"{len(subjects)} emoji, {torch.get_num_threads()} threads, float32\n")
    print("| setting | names | passes | seconds | drawings | passes | seconds |\n|---|---|---|---|---|---|---|")
    for name in arguments.settings:
        setting = SETTINGS[name]
        if isinstance(setting.backbone_weights, str) and not is_torchao_available():
            print(f"| {name} | torchao is not installed | | | | | |")
            continue
        evaluation = Evaluation(make_pipeline(embedded_checkpoint(), setting), table, arguments.seed)
        passes = Passes(evaluation.pipe.model.get_decoder())
        # What concerns image codes or the decoder alone changes no name, what concerns text alone no drawing.
        names = ["", "", ""]
        if not setting.image_generation and setting.cache_threshold is None and setting.decoder_weights is None:
            options = setting.generation | setting.text_generation
            names = passes.measure(len(subjects), evaluation.naming, subjects, **options)
        drawings = ["", "", ""]
        if not setting.text_generation:
            options = {"generation_kwargs": setting.generation | setting.image_generation}
            drawings = passes.measure(len(subjects), evaluation.drawing, subjects, BEFORE, **options)
        print(f"| {name} | {' | '.join(names + drawings)} |", flush=True)


if __name__ == "__main__":
    main()
