"""One checkpoint of the usual layout from the shards that a training run of several processes wrote."""

import shutil
from pathlib import Path

from transformers import AutoConfig
from transformers.distributed.checkpoint import is_sharded_checkpoint

from .folder_writing import copy_chat_templates, folder_at_once
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
        ValueError: if `checkpoint` holds no shards, or is of another model.
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
    if config.model_type not in AUTO_CLASSES:
        raise ValueError(f"`checkpoint` {str(checkpoint)!r} is of the model {config.model_type!r}, which is not ours.")
    model = AUTO_CLASSES[config.model_type].from_pretrained(checkpoint)
    # Shards hold fused experts, and it would be saved as it was read: now it is saved as a model made anew.
    model._weight_conversions = None

    with folder_at_once(output) as folder:
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        for file in checkpoint.iterdir():
            if file.suffix in (".json", ".jinja") and _describes_processing(file):
                shutil.copy(file, folder / file.name)
        copy_chat_templates(checkpoint, folder)


def _describes_processing(file: Path) -> bool:
    return any(word in file.name for word in ("token", "processor", "chat_template", "vocab", "merges"))
