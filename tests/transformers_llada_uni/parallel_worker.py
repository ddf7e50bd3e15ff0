"""What each process of test_parallel.py does: what a sharded model computes, written by the first process."""

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import transformers_llada_uni  # noqa: F401


def compute(checkpoint: str, output: str, settings: list[str]) -> None:
    sizes = {name: int(size) for name, size in (setting.split("=") for setting in settings)}
    model = AutoModelForCausalLM.from_pretrained(checkpoint, distributed_config=DistributedConfig(**sizes)).eval()
    input_ids = torch.arange(48).view(2, 24)
    with torch.no_grad():
        outputs = model(input_ids, labels=input_ids, block_length=8)
    logits = outputs.logits
    logits = logits.full_tensor() if hasattr(logits, "full_tensor") else logits
    settings = {"block_length": 8, "num_steps_per_block": 4, "mask_token_id": 441}
    text = model.generate(input_ids, max_new_tokens=12, **settings)
    codes = model.generate_image_codes(input_ids, (3, 3), **settings)
    if torch.distributed.get_rank() == 0:
        computed = {"logits": logits, "loss": outputs.loss.reshape(1), "text": text, "codes": codes}
        save_file({name: tensor.contiguous() for name, tensor in computed.items()}, output)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
