"""The section of small cards: the backbone in four bits, the decoder in float8, what both take, and QLoRA."""

import math

import torch
from diffusers import ZImageTransformer2DModel
from gpu_decoder import decode, picture_grid
from gpu_decoding import measure
from gpu_machine import Machine
from gpu_model import size_of, use_few_bits
from gpu_report import Section, free_memory, timed
from gpu_training import train_lora
from gpu_workload import Task, Workload
from transformers.utils import is_torchao_available

from diffusers_llada_uni import LLaDAUniPipeline
from transformers_llada_uni import LLaDA2MoeForBlockDiffusion


BITS, GROUP_SIZE = 4, 64


def quantize(section: Section, model: LLaDA2MoeForBlockDiffusion, machine: Machine) -> None:
    group_size = 16 if machine.is_tiny else GROUP_SIZE
    _, seconds = timed(lambda: use_few_bits(model, BITS, group_size))
    free_memory()
    section.add(
        f"{BITS} bits, groups of {group_size}", **{"made in, s": seconds, "backbone, GB": size_of(model) / 1e9}
    )


def report_few_bits(section: Section, workload: Workload, lengths: tuple[int, ...]) -> None:
    """Of a model that is quantised already."""
    workload = Workload(workload.model, workload.machine)  # experts are counted, and bytes reckoned, anew
    tasks = {
        **{f"{num_codes} guided codes": Task(num_codes) for num_codes in lengths},
        f"text, {lengths[0]} tokens, 32 steps a block": Task(lengths[0], writes_codes=False, num_steps=32),
    }
    for what, task in tasks.items():
        if not section.has_time():
            section.add(what, failed="no time left")
            continue
        with section.guarded(what):
            decoded, seconds = measure(section, workload, task, repeats=2)
            section.add(what, **workload.pace(task, decoded, seconds))


def report_small_picture(section: Section, workload: Workload, pipeline: LLaDAUniPipeline, machine: Machine) -> None:
    """All on the card. The decoder's weights stay in float8: the pipeline is to be thrown away afterwards."""
    what = "a picture, the decoder in float8, no image tokenizer"
    if machine.device == "cuda" and not is_torchao_available():
        section.add(what, failed="needs torchao")
        return
    with section.guarded(what):
        if machine.device == "cuda":
            from torchao.quantization import Float8WeightOnlyConfig, quantize_

            transformer = pipeline.transformer_turbo
            assert isinstance(transformer, ZImageTransformer2DModel)
            quantize_(transformer, Float8WeightOnlyConfig())
        free_memory()
        num_codes = math.prod(picture_grid(machine))
        if machine.device == "cuda":
            torch.cuda.reset_peak_memory_stats()

        def draw() -> None:
            decode(pipeline, machine, workload.decode(Task(num_codes)).tokens.cpu())

        _, first = timed(draw)
        peak = torch.cuda.max_memory_allocated() / 1e9 if machine.device == "cuda" else None
        _, seconds = section.measure(draw, repeats=2, warm_up=lambda: None)
        section.add(what, **{"first, s": first, "seconds": seconds, "peak of all on the card, GB": peak})


def report_qlora(section: Section, model: LLaDA2MoeForBlockDiffusion, machine: Machine) -> None:
    """Alone on the card but for the quantised model, which is trained."""
    what = "lora_config(r=8, experts=False), one row of 2048 tokens a step"
    if not section.has_time():
        section.add(what, failed="no time left")
        return
    with section.guarded(what):
        section.add(what, **train_lora(model, machine, {"r": 8, "experts": False}, 128 if machine.is_tiny else 2048))
