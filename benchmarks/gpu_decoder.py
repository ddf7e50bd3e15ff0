"""Sections of the decoder, in the released shape with random weights; and of whole pictures, from prompt to pixels."""

import math
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImageTransformer2DModel
from gpu_decoding import LoopResults
from gpu_machine import Machine
from gpu_model import size_of
from gpu_report import Section, free_memory, timed
from gpu_workload import SCALES, STEPS, Task, Workload
from memory import VAE

from diffusers_llada_uni import LLaDAUniPipeline, LLaDAUniSemanticEmbedder


TINY_TRANSFORMER = {
    "dim": 128,
    "n_layers": 2,
    "n_refiner_layers": 1,
    "n_heads": 2,
    "n_kv_heads": 2,
    "cap_feat_dim": 64,
    "axes_dims": [16, 24, 24],
}
TINY_VAE = {"block_out_channels": (32,) * 4, "layers_per_block": 1}


def make_pipeline(machine: Machine) -> LLaDAUniPipeline:
    """Without language model and processor. Both decoders are one: their shapes are the same."""
    torch.manual_seed(0)
    is_tiny, default = machine.is_tiny, torch.get_default_dtype()
    torch.set_default_dtype(torch.float32 if is_tiny else torch.bfloat16)
    try:
        with torch.device(machine.device):
            transformer = ZImageTransformer2DModel(
                **{"cap_feat_dim": 4096, **(TINY_TRANSFORMER if is_tiny else {}), "axes_lens": [32768, 1024, 1024]}
            )
            embedder = LLaDAUniSemanticEmbedder(embedding_dim=64 if is_tiny else 4096)
            vae = AutoencoderKL(**VAE | (TINY_VAE if is_tiny else {}), scaling_factor=0.3611, shift_factor=0.1159)
    finally:
        torch.set_default_dtype(default)
    for token in (transformer.x_pad_token, transformer.cap_pad_token):  # which diffusers leaves as the memory was
        token.data.normal_(std=0.02)
    pipeline = LLaDAUniPipeline(
        model=None,
        processor=None,
        semantic_embedder=embedder.eval(),
        vae=vae.eval(),
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
        transformer_turbo=transformer,
        scheduler_turbo=FlowMatchEulerDiscreteScheduler(shift=1.0, stochastic_sampling=True),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def picture_grid(machine: Machine) -> tuple[int, int]:
    """Codes down and across: of 1024 x 1024 pixels. The language model writes them by whole blocks of 32."""
    return (4, 8) if machine.is_tiny else (32, 32)


def decode(
    pipeline: LLaDAUniPipeline, machine: Machine, codes: torch.LongTensor | None = None, **settings: Any
) -> Any:
    """One picture, by default of random codes."""
    grid = picture_grid(machine)
    if codes is None:
        codes = torch.randint(256, grid, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator(machine.device).manual_seed(0)
    return pipeline.decode_codes(codes.view(1, *grid), generator=generator, **settings)


def report_decoding(
    section: Section, pipeline: LLaDAUniPipeline, machine: Machine, what: str, repeats: int = 3, **settings: Any
) -> None:
    """A row. The peak is of all that is on the card, a language model too if one is."""
    with section.guarded(what):
        is_cuda = machine.device == "cuda"
        _, first = timed(lambda: decode(pipeline, machine, **settings))
        if is_cuda:
            torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated() if is_cuda else 0
        _, seconds = section.measure(lambda: decode(pipeline, machine, **settings), repeats, warm_up=lambda: None)
        beyond = (torch.cuda.max_memory_allocated() - held) / 1e9 if is_cuda else None
        section.add(what, **{"first, s": first, "seconds": seconds, "peak beyond what is held, GB": beyond})


def report_decoder(section: Section, pipeline: LLaDAUniPipeline, machine: Machine) -> None:
    height, width = (32 * side for side in picture_grid(machine))
    size = size_of_pipeline(pipeline)
    section.note(f"{width} x {height} pixels; decoder, autoencoder and embedder take {size:.1f} GB.")
    report_decoding(section, pipeline, machine, "turbo, 8 steps, latents", output_type="latent")
    report_decoding(section, pipeline, machine, "turbo, 8 steps, pixels")


def report_compiled_decoder(section: Section, pipeline: LLaDAUniPipeline, machine: Machine) -> None:
    """The pipeline stays compiled, and in float8: it is to be thrown away afterwards."""
    what, backend = "turbo, 8 steps, pixels, compiled", {"backend": "eager"} if machine.is_tiny else {}
    if not section.has_time(60):
        section.add(what, failed="no time left")
        return
    pipeline.compile_decoders(**backend)
    report_decoding(section, pipeline, machine, what)
    if machine.device == "cuda" and section.has_time():
        with section.guarded(f"{what}, float8"):
            pipeline.compile_decoders(float8=True, **backend)
            report_decoding(section, pipeline, machine, f"{what}, float8")
            section.note(f"In float8 decoder, autoencoder and embedder take {size_of_pipeline(pipeline):.1f} GB.")


def report_normal_decoder(section: Section, pipeline: LLaDAUniPipeline, machine: Machine) -> None:
    report_decoding(section, pipeline, machine, "normal, 49 guided steps, pixels", repeats=1, decoder="normal")


def size_of_pipeline(pipeline: LLaDAUniPipeline) -> float:
    parts = {pipeline.transformer_turbo, pipeline.vae, pipeline.semantic_embedder}
    return sum(size_of(part) for part in parts) / 1e9


def report_picture(
    section: Section, workload: Workload, pipeline: LLaDAUniPipeline, machine: Machine, loops: LoopResults
) -> None:
    """What the pipeline does, but for the words: random prompt ids, codes, pixels."""
    num_codes = math.prod(picture_grid(machine))

    def picture() -> Any:
        return decode(pipeline, machine, workload.decode(Task(num_codes)).tokens.cpu())

    _, seconds = section.measure(picture, repeats=3)
    _, codes_seconds = timed(lambda: workload.decode(Task(num_codes)))
    _, pixels_seconds = timed(lambda: decode(pipeline, machine))
    row = {"codes, s": codes_seconds, "read the decoder, s": 0.0, "pixels, s": pixels_seconds, "seconds": seconds}
    section.add("default, all on the card", **row, **{"speed-up": None})

    with section.guarded("released way"):
        _, loop_seconds = loops.of(workload, num_codes)
        read_seconds, where = seconds_to_read(section, pipeline, machine)
        released = loop_seconds + read_seconds + pixels_seconds
        what = f"released way: loop, decoder {where}, pixels; sum of the three"
        section.add(
            what,
            **{
                "codes, s": loop_seconds,
                "read the decoder, s": read_seconds,
                "pixels, s": pixels_seconds,
                "seconds": released,
                "speed-up": 1.0,
            },
        )
        section.rows[0]["speed-up"] = released / seconds
    section.note(
        f"Without the processor: prompts are {workload.prompts(1, 1).shape[-1]} ids. {STEPS} steps a block of codes, "
        f"guidance {SCALES['guidance_scale']}, turbo 8."
    )


def seconds_to_read(section: Section, pipeline: LLaDAUniPipeline, machine: Machine) -> tuple[float, str]:
    """Of the decoder's files, from the system's cache of the disk at best, to the card; 0 where there is no room."""
    transformer = pipeline.transformer_turbo
    with tempfile.TemporaryDirectory() as folder:
        if shutil.disk_usage(folder).free < 2 * size_of(transformer) or not section.has_time(30):
            return 0.0, "not read (no room on the disk, or no time)"
        transformer.save_pretrained(folder)

        def read() -> ZImageTransformer2DModel:
            return ZImageTransformer2DModel.from_pretrained(Path(folder), torch_dtype=transformer.dtype).to(
                machine.device
            )

        _, seconds = timed(read)
        free_memory()
        return seconds, "read from disk just written"
