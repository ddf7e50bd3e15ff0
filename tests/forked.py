"""
Processes that are forked from the test's own: they begin with all that it has imported, which takes longer than what
most tests let a process do.
"""

import multiprocessing
import os
import socket
from collections.abc import Callable
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState


def run_forked(function: Callable[..., Any], *arguments: Any, num_processes: int = 1) -> list[int]:
    """
    Calls `function(*arguments)` in a process of its own, or in several that find each other as those of `torchrun` do.

    Returns:
        Their exit codes: 0, 1 for an error (which goes to standard error), or minus the number of a signal.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(target=_call, args=(rank, num_processes, port, function, arguments))
        for rank in range(num_processes)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=600)
    codes = [-1 if process.exitcode is None else process.exitcode for process in processes]
    for process in processes:
        process.kill()
    return codes


def _call(rank: int, num_processes: int, port: int, function: Callable, arguments: tuple) -> None:
    torch.set_num_threads(1)
    # What accelerate has found out about the test's process.
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    if num_processes > 1:
        numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_processes, "LOCAL_WORLD_SIZE": num_processes}
        os.environ |= {name: str(number) for name, number in numbers.items()}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    function(*arguments)
