"""
Curves of the training: losses, use of the codebook, loads of the experts.

    pip install matplotlib
    python examples/emoji/plot_training.py runs/emoji src/diffusers_llada_uni/checkpoints/emoji

Reads `trainer_state.json` of each stage's last checkpoint; writes `training.png`, and `training.json` with every
fifth logged value.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from build_model import NUM_CODES


# Stage, what to draw, and whether the axis is logarithmic.
PANELS = (
    ("tokenizer", ("contrastive_loss", "reconstruction_loss", "commitment_loss"), True),
    ("tokenizer", ("codebook_usage", "codebook_perplexity"), False),
    ("tokenizer_alignment", ("loss",), True),
    ("autoencoder", ("loss",), True),
    ("decoder", ("loss",), True),
    ("distill", ("loss",), True),
    ("tokenizer_drawings", ("code_accuracy",), False),
    ("pretraining", ("image_loss", "text_loss"), True),
    ("pretraining", ("max_load_violation",), False),
    ("sft", ("image_loss", "text_loss"), True),
    ("finishing", ("image_loss", "text_loss"), True),
    ("words", ("image_loss", "text_loss"), True),
)


def history_of(stage: Path) -> list[dict[str, Any]]:
    """The log of a stage's newest checkpoint; empty if there is none."""
    checkpoints = sorted(stage.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    if not checkpoints:
        return []
    state = json.loads((checkpoints[-1] / "trainer_state.json").read_text(encoding="utf-8"))
    return state["log_history"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path)
    parser.add_argument("output_dir", type=Path)
    arguments = parser.parse_args()
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    stages = {stage for stage, _, _ in PANELS}
    histories = {stage: history_of(arguments.runs / stage) for stage in sorted(stages)}
    panels = [panel for panel in PANELS if histories[panel[0]]]
    figure, axes = pyplot.subplots((len(panels) + 1) // 2, 2, figsize=(11, 2.6 * ((len(panels) + 1) // 2)))
    for axis, (stage, names, is_logarithmic) in zip(axes.flat, panels, strict=False):
        for name in names:
            points = [(entry["step"], entry[name]) for entry in histories[stage] if name in entry]
            if name == "codebook_perplexity":
                points = [(step, value / NUM_CODES) for step, value in points]
                name = f"codebook_perplexity / {NUM_CODES}"
            axis.plot(*zip(*points, strict=True), label=name)
        axis.set_title(stage)
        axis.set_xlabel("step")
        if is_logarithmic:
            axis.set_yscale("log")
        axis.legend()
        axis.grid(alpha=0.3)
    for axis in list(axes.flat)[len(panels) :]:
        axis.set_visible(False)
    figure.tight_layout()
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    figure.savefig(arguments.output_dir / "training.png", dpi=80)
    summary = {stage: [*history[::5], *history[-1:]] for stage, history in histories.items() if history}
    (arguments.output_dir / "training.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
