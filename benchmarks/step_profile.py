"""
Where the time of a step goes: the model of `block_diffusion.py` decodes text, and torch's profiler looks on.

    python benchmarks/step_profile.py

The kernels' share of a step is the profiler's; it slows what it looks at, so the step's own time is taken without it.
What Python and the dispatch of operators cost at most is measured apart, on a model of the same layers and experts, so
narrow that there is little to compute: as its step less its compiled kernels, which have nothing of either.
"""

import argparse
import time
from collections import defaultdict

import torch
from block_diffusion import Method, make_call, make_model
from torch.profiler import ProfilerActivity, profile


NUM_LAYERS, NUM_EXPERTS, NARROW = 8, 64, 32
METHODS = {
    "eager": Method({}),
    "fused experts": Method({}, "fused_gather"),
    "compiled": Method({}, "fused_gather", is_compiled=True),
}
# What a name in the profile belongs to; the first that matches.
KINDS = {
    "attention": ("scaled_dot_product",),
    "compiled kernels": ("cpp_fused",),
    "products of matrices": ("_grouped_mm", "aten::mm", "aten::addmm", "aten::bmm"),
    "small operations": ("",),
}


def milliseconds(hidden_size: int, method: Method, num_new_tokens: int) -> tuple[float, dict[str, float]]:
    """Of a forward: in all, and of each kind of kernel."""
    model = make_model("small", hidden_size, NUM_LAYERS, NUM_EXPERTS)
    call = make_call(model, "small", 1, 64, num_new_tokens, False)
    times: list[float] = []
    call(method, times)  # warms up, compiles
    num_forwards, seconds = len(times), []
    for _ in range(3):
        start = time.perf_counter()
        call(method)
        seconds.append(time.perf_counter() - start)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        call(method)
    kinds = defaultdict(float)
    for event in profiler.key_averages():
        kind = next(kind for kind, words in KINDS.items() if any(word in event.key for word in words))
        kinds[kind] += event.self_cpu_time_total / 1e3 / num_forwards
    return 1e3 * min(seconds) / num_forwards, dict(kinds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    arguments = parser.parse_args()
    torch._inductor.config.cpp.enable_kernel_profile = True  # else the profiler sees whole graphs, with their Python
    names = ["method", "ms a step", *KINDS, f"ms at hidden size {NARROW}", "overhead at most", "of a step"]
    print(f"{torch.get_num_threads()} threads\n\n| {' | '.join(names)} |\n|{'---|' * len(names)}")
    for name in arguments.methods:
        step, kinds = milliseconds(arguments.hidden_size, METHODS[name], arguments.new_tokens)
        narrow_step, narrow_kinds = milliseconds(NARROW, METHODS[name], arguments.new_tokens)
        overhead = narrow_step - narrow_kinds.get("compiled kernels", 0)
        cells = [name, f"{step:.1f}", *(f"{kinds.get(kind, 0):.1f}" for kind in KINDS)]
        cells += [f"{narrow_step:.1f}", f"{overhead:.1f}", f"{100 * overhead / step:.0f}%"]
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
