"""
The three phases in which LLaDA2.0-Uni's decoder is trained (arXiv 2604.20796), as presets of what is trained.

- `"warmup"` trains the layers that draw; the semantic processor, which makes the codes' features what they look at,
  is frozen.
- `"all_domains"` trains everything, on images of all kinds.
- `"refinement"` trains everything on, slower, on the best of them.

From the paper are their order and that the semantic processor is frozen in the first. It does not list the
processor's parameters: we count all that only codes go through, from the embedder to the refiner of their features.
Learning rates are ours, and which images a phase sees is the data's affair.
"""

from dataclasses import dataclass


# What the name of a parameter of [`DecoderModule`] says it belongs to; the first that matches.
DECODER_PARTS = {
    "semantic_embedder": r"^semantic_embedder\.",
    "semantic_refiner": r"^transformer\.(cap_embedder|cap_pad_token|context_refiner)\b",
    "image_layers": r"^transformer\.",
}


@dataclass(frozen=True)
class DecoderStage:
    """
    What a stage sets where the user does not.

    Args:
        trained_parts: Names among `DECODER_PARTS`; all else is frozen.
        learning_rate: The peak.
    """

    trained_parts: tuple[str, ...]
    learning_rate: float


DECODER_STAGES = {
    "warmup": DecoderStage(trained_parts=("image_layers",), learning_rate=1e-4),
    "all_domains": DecoderStage(trained_parts=tuple(DECODER_PARTS), learning_rate=1e-4),
    "refinement": DecoderStage(trained_parts=tuple(DECODER_PARTS), learning_rate=1e-5),
}
