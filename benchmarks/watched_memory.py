"""The memory of this process, watched by a thread while something runs."""

import ctypes
import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import psutil


@dataclass
class Growth:
    """The largest growth so far, in bytes: of the process's own memory, and of pages of files that are mapped."""

    own: int = 0
    mapped: int = 0


@contextmanager
def watched_memory() -> Iterator[Growth]:
    """What is freed beforehand is given back to the system, so that it cannot hide what is taken."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    process, is_done, growth = psutil.Process(), threading.Event(), Growth()
    before = process.memory_info()

    def watch() -> None:
        while not is_done.wait(0.002):
            memory = process.memory_info()
            growth.own = max(growth.own, memory.rss - memory.shared - (before.rss - before.shared))
            growth.mapped = max(growth.mapped, memory.shared - before.shared)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield growth
    finally:
        is_done.set()
        watcher.join()
