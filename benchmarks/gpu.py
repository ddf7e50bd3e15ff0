r"""
What one GPU does with the released shape: decoding, the decoder, whole pictures, training. At most 8 minutes.

    python benchmarks/gpu.py                                        # everything, on one card of 80 GB or more
    python benchmarks/gpu.py --sections machine,guided,text         # some of it
    python benchmarks/gpu.py --sections machine,decoder,normal_decoder
    python benchmarks/gpu.py --tiny                                 # all of it, tiny, in seconds on a CPU: a test

The tables go to standard output, progress to standard error, and two files (JSON and Markdown) are written anew after
each section. Each has a time limit of its own, which is looked at between measurements; what fails, or finds no time
left, is a row that says so. Nothing is read from a network. Weights are random, seeds fixed. Times are medians of the
runs of one method, one after the other, the first of them untimed.
"""

import argparse
import functools
import gc
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from gpu_decoder import (
    make_pipeline,
    report_compiled_decoder,
    report_decoder,
    report_normal_decoder,
    report_picture,
)
from gpu_decoding import (
    LoopResults,
    report_batches,
    report_experts,
    report_first_calls,
    report_float8,
    report_guided_codes,
    report_kernels,
    report_memory,
    report_text,
)
from gpu_exactness import report_fixture, report_rounding, report_same_tokens
from gpu_machine import Machine, measure_machine, report_machine
from gpu_model import RELEASED, TINY, make_model, size_of
from gpu_report import Report, Section, free_memory, timed
from gpu_small_cards import quantize, report_few_bits, report_qlora, report_small_picture
from gpu_training import report_training
from gpu_workload import STEPS, Workload


class Bench:
    """What sections share: made when it is first asked for, and freed when the next ones shall be alone."""

    def __init__(self, device: str, is_tiny: bool, fixture: Path | None):
        self.is_tiny, self.fixture = is_tiny, fixture
        self.machine: Machine = measure_machine(device, is_tiny)
        free_memory()
        self.loops = LoopResults()
        self.lengths = (32, 64) if is_tiny else (256, 1024)
        self.batches = (2, 3) if is_tiny else (4, 16)

    @functools.cached_property
    def workload(self) -> Workload:
        shape, dtype = (TINY, torch.float32) if self.is_tiny else (RELEASED, torch.bfloat16)
        return Workload(make_model(shape, self.machine.device, dtype), self.machine)

    @functools.cached_property
    def pipeline(self):
        return make_pipeline(self.machine)

    def free(self, *names: str) -> None:
        for name in names:
            self.__dict__.pop(name, None)
        free_memory()

    # Sections

    def measure_machine(self, section: Section) -> None:
        report_machine(section, self.machine)

    def make_model(self, section: Section) -> None:
        workload, seconds = timed(lambda: self.workload)
        model, config = workload.model, workload.model.config
        section.add(
            "random weights of the released shape" if not self.is_tiny else "tiny shape",
            **{
                "parameters, B": sum(parameter.numel() for parameter in model.parameters()) / 1e9,
                "GB": size_of(model) / 1e9,
                "made in, s": seconds,
                "layers": config.num_hidden_layers,
                "experts": config.num_experts,
                "experts_implementation": config._experts_implementation,
            },
        )

    def first_calls(self, section: Section) -> None:
        report_first_calls(section, self.workload, self.is_tiny)

    def experts(self, section: Section) -> None:
        report_experts(section, self.workload, self.batches)

    def guided(self, section: Section) -> None:
        report_guided_codes(section, self.workload, self.loops, self.lengths)

    def text(self, section: Section) -> None:
        report_text(section, self.workload, self.lengths[0])

    def measure_batches(self, section: Section) -> None:
        report_batches(section, self.workload, self.batches, self.lengths[0])

    def kernels(self, section: Section) -> None:
        report_kernels(section, self.workload, self.lengths[0], 2 if self.is_tiny else STEPS)

    def exactness(self, section: Section) -> None:
        report_same_tokens(section, self.machine.device)
        if self.fixture is not None:
            report_fixture(section, self.machine.device, self.fixture)

    def rounding(self, section: Section) -> None:
        report_rounding(section, self.machine.device, self.is_tiny)

    def float8(self, section: Section) -> None:
        report_float8(section, self.workload, self.loops, self.lengths)
        self.free("workload")

    def decoder(self, section: Section) -> None:
        report_decoder(section, self.pipeline, self.machine)

    def picture(self, section: Section) -> None:
        report_picture(section, self.workload, self.pipeline, self.machine, self.loops)

    def compiled_decoder(self, section: Section) -> None:
        report_compiled_decoder(section, self.pipeline, self.machine)
        self.free("pipeline")

    def memory(self, section: Section) -> None:
        self.free("pipeline")
        report_memory(section, self.workload, self.lengths[1], self.batches[1:])

    def training(self, section: Section) -> None:
        self.free("pipeline", "workload")
        report_training(section, self.machine)

    def small_cards(self, section: Section) -> None:
        """The model has few bits afterwards, and the decoder float8: they are thrown away."""
        self.free("pipeline", "workload")
        quantize(section, self.workload.model, self.machine)
        report_few_bits(section, self.workload, self.lengths)
        report_small_picture(section, self.workload, self.pipeline, self.machine)
        self.free("pipeline")
        self.workload.model.release_cuda_graphs()
        report_qlora(section, self.workload.model, self.machine)
        self.free("workload")

    def normal_decoder(self, section: Section) -> None:
        self.free("workload")
        report_normal_decoder(section, self.pipeline, self.machine)


# Heading, seconds, and what measures; the most important first.
SECTIONS: dict[str, tuple[str, float, Callable[[Bench, Section], None]]] = {
    "machine": ("Machine", 10, Bench.measure_machine),
    "model": ("Model", 30, Bench.make_model),
    "first_calls": ("First calls", 60, Bench.first_calls),
    "experts": ("Experts used, and the floor of a step", 30, Bench.experts),
    "guided": ("Guided codes", 130, Bench.guided),
    "text": ("Text", 40, Bench.text),
    "batches": ("Batches", 40, Bench.measure_batches),
    "kernels": ("Kernels, and how long the card works", 30, Bench.kernels),
    "exactness": ("The same tokens as the plain loop", 40, Bench.exactness),
    "rounding": ("Rounding of bfloat16", 30, Bench.rounding),
    "float8": ("Experts in float8", 40, Bench.float8),
    "decoder": ("Decoder", 30, Bench.decoder),
    "picture": ("A picture, from prompt to pixels", 60, Bench.picture),
    "memory": ("Memory", 30, Bench.memory),
    "training": ("LoRA", 60, Bench.training),
    "compiled_decoder": ("Decoder, compiled", 90, Bench.compiled_decoder),
    "small_cards": ("Small cards", 80, Bench.small_cards),
    "normal_decoder": ("Decoder, many steps", 60, Bench.normal_decoder),
}
NOT_BY_DEFAULT = ("small_cards", "normal_decoder")  # a minute, and half a minute for one picture


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", help=f"Some of: {', '.join(SECTIONS)}; with commas between them.")
    parser.add_argument("--seconds", type=float, default=460, help="For how long, in all, measurements may begin.")
    parser.add_argument("--output", type=Path, default=Path("gpu.json"), help="JSON; Markdown stands beside it.")
    parser.add_argument("--fixture", type=Path, help="tests/fixtures/official_tiny, where it is at hand.")
    parser.add_argument("--tiny", action="store_true", help="Tiny shapes, on a CPU too.")
    arguments = parser.parse_args()
    default = [name for name in SECTIONS if arguments.tiny or name not in NOT_BY_DEFAULT]
    chosen = default if arguments.sections is None else arguments.sections.split(",")
    if unknown := sorted(set(chosen) - set(SECTIONS)):
        parser.error(f"--sections: no {', '.join(unknown)}; there are {', '.join(SECTIONS)}.")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not arguments.tiny:
        parser.error("There is no GPU. --tiny runs on a CPU.")
    if device == "cpu":
        torch.set_num_threads(1)  # for what is tiny others are only in the way

    gc.freeze()  # what is imported stays: `free_memory` need not look through it
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as cache:
        os.environ["TRITON_CACHE_DIR"] = cache  # a first call compiles, whatever ran on this machine before
        bench = Bench(device, arguments.tiny, arguments.fixture)
        about = {"machine": bench.machine.name, "is_tiny": arguments.tiny, "command": sys.argv[1:]}
        report = Report(arguments.seconds, arguments.output, about)
        for name in (name for name in SECTIONS if name in chosen):
            title, seconds, measure = SECTIONS[name]
            seconds *= 10 if arguments.tiny else 1  # a CPU may have other things to do
            report.run(name, title, seconds, functools.partial(measure, bench))
    print(report.markdown())


if __name__ == "__main__":
    main()
