"""A measure in a process of its own, whose memory is nobody else's."""

import multiprocessing
from collections.abc import Callable
from typing import Any


def in_own_process(name: str, function: Callable[..., None], *arguments: Any) -> Any:
    """
    What `function(*arguments, results)` gives by `results.send`.

    Raises:
        SystemExit: if the process dies before; names the measure and the exit code.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=function, args=(*arguments, sender))
    process.start()
    sender.close()  # or nobody would hear that the process has died
    try:
        found = receiver.recv()
    except EOFError:
        process.join()
        raise SystemExit(f"{name}: the process died, exit code {process.exitcode}.") from None
    process.join()
    return found
