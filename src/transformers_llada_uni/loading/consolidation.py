"""One checkpoint of the usual layout from the shards that a training run of several processes wrote."""

import shutil
from pathlib import Path

from transformers import AutoConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.distributed.checkpoint import is_sharded_checkpoint

from .model_loading import AUTO_CLASSES


def consolidate_checkpoint(checkpoint: str | Path, output: str | Path, max_shard_size: str = "5GB") -> None:
    """
    Loads a sharded checkpoint in one process and saves it as `from_pretrained` and the serving engines expect it:
    whole tensors, one entry for each expert. Tokenizer and processor files are copied.

    Args:
        checkpoint: A folder that a sharded training run wrote (`checkpoint-N`).
        output: The folder to write.
        max_shard_size: Size of the largest file, such as `"5GB"`.

    Raises:
        ValueError: if `checkpoint` holds no shards.
        FileExistsError: if `output` exists.
    """
    checkpoint, output = Path(checkpoint), Path(output)
    if not is_sharded_checkpoint(checkpoint):
        raise ValueError(
            f"`checkpoint` {str(checkpoint)!r} holds no shards of a distributed run; it can be used as it is."
        )
    if output.exists():
        raise FileExistsError(f"`output` {str(output)!r} exists already.")
    config = AutoConfig.from_pretrained(checkpoint)
    model = AUTO_CLASSES[config.model_type].from_pretrained(checkpoint)
    # Shards hold fused experts; with these a model knows how its experts are laid out on disk.
    model._weight_conversions = get_model_conversion_mapping(model)

    part = output.with_name(output.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    model.save_pretrained(part, max_shard_size=max_shard_size)
    for file in checkpoint.iterdir():
        if file.suffix in (".json", ".jinja") and not (part / file.name).exists() and _describes_processing(file):
            shutil.copy(file, part / file.name)
    part.rename(output)


def _describes_processing(file: Path) -> bool:
    return any(word in file.name for word in ("token", "processor", "chat_template", "vocab", "merges"))
