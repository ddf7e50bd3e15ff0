"""
From codes to latents: condition per step against once per picture, decoder reloaded per picture against resident.

    python benchmarks/decoder.py
    python benchmarks/decoder.py --grid 16 --repeats 5

All methods decode the same codes with one random mid-size decoder from the same noise, in alternating runs; a row is
their median. "reloaded, per step" is what the release does: it reads the decoder from disk for every picture (here
safetensors from the page cache). All latents must be equal bit for bit; the run checks that.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from unittest.mock import patch

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, ZImageTransformer2DModel
from torch.utils.flop_counter import FlopCounterMode

from diffusers_llada_uni import LLaDAUniPipeline, LLaDAUniSemanticEmbedder


CODEBOOK_SIZE = 1024
DECODINGS = {
    "turbo": {"decoder": "turbo", "num_inference_steps": 8},
    "normal, guided": {"decoder": "normal", "num_inference_steps": 13},
}


def make_pipeline(dim: int, num_layers: int) -> LLaDAUniPipeline:
    torch.manual_seed(0)
    # heads of 64; two refiners of each kind, as in the released decoder, which has 30 layers
    transformer = ZImageTransformer2DModel(
        dim=dim,
        n_layers=num_layers,
        n_refiner_layers=2,
        n_heads=dim // 64,
        n_kv_heads=dim // 64,
        cap_feat_dim=dim,
        axes_dims=[16, 24, 24],
        axes_lens=[8192, 256, 256],
    ).eval()
    pipeline = LLaDAUniPipeline(
        model=None,
        processor=None,
        semantic_embedder=LLaDAUniSemanticEmbedder(CODEBOOK_SIZE, embedding_dim=dim).eval(),
        vae=None,
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
        transformer_turbo=transformer,
        scheduler_turbo=FlowMatchEulerDiscreteScheduler(shift=1.0, stochastic_sampling=True),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def make_methods(pipeline: LLaDAUniPipeline, folder: str, grid: int) -> dict[str, Callable[..., torch.Tensor]]:
    codes = torch.randint(CODEBOOK_SIZE, (1, grid, grid), generator=torch.Generator().manual_seed(0))

    def once_per_picture(**arguments) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return pipeline.decode_codes(codes, output_type="latent", generator=generator, **arguments)

    def per_step(**arguments) -> torch.Tensor:
        with patch("diffusers_llada_uni.stepped_decoder.with_remembered_condition", lambda transformer: transformer):
            return once_per_picture(**arguments)

    def reloaded(**arguments) -> torch.Tensor:
        transformer = ZImageTransformer2DModel.from_pretrained(folder).eval()
        pipeline.register_modules(transformer=transformer, transformer_turbo=transformer)
        return per_step(**arguments)

    return {"reloaded, per step": reloaded, "resident, per step": per_step, "resident, once": once_per_picture}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", type=int, default=8, help="codes down and across")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dim", type=int, default=512, help="a multiple of 64")
    parser.add_argument("--layers", type=int, default=30)
    arguments = parser.parse_args()

    pipeline = make_pipeline(arguments.dim, arguments.layers)
    parameters = sum(parameter.numel() for parameter in pipeline.transformer.parameters())
    print(
        f"{parameters / 1e6:.0f}M parameters, {arguments.layers} layers, {arguments.grid} x {arguments.grid} codes at "
        f"upscale 2, float32, {torch.get_num_threads()} threads\n"
    )
    print("| decoder | method | GFLOP | seconds | speed-up |")
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        pipeline.transformer.save_pretrained(folder)
        methods = make_methods(pipeline, folder, arguments.grid)
        for decoding, settings in DECODINGS.items():
            operations = {}
            for name, method in methods.items():  # warms up, too
                with FlopCounterMode(display=False) as counter:
                    method(**settings)
                operations[name] = counter.get_total_flops() / 1e9
            seconds = {name: [] for name in methods}
            for _ in range(arguments.repeats):
                latents = []
                for name, method in methods.items():
                    start = time.perf_counter()
                    latents.append(method(**settings))
                    seconds[name].append(time.perf_counter() - start)
                assert all(torch.equal(latents[0], other) for other in latents), f"{decoding}: latents differ"
            reloaded = statistics.median(seconds["reloaded, per step"])
            for name, times in seconds.items():
                median = statistics.median(times)
                print(
                    f"| {decoding} | {name} | {operations[name]:.1f} | {median:.2f} | {reloaded / median:.2f}x |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
