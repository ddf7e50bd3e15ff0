"""
One training step with the objective of this package against the obvious way to write it, side by side in one run.

    python benchmarks/training.py                                  # the released vocabulary, a small backbone
    python benchmarks/training.py --length 1024 --hidden-size 512 --repeats 5

The obvious way: a complementary pair is two rows of [noisy ; clean], the attention mask is a dense float tensor, and
logits are made at all positions and given to the cross-entropy. Both ways get one batch and one draw of noise; the run
checks that their losses agree. Each measurement is a process of its own (a peak of memory cannot be reset on a CPU),
the two ways alternate, and the medians are printed: seconds of forward and backward, and the memory that they take
beyond the weights.
"""

import argparse
import resource
import statistics
import time

import psutil
import torch
import torch.nn.functional as F
from own_process import in_own_process

from transformers_llada_uni import LLaDA2MoeConfig, LLaDA2MoeForBlockDiffusion
from transformers_llada_uni.training import BlockDiffusionNoise, add_block_diffusion_head


NOISE = BlockDiffusionNoise(complementary=True)


def make_model(options: argparse.Namespace) -> LLaDA2MoeForBlockDiffusion:
    torch.manual_seed(0)
    hidden_size = options.hidden_size
    config = LLaDA2MoeConfig(
        vocab_size=options.vocab_size,
        hidden_size=hidden_size,
        intermediate_size=hidden_size * 5 // 2,
        moe_intermediate_size=hidden_size // 4,
        num_hidden_layers=options.layers,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=hidden_size // 8,
        num_experts=32,
        num_experts_per_tok=4,
        mask_token_id=options.vocab_size - 1,
    )
    return LLaDA2MoeForBlockDiffusion(config).to(options.device).train()


def make_batch(options: argparse.Namespace) -> dict[str, torch.Tensor]:
    """One document a row whose first part, the prompt, carries no loss."""
    generator = torch.Generator().manual_seed(0)
    shape = (options.batch_size, options.length)
    input_ids = torch.randint(0, options.vocab_size - 1, shape, generator=generator)
    labels = input_ids.clone()
    labels[:, : int(options.length * options.prompt_share)] = -100
    masked, weights = NOISE.sample(labels, None, 32, generator)
    batch = {"input_ids": input_ids, "labels": labels, "masked": masked, "weights": weights}
    return {name: tensor.to(options.device) for name, tensor in batch.items()}


def package_loss(model, input_ids, labels, masked, weights) -> torch.Tensor:
    outputs = model(input_ids=input_ids, labels=labels, masked=masked, weights=weights, fused_lm_head=True)
    return -outputs.log_probs.sum() / (labels != -100).sum()


def obvious_loss(model, input_ids, labels, masked, weights) -> torch.Tensor:
    batch_size, num_copies, length = masked.shape
    blocks = torch.arange(length, device=input_ids.device) // 32
    own, earlier, not_later = (compare(blocks[:, None], blocks) for compare in (torch.eq, torch.gt, torch.ge))
    visible = torch.cat([torch.cat([own, earlier], dim=1), torch.cat([torch.zeros_like(own), not_later], dim=1)])
    mask = torch.zeros(visible.shape, device=input_ids.device).masked_fill(~visible, torch.finfo(torch.float32).min)

    clean = input_ids.repeat_interleave(num_copies, dim=0)
    noisy = clean.masked_fill(masked.flatten(0, 1), model.config.mask_token_id)
    positions = torch.arange(length, device=input_ids.device).repeat(2)[None]
    logits = model(
        input_ids=torch.cat([noisy, clean], dim=1),
        attention_mask=mask.to(model.dtype).expand(batch_size * num_copies, 1, -1, -1),
        position_ids=positions,
    ).logits[:, :length]
    targets = labels.repeat_interleave(num_copies, dim=0)
    losses = F.cross_entropy(logits.float().transpose(1, 2), targets, reduction="none", ignore_index=-100)
    return (losses * weights.flatten(0, 1)).sum() / (labels != -100).sum()


METHODS = {"obvious": obvious_loss, "this package": package_loss}


def measure(method: str, options: argparse.Namespace, results) -> None:
    """Two steps in this process; the second one is timed."""
    model, batch = make_model(options), make_batch(options)
    if method == "this package":
        add_block_diffusion_head(model)
    on_gpu = options.device.startswith("cuda")
    if on_gpu:
        before = torch.cuda.memory_allocated()
    else:
        before = psutil.Process().memory_info().rss
    for _ in range(2):
        model.zero_grad()
        start = time.perf_counter()
        loss = METHODS[method](model, **batch)
        loss.backward()
        if on_gpu:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    if on_gpu:
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    results.send((loss.item(), seconds, (peak - before) / 2**30))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab-size", type=int, default=173_568)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--prompt-share", type=float, default=0.25, help="share of a row that carries no loss")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()

    measured = {method: [] for method in METHODS}
    for _ in range(options.repeats):
        for method, values in measured.items():
            values.append(in_own_process(method, measure, method, options))

    losses = [values[0][0] for values in measured.values()]
    if abs(losses[0] - losses[1]) > 1e-3 * abs(losses[0]):
        raise SystemExit(f"The losses differ: {losses}.")
    seconds, memory = ({m: statistics.median(v[i] for v in vs) for m, vs in measured.items()} for i in (1, 2))
    print(f"loss {losses[0]:.4f} (obvious), {losses[1]:.4f} (this package)")
    print(f"{'':14} {'seconds':>9} {'ratio':>7} {'GiB':>7} {'ratio':>7}")
    for method in METHODS:
        time_ratio, memory_ratio = seconds["obvious"] / seconds[method], memory["obvious"] / memory[method]
        print(f"{method:14} {seconds[method]:9.2f} {time_ratio:6.2f}x {memory[method]:7.2f} {memory_ratio:6.2f}x")


if __name__ == "__main__":
    main()
