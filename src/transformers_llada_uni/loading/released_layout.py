"""How a checkpoint's names and tensors become those in memory, and on saving again those of the release."""

from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, PrefixChange, WeightConverter

from ..configuration_llada2_moe import LLaDA2MoeConfig


# The release stores every expert by itself; in memory the experts of a layer are two fused tensors. A checkpoint with
# a vision tower holds the backbone one name deeper.
register_checkpoint_conversion_mapping(
    LLaDA2MoeConfig.model_type,
    [
        PrefixChange(prefix_to_remove="language_model", model_prefix="model"),
        WeightConverter(
            source_patterns=["mlp.experts.*.gate_proj.weight", "mlp.experts.*.up_proj.weight"],
            target_patterns="mlp.experts.gate_up_proj",
            operations=[MergeModulelist(dim=0), Concatenate(dim=1)],
        ),
        WeightConverter(
            source_patterns="mlp.experts.*.down_proj.weight",
            target_patterns="mlp.experts.down_proj",
            operations=[MergeModulelist(dim=0)],
        ),
    ],
    overwrite=True,
)
