"""Sections that decode: first calls, experts used, guided codes, text, batches, kernels, float8 experts, memory."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from gpu_model import size_of, use_float8_experts
from gpu_report import Section, free_memory, synchronize, timed
from gpu_workload import ALL_OFF, DEFAULT, EAGER, LOOP, METHODS, Decoded, Method, Task, Workload
from torch.profiler import ProfilerActivity, profile

from transformers_llada_uni.generation.recording import recordings_of


BLOCK = 32


class LoopResults:
    """What the released loop gave for guided codes, by their number: run once, as it takes long."""

    def __init__(self) -> None:
        self.by_length: dict[int, tuple[Decoded, float]] = {}

    def of(self, workload: Workload, num_codes: int) -> tuple[Decoded, float]:
        if num_codes not in self.by_length:
            workload.decode(Task(BLOCK), LOOP)
            self.by_length[num_codes] = timed(lambda: workload.decode(Task(num_codes), LOOP))
        return self.by_length[num_codes]


def report_first_calls(section: Section, workload: Workload, is_tiny: bool) -> None:
    """Everything that the calls compile is compiled here: before it the process has only made the model."""
    longer = 96 if is_tiny else 512
    tasks = {
        "guided codes, 64, the first of all": Task(64),
        f"longer: {longer}": Task(longer),
        "two rows, 64": Task(64, num_rows=2),
        "text, 64": Task(64, writes_codes=False, num_steps=32),
    }
    for what, task in tasks.items():
        with section.guarded(what):
            first, second, third = (timed(lambda task=task: workload.decode(task))[1] for _ in range(3))
            section.add(what, **{"first, s": first, "second, s": second, "third, s": third, "extra, s": first - third})
    section.note("Fresh process, empty cache of Triton. Extra: first less third.")


def report_experts(section: Section, workload: Workload, batches: tuple[int, ...]) -> None:
    model = workload.model
    tasks = {
        "text, 32 steps a block": Task(256, writes_codes=False, num_steps=32),
        "text, 8 steps a block": Task(256, writes_codes=False),
        "guided codes": Task(256),
        **{f"guided codes, {rows} rows": Task(256, num_rows=rows) for rows in batches},
    }
    for what, task in tasks.items():
        with section.guarded(what):
            experts = workload.used_experts(task)
            values = {
                "tokens": experts.tokens,
                f"experts used of {model.config.num_experts}": experts.used,
                "by uniform choice": experts.uniform,
                "GB a step reads": workload.bytes_of_step(task) / 1e9,
                "floor, ms": workload.floor(task),
            }
            section.add(what, **values)
    section.note(
        "Means over layers and steps of an eager call of 64 new tokens. Floor: those bytes / the bandwidth above; "
        "keys and values are those of 256 new tokens."
    )


def share(first: torch.Tensor, second: torch.Tensor) -> float:
    return (first == second).float().mean().item()


def report_guided_codes(section: Section, workload: Workload, loops: LoopResults, lengths: tuple[int, ...]) -> None:
    for num_codes in lengths:
        task = Task(num_codes)
        loop, loop_seconds = None, None
        with section.guarded(f"{num_codes}, released loop"):
            loop, loop_seconds = loops.of(workload, num_codes)
        for name, method in METHODS.items():
            what = f"{num_codes}, {name}"
            if num_codes > lengths[0] and not (method.is_loop or method == DEFAULT):
                continue  # a step costs what it costs in the shorter one
            if not section.has_time():
                section.add(what, failed="no time left")
                continue
            if method.is_loop and loop is None:
                continue  # reported above
            with section.guarded(what):
                if method.is_loop:
                    decoded, seconds = loop, loop_seconds
                else:
                    decoded, seconds = measure(section, workload, task, method, repeats=3 if num_codes <= 256 else 2)
                values: dict[str, Any] = workload.pace(task, decoded, seconds)
                if loop is not None:
                    values["speed-up"] = loop_seconds / seconds
                    values["same codes"] = share(decoded.tokens, loop.tokens)
                    values["in the first block"] = share(decoded.tokens[:, :BLOCK], loop.tokens[:, :BLOCK])
                section.add(what, **values)
    section.note(
        "Batch 1, 8 steps a block. Weights are random, so the best codes are close to each other: one that is rounded "
        "otherwise changes all after it."
    )


def measure(
    section: Section, workload: Workload, task: Task, method: Method = DEFAULT, repeats: int = 3
) -> tuple[Decoded, float]:
    def warm_up() -> None:
        if method.is_recorded:
            workload.decode(task, method)  # makes the buffers, which go by the length of the canvas
        # A short call compiles as much, and records what a call does once, as that runs for the second time.
        workload.decode(replace(task, num_new_tokens=BLOCK), method)

    return section.measure(lambda: workload.decode(task, method), repeats, warm_up)


def report_text(section: Section, workload: Workload, num_tokens: int) -> None:
    cases = {
        "32 steps a block": Task(num_tokens, writes_codes=False, num_steps=32),
        "8 steps a block": Task(num_tokens, writes_codes=False),
        "32 steps, threshold 0.95": Task(num_tokens, writes_codes=False, num_steps=32, threshold=0.95),
    }
    for name, task in cases.items():
        for suffix, method in (("", DEFAULT), (", no CUDA graphs", EAGER)):
            if method == EAGER and name != "8 steps a block":
                continue
            what = name + suffix
            if not section.has_time():
                section.add(what, failed="no time left")
                continue
            with section.guarded(what):
                decoded, seconds = measure(section, workload, task, method, repeats=2)
                section.add(what, **workload.pace(task, decoded, seconds))
    section.note(f"{num_tokens} tokens, batch 1.")


def report_batches(section: Section, workload: Workload, batches: tuple[int, ...], num_codes: int) -> None:
    for num_rows in batches:
        with section.guarded(f"{num_rows} rows"):
            task = Task(num_codes, num_rows=num_rows)
            decoded, seconds = measure(section, workload, task)
            section.add(f"{num_rows} rows", **workload.pace(task, decoded, seconds))
    section.note(f"Guided, {num_codes} codes a row.")


def report_kernels(section: Section, workload: Workload, num_codes: int, num_steps: int) -> None:
    few = min(num_codes, 64)
    cases = {
        "guided codes, default": (Task(num_codes, num_steps=num_steps), DEFAULT),
        "guided codes, no CUDA graphs": (Task(few, num_steps=num_steps), EAGER),
        "guided codes, all three off": (Task(BLOCK, num_steps=num_steps), ALL_OFF),
        "text, default": (Task(few, writes_codes=False, num_steps=num_steps), DEFAULT),
    }
    for what, (task, method) in cases.items():
        with section.guarded(what):
            decoded, seconds = measure(section, workload, task, method, repeats=2)
            events = profiled(lambda task=task, method=method: workload.decode(task, method), workload.machine.device)
            count, busy = sum(event[1] for event in events), sum(event[2] for event in events)
            forwards = decoded.num_forwards
            section.add(
                what,
                **{
                    "forwards": forwards,
                    "kernels a forward": count / forwards,
                    "busy, ms a forward": 1e3 * busy / forwards,
                    "wall, ms a forward": 1e3 * seconds / forwards,
                    "busy / wall": busy / seconds,
                },
            )
            section.details[what] = [
                {"kernel": name, "a forward": number / forwards, "ms a forward": 1e3 * taken / forwards}
                for name, number, taken in events[:25]
            ]
    section.note(
        "Copies and fills of memory count as kernels, and what a call does once counts too. Busy: their times, from a "
        "run under torch's profiler; wall: without it. On a CPU operators stand in for kernels. The JSON names them."
    )


def profiled(call: Callable[[], Any], device: str) -> list[tuple[str, int, float]]:
    """Name, number and seconds of what ran on the device, the longest first."""
    with profile(activities=[getattr(ProfilerActivity, device.upper())]) as profiler:
        call()
        synchronize()
    events = [event for event in profiler.key_averages() if event.device_type.name == device.upper()]
    times = {"cuda": "self_device_time_total", "cpu": "self_cpu_time_total"}
    found = [(event.key[:120], event.count, getattr(event, times[device]) / 1e6) for event in events]
    return sorted(found, key=lambda event: -event[2])


def report_float8(section: Section, workload: Workload, loops: LoopResults, lengths: tuple[int, ...]) -> None:
    """The model keeps the experts in float8: it is to be thrown away afterwards."""
    if workload.machine.device != "cuda":
        section.add("float8 experts", failed="not available: they need a GPU")
        return
    model = workload.model
    before = {n: workload.decode(Task(n)) for n in lengths}
    _, seconds = timed(lambda: use_float8_experts(model))
    free_memory()
    section.note(f"Blocks of 128 x 128, made in {seconds:.1f} s; {size_of(model) / 1e9:.1f} GB of weights in all.")
    workload = Workload(model, workload.machine)  # experts are counted, and bytes reckoned, anew
    for num_codes in lengths:
        with section.guarded(f"{num_codes} codes"):
            task = Task(num_codes)
            decoded, seconds = measure(section, workload, task, repeats=2)
            values = workload.pace(task, decoded, seconds)
            if num_codes in loops.by_length:
                values["speed-up"] = loops.by_length[num_codes][1] / seconds
            values["same codes as bfloat16"] = share(decoded.tokens, before[num_codes].tokens)
            section.add(f"{num_codes} codes", **values)
    with section.guarded("text"):
        task = Task(lengths[0], writes_codes=False, num_steps=32)
        decoded, seconds = measure(section, workload, task, repeats=2)
        section.add(f"text, {lengths[0]} tokens, 32 steps a block", **workload.pace(task, decoded, seconds))


def report_memory(section: Section, workload: Workload, num_codes: int, batches: tuple[int, ...]) -> None:
    """Of the model alone: others are to be freed before."""
    weights, recordings = size_of(workload.model), recordings_of(workload.model.get_decoder())
    for num_rows in (1, *batches):
        what = f"guided codes, {num_rows} {'row' if num_rows == 1 else 'rows'} of {num_codes}"
        with section.guarded(what):
            recordings.release()
            free_memory()
            if workload.machine.device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            workload.decode(Task(num_codes, num_rows=num_rows))
            synchronize()
            free_memory()
            section.add(
                what, **{"weights, GB": weights / 1e9, **memory_beyond(workload, weights, recordings.num_bytes)}
            )
    section.note("Kept after the call for the next ones: buffers of keys and values, and graphs' own memory.")


def memory_beyond(workload: Workload, weights: int, buffers: int) -> dict[str, float | None]:
    names = ("peak in the call", "peak beyond the weights", "kept after it", "of it keys and values", "graphs")
    if workload.machine.device != "cuda":
        return {f"{name}, GB": None for name in names}
    peak, kept = torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()
    pools = sum(
        segment["total_size"]
        for segment in torch.cuda.memory_snapshot()
        if tuple(segment.get("segment_pool_id", (0, 0))) != (0, 0)
    )
    values = (peak / 1e9, (peak - weights) / 1e9, (kept - weights) / 1e9, buffers / 1e9, pools / 1e9)
    return {f"{name}, GB": value for name, value in zip(names, values, strict=True)}
