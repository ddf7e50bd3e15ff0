"""
The kernels of routed experts on a GPU: are they right, which tiles are best, how near to the memory's speed are they.

    python benchmarks/experts_gpu.py [--seconds 65] [--output experts_gpu.json]
    python benchmarks/experts_gpu.py --tiny    # all of it in Triton's interpreter, on a CPU, to try the script

Every kind of weight is compared with float64. Then, most important first, tiles of the two products are timed in the
released shape, each alone in a CUDA graph over layers with weights of their own, so that these come from memory; then
all four launches with the best tiles, next to `grouped_mm` in a graph too. Experts are chosen uniformly, as a trained
router nearly does. `%` is what has to be read, the weights of the experts used, by the time, as a share of the speed
of a copy that is measured first. What is not begun in `--seconds`, imports not counted, is left out. The tiles in the
last table belong into `src/transformers_llada_uni/kernels/expert_tiles.py`.
"""

import argparse
import dataclasses
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable


if "--tiny" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

import torch
import torch.nn.functional as F
import triton
from torch import nn
from transformers.integrations.moe import grouped_mm_experts_forward
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeExperts

from transformers_llada_uni import LLaDA2MoeConfig
from transformers_llada_uni.kernels import experts_kernels as products
from transformers_llada_uni.kernels.expert_tiles import FLOAT32_TILES, TILES, Tile, choose_tiles
from transformers_llada_uni.kernels.expert_weights import ExpertWeights, quantize_experts
from transformers_llada_uni.kernels.experts_dequantized import experts_one_by_one
from transformers_llada_uni.kernels.experts_triton import triton_experts


@dataclasses.dataclass(frozen=True)
class Shape:
    experts: int
    top_k: int
    hidden: int
    intermediate: int
    group: int  # columns that share a scale
    layers: int  # that are timed in turn
    model_layers: int  # of the whole model


RELEASED = Shape(256, 8, 2048, 512, 64, 8, 19)
SMALL = Shape(32, 4, 256, 128, 64, 1, 1)
TINY = Shape(8, 2, 64, 32, 16, 2, 3)
GATE_UP, DOWN = "gate and up", "down"
SHARE_OF_SWEEP = 0.75  # of the time; the rest is for the comparison

# By kind and rows of a tile: tokens to time, and tiles (columns, reduction, stages, warps) of both products. The first
# are the recorded ones; the order is that of importance.
PLAIN_FEW = {
    GATE_UP: [(64, 128, 3, 4), (32, 128, 4, 4), (64, 128, 4, 4), (32, 256, 3, 4), (64, 64, 5, 4), (128, 64, 3, 4)],
    DOWN: [(128, 128, 3, 4), (64, 128, 4, 4), (64, 256, 3, 4), (128, 64, 4, 4), (64, 128, 3, 4)],
}
SWEEP = [
    ("plain", 16, [64, 32, 128, 256], PLAIN_FEW),
    (
        "plain",
        64,
        [1024, 512, 2048],
        {
            GATE_UP: [(64, 64, 4, 4), (128, 64, 3, 8), (64, 128, 3, 4)],
            DOWN: [(128, 64, 4, 4), (128, 128, 3, 8), (256, 64, 3, 8)],
        },
    ),
    (
        "plain",
        32,
        [256, 512, 128, 1024],
        {GATE_UP: [(64, 128, 3, 4), (64, 64, 4, 4)], DOWN: [(128, 128, 3, 4), (64, 128, 4, 4)]},
    ),
    (
        "float8",
        16,
        [64, 32, 128],
        {
            GATE_UP: [(64, 128, 4, 4), (32, 128, 5, 4), (64, 128, 3, 4), (128, 128, 3, 8)],
            DOWN: [(128, 128, 4, 4), (64, 128, 5, 4), (128, 128, 3, 8)],
        },
    ),
    (
        "float8",
        64,
        [1024],
        {GATE_UP: [(64, 64, 5, 4), (64, 128, 3, 4), (128, 128, 3, 8)], DOWN: [(128, 64, 4, 4), (64, 64, 5, 4)]},
    ),
    ("float8", 32, [256, 512, 1024], {GATE_UP: [(64, 128, 4, 4)], DOWN: [(128, 128, 4, 4)]}),
    (
        "int4",
        16,
        [64, 32, 128],
        {
            GATE_UP: [(64, 64, 5, 4), (32, 64, 6, 4), (128, 64, 4, 8)],
            DOWN: [(128, 64, 5, 4), (64, 64, 5, 4), (256, 64, 4, 8)],
        },
    ),
    ("plain", 128, [2048, 1024, 4096], {GATE_UP: [(128, 64, 3, 8)], DOWN: [(128, 64, 3, 8), (256, 64, 3, 8)]}),
    ("int4", 32, [256, 1024], {GATE_UP: [(64, 64, 5, 4)], DOWN: [(128, 64, 5, 4)]}),
    ("int4", 64, [1024], {GATE_UP: [(64, 64, 3, 4)], DOWN: [(128, 64, 3, 8)]}),
    ("int8", 16, [64, 32], {GATE_UP: [(64, 64, 4, 4)], DOWN: [(128, 64, 4, 4)]}),
]
TOKENS = [64, 32, 1024, 128, 256, 512, 2048, 8, 16, 4096]  # of the comparison with grouped_mm
TINY_SWEEP = [(kind, 16, [4], {GATE_UP: [(32, 16, 3, 4)], DOWN: [(64, 16, 3, 4)]}) for kind in ("plain", "int4")]
TINY_TOKENS = [4, 9]


class Benchmark:
    def __init__(self, shape: Shape, dtype: torch.dtype, device: str, seconds: float):
        self.shape, self.dtype, self.device = shape, dtype, device
        self.start, self.seconds = time.perf_counter(), seconds
        self.left_out = 0
        if device == "cuda":
            self.stream, self.pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
            # torch gives up a pool with its last graph, and fails when another one then asks for it.
            self.keeper = self._record(lambda _: torch.zeros(1, device=device), 1)
        self._layers: dict[str, list[tuple[ExpertWeights, ExpertWeights]]] = {}
        self.bandwidth = self._copy_bandwidth()

    def is_over(self, part: float = 1.0) -> bool:
        is_over = time.perf_counter() - self.start > part * self.seconds
        self.left_out += is_over
        return is_over

    def milliseconds(self, run: Callable[[int], object], repeats: int = 7) -> float:
        """Of one layer, the median; `run` takes the layer. All layers are one CUDA graph."""
        layers = range(self.shape.layers)
        if self.device == "cpu":
            start = time.perf_counter()
            for layer in layers:
                run(layer)
            return 1e3 * (time.perf_counter() - start) / len(layers)
        run(0)  # compiles
        torch.cuda.synchronize()
        graph = self._record(run, self.shape.layers)
        events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 2)]
        graph.replay()
        for event in events:
            event.record()
            graph.replay()
        torch.cuda.synchronize()
        times = [one.elapsed_time(next_one) for one, next_one in zip(events, events[1:], strict=False)]
        return statistics.median(times) / len(layers)

    def _record(self, run: Callable[[int], object], layers: int) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        # Not `torch.cuda.graph`, which hands all free memory back each time.
        with torch.cuda.stream(self.stream):
            graph.capture_begin(pool=self.pool)
            try:
                for layer in range(layers):
                    run(layer)
            finally:
                graph.capture_end()
        return graph

    def _copy_bandwidth(self) -> float:
        """Bytes a second, read and written."""
        if self.device == "cpu":
            return 1e10
        source = torch.randn(1 << 30, dtype=torch.bfloat16, device=self.device)
        target = torch.empty_like(source)
        events = [torch.cuda.Event(enable_timing=True) for _ in range(8)]
        for event in events:
            target.copy_(source)
            event.record()
        torch.cuda.synchronize()
        times = [one.elapsed_time(next_one) for one, next_one in zip(events[2:], events[3:], strict=False)]
        return 2 * source.nbytes / (statistics.median(times) / 1e3)

    def layers(self, kind: str) -> list[tuple[ExpertWeights, ExpertWeights]]:
        """Gate and up, and down, of all layers; they hold the same numbers, each at a place of its own."""
        if kind not in self._layers:
            if kind != "plain":  # not more than two kinds are held
                self._layers = {name: layers for name, layers in self._layers.items() if name == "plain"}
            first = weights_of(self.shape, kind, self.dtype, self.device)
            copies = [tuple(copy_of(weights) for weights in first) for _ in range(self.shape.layers - 1)]
            self._layers[kind] = [first, *copies]
        return self._layers[kind]

    def inputs(self, tokens: int) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """States, indices and weights of each layer."""
        generator = torch.Generator(self.device).manual_seed(tokens)
        return [inputs_of(self.shape, tokens, self.dtype, generator) for _ in range(self.shape.layers)]

    def gigabytes(self, weights: list[ExpertWeights], inputs: list) -> tuple[float, float]:
        """Bytes of the weights of the experts used, in a layer on average, in 1e9; and how many experts that are."""
        used = statistics.mean(len(index.unique()) for _, index, _ in inputs)
        return sum(part.nbytes for part in weights) * used / self.shape.experts / 1e9, used

    def share(self, gigabytes: float, milliseconds: float) -> float:
        return 100 * gigabytes * 1e9 / (milliseconds / 1e3) / self.bandwidth


def weights_of(shape: Shape, kind: str, dtype: torch.dtype, device: str) -> tuple[ExpertWeights, ExpertWeights]:
    generator = torch.Generator(device).manual_seed(0)
    sizes = {"group_size": shape.group, "block_size": (128, 128), "scale_dtype": None}
    found = []
    for rows, columns, parts in ((2 * shape.intermediate, shape.hidden, 2), (shape.hidden, shape.intermediate, 1)):
        weight = torch.empty(shape.experts, rows, columns, dtype=dtype, device=device)
        weight.normal_(std=columns**-0.5, generator=generator)
        found.append(quantize_experts(weight, kind, parts=parts, **sizes))
    return tuple(found)


def inputs_of(shape: Shape, tokens: int, dtype: torch.dtype, generator: torch.Generator):
    device = generator.device
    states = torch.randn(tokens, shape.hidden, generator=generator, device=device).to(dtype)
    index = torch.rand(tokens, shape.experts, generator=generator, device=device).topk(shape.top_k).indices
    weights = torch.rand(tokens, shape.top_k, generator=generator, device=device)
    return states, index, (2.5 * weights / weights.sum(dim=-1, keepdim=True)).to(dtype)


def copy_of(weights: ExpertWeights) -> ExpertWeights:
    scales = None if weights.scales is None else weights.scales.clone()
    return dataclasses.replace(weights, data=weights.data.clone(), scales=scales)


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def grouped_mm(gate_up: ExpertWeights, down: ExpertWeights) -> Callable:
    shape = {"hidden_size": gate_up.in_features, "moe_intermediate_size": down.in_features}
    with torch.device("meta"):
        experts = Glm4MoeExperts(LLaDA2MoeConfig(num_experts=len(gate_up.data), n_group=1, topk_group=1, **shape))
    experts.gate_up_proj = nn.Parameter(gate_up.data, requires_grad=False)
    experts.down_proj = nn.Parameter(down.data, requires_grad=False)
    return lambda *inputs: grouped_mm_experts_forward(experts, *inputs)


def check(benchmark: Benchmark, dtypes: list[torch.dtype]) -> dict[str, float]:
    """Relative errors against the formula in float64, with the weights that are stored."""
    shape = TINY if benchmark.device == "cpu" else SMALL
    errors = {}
    for dtype in dtypes:
        cells = []
        for kind in ("plain", "float8", "int4", "int8"):
            if benchmark.is_over():
                continue
            weights = weights_of(shape, kind, dtype, benchmark.device)
            generator = torch.Generator(benchmark.device).manual_seed(1)
            states, index, factors = inputs_of(shape, 24, dtype, generator)
            wanted = experts_one_by_one(states.double(), *weights, index, factors.double())
            found = {f"{kind} {dtype}": triton_experts(states, *weights, index, factors)}
            if kind == "plain":
                found[f"grouped_mm {dtype}"] = grouped_mm(*weights)(states, index, factors)
            for name, output in found.items():
                errors[name] = relative_error(output, wanted)
                cells.append(f"{name.split()[0]} {errors[name]:.1e}")
        print(f"error, {str(dtype).removeprefix('torch.')}: {', '.join(cells)}", flush=True)
    return errors


@dataclasses.dataclass
class Work:
    """What both products are given, for each layer: the same number of tokens, and routes of their own."""

    tokens: int
    inputs: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
    orders: list[tuple[torch.Tensor, torch.Tensor]]
    hidden: torch.Tensor  # silu(gate) * up, of any layer

    def run(self, product: str, weights: tuple[ExpertWeights, ExpertWeights], layer: int, tile: Tile) -> torch.Tensor:
        states, _, factors = self.inputs[layer]
        if product == DOWN:
            return products.down(self.hidden, weights[1], factors, *self.orders[layer], tile)
        return products.gate_and_up(states, weights[0], *self.orders[layer], tile)


def work_of(benchmark: Benchmark, tokens: int) -> Work:
    inputs = benchmark.inputs(tokens)
    orders = [products.order_pairs(index, benchmark.shape.experts) for _, index, _ in inputs]
    hidden = torch.randn(tokens * benchmark.shape.top_k, benchmark.shape.intermediate, device=benchmark.device)
    return Work(tokens, inputs, orders, hidden.to(benchmark.dtype))


def reference(weights: tuple[ExpertWeights, ExpertWeights], work: Work) -> dict[str, torch.Tensor]:
    """Both products of the first layer, in float32."""
    (states, index, factors), (pairs, offsets) = work.inputs[0], work.orders[0]
    gate_up, down = (part.dequantize(torch.float32) for part in weights)
    wanted = {GATE_UP: torch.empty_like(work.hidden, dtype=torch.float32)}
    wanted[DOWN] = down.new_empty(len(pairs), down.shape[1])
    bounds, pairs = offsets.tolist(), pairs.long()
    for expert, (first, last) in enumerate(zip(bounds, bounds[1:], strict=False)):
        own = pairs[first:last]
        gate, up = F.linear(states[own // index.shape[1]].float(), gate_up[expert]).chunk(2, dim=-1)
        wanted[GATE_UP][first:last] = F.silu(gate) * up
        outputs = F.linear(work.hidden[first:last].float(), down[expert])
        wanted[DOWN][own] = outputs * factors.flatten()[own, None].float()
    return wanted


def sweep(benchmark: Benchmark, plan: list) -> list[dict]:
    """Times of every tile of the plan; a dict each of kind, product, tile, tokens, milliseconds, share, error."""
    results = []
    for kind, rows, all_tokens, tiles_of_product in plan:
        if benchmark.is_over(SHARE_OF_SWEEP):
            continue
        layers, works = benchmark.layers(kind), [work_of(benchmark, tokens) for tokens in all_tokens]
        wanted = reference(layers[0], works[0])
        print(f"{kind}, {rows} rows a tile: microseconds (%) for {', '.join(map(str, all_tokens))} tokens", flush=True)
        for product, tiles in tiles_of_product.items():
            for sizes in tiles:
                if benchmark.is_over(SHARE_OF_SWEEP):
                    continue
                try:
                    found = time_tile(benchmark, kind, product, Tile(rows, *sizes), works, wanted[product])
                except Exception as failure:  # a tile that does not fit must not end the rest
                    print(f"  {product:11} {sizes} {type(failure).__name__}: {str(failure)[:80]}", flush=True)
                    continue
                cells = [f"{1e3 * result['milliseconds']:.0f} ({result['share']:.0f})" for result in found]
                print(f"  {product:11} {str(sizes):17} {'  '.join(cells)}  error {found[0]['error']:.1e}", flush=True)
                results += found
    return results


def time_tile(
    benchmark: Benchmark, kind: str, product: str, tile: Tile, works: list[Work], wanted: torch.Tensor
) -> list[dict]:
    layers, results = benchmark.layers(kind), []
    error = relative_error(works[0].run(product, layers[0], 0, tile), wanted)
    for work in works:
        gigabytes, _ = benchmark.gigabytes([layers[0][product == DOWN]], work.inputs)
        milliseconds = benchmark.milliseconds(lambda layer, work=work: work.run(product, layers[layer], layer, tile))
        results.append(
            {"kind": kind, "product": product, "tokens": work.tokens, "tile": dataclasses.astuple(tile)}
            | {"milliseconds": milliseconds, "share": benchmark.share(gigabytes, milliseconds), "error": error}
        )
    return results


def best_tile(results: list[dict], kind: str, product: str, tokens: int) -> Tile | None:
    found = [r for r in results if (r["kind"], r["product"], r["tokens"]) == (kind, product, tokens)]
    return Tile(*min(found, key=lambda r: r["milliseconds"])["tile"]) if found else None


def compare(benchmark: Benchmark, results: list[dict], all_tokens: list[int]) -> list[dict]:
    """All four launches against grouped_mm; where no tile was timed, with the recorded ones."""
    shape, rows = benchmark.shape, []
    print(
        f"\n{shape.model_layers} layers, ms (%)\n| weights | tokens | experts used | GB | ours | grouped_mm | tiles |"
    )
    print("|---|---|---|---|---|---|---|")
    for kind in dict.fromkeys(["plain", *(result["kind"] for result in results)]):
        for tokens in all_tokens:
            if benchmark.is_over():
                continue
            tiles = [best_tile(results, kind, product, tokens) for product in (GATE_UP, DOWN)]
            if kind != "plain" and None in tiles:
                continue
            layers, inputs = benchmark.layers(kind), benchmark.inputs(tokens)
            gigabytes, used = benchmark.gigabytes(layers[0], inputs)
            table = FLOAT32_TILES if benchmark.dtype == torch.float32 else TILES[kind]
            recorded = list(table)
            num_pairs = tokens * shape.top_k
            guessed = choose_tiles(*layers[0], benchmark.dtype, num_pairs, 227 * 1024)
            tiles = [tile or guess for tile, guess in zip(tiles, guessed, strict=True)]
            table[:] = [(math.inf, *tiles)]
            try:
                milliseconds = benchmark.milliseconds(
                    lambda layer, layers=layers, inputs=inputs: triton_experts(
                        inputs[layer][0], *layers[layer], *inputs[layer][1:]
                    )
                )
            finally:
                table[:] = recorded
            other = math.nan
            if kind == "plain":
                others = [grouped_mm(*weights) for weights in layers]
                other = benchmark.milliseconds(
                    lambda layer, others=others, inputs=inputs: others[layer](*inputs[layer])
                )
            share = benchmark.share(gigabytes, milliseconds)
            print(
                f"| {kind} | {tokens} | {used:.0f} | {gigabytes * shape.model_layers:.1f} | "
                f"{milliseconds * shape.model_layers:.2f} ({share:.0f}) | {other * shape.model_layers:.2f} | "
                f"{' '.join(str(dataclasses.astuple(tile)) for tile in tiles)} |",
                flush=True,
            )
            rows.append(
                {"kind": kind, "tokens": tokens, "experts_used": used, "gigabytes": gigabytes, "share": share}
                | {"milliseconds": milliseconds, "grouped_mm": other, "tiles": list(map(dataclasses.astuple, tiles))}
            )
    return rows


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=65.0, help="After which nothing more is begun")
    parser.add_argument("--output", help="A file for all figures, as JSON")
    parser.add_argument("--tiny", action="store_true", help="On a CPU, in Triton's interpreter, in float32")
    arguments = parser.parse_args()
    device = "cpu" if arguments.tiny else "cuda"
    shape, dtype = (TINY, torch.float32) if arguments.tiny else (RELEASED, torch.bfloat16)
    benchmark = Benchmark(shape, dtype, device, arguments.seconds)
    name = "CPU" if arguments.tiny else torch.cuda.get_device_name()
    print(
        f"{name}, torch {torch.__version__}, Triton {triton.__version__}, copy {benchmark.bandwidth / 1e12:.2f} TB/s"
    )
    errors = check(benchmark, [dtype])
    results = sweep(benchmark, TINY_SWEEP if arguments.tiny else SWEEP)
    comparison = compare(benchmark, results, TINY_TOKENS if arguments.tiny else TOKENS)
    errors |= check(benchmark, [] if arguments.tiny else [torch.float16, torch.float32])
    print(f"\n{time.perf_counter() - benchmark.start:.0f} s; {benchmark.left_out} parts left out for want of time")
    if arguments.output:
        with open(arguments.output, "w") as file:
            json.dump(
                {"device": name, "shape": dataclasses.asdict(shape), "bandwidth": benchmark.bandwidth}
                | {"errors": errors, "tiles": results, "comparison": comparison},
                file,
                indent=1,
            )


if __name__ == "__main__":
    main()
