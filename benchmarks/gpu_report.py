"""Sections of measurements with limits of their own, as Markdown tables and as JSON."""

import gc
import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    """What a call returns, and its seconds, with all that it left the device to do."""
    synchronize()
    start = time.perf_counter()
    result = call()
    synchronize()
    return result, time.perf_counter() - start


def free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class Section:
    """
    One table. Its first column is what was measured; a measurement that fails becomes a row that says so.

    Args:
        title: Heading of the table.
        seconds: For how long measurements may begin.
    """

    def __init__(self, title: str, seconds: float):
        self.title, self.limit, self.start = title, seconds, time.perf_counter()
        self.rows: list[dict[str, Any]] = []
        self.notes: list[str] = []
        self.details: dict[str, Any] = {}  # for the JSON alone
        self.seconds = 0.0

    def has_time(self, needed: float = 0.0) -> bool:
        return time.perf_counter() - self.start + needed < self.limit

    def add(self, what: str, **values: Any) -> None:
        self.rows.append({"what": what, **values})
        print(f"  {what}: {', '.join(f'{name} {cell(value)}' for name, value in values.items())}", file=sys.stderr)

    def note(self, text: str) -> None:
        self.notes.append(text)

    @contextmanager
    def guarded(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            traceback.print_exc(limit=-8, file=sys.stderr)
            message = " ".join(str(error).split())[:160].replace("|", "/")
            self.add(what, failed=f"{type(error).__name__}: {message}")
            free_memory()

    def measure(
        self, call: Callable[[], Any], repeats: int, warm_up: Callable[[], Any] | None = None
    ) -> tuple[Any, float]:
        """
        What a call returns, and the median of its seconds. Runs of one method stand together, as another method's
        would make a model throw away the graphs that it has recorded. The first always runs, others if time is left.

        Args:
            warm_up: Runs before, untimed. Default: the call.
        """
        (call if warm_up is None else warm_up)()
        result, taken = timed(call)
        seconds = [taken]
        while len(seconds) < repeats and self.has_time(taken):
            result, taken = timed(call)
            seconds.append(taken)
        return result, statistics.median(seconds)

    def markdown(self) -> str:
        lines = [f"## {self.title}", ""]
        if self.rows:
            columns = list(dict.fromkeys(name for row in self.rows for name in row))
            lines += [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
            lines += [f"| {' | '.join(cell(row.get(name, '-')) for name in columns)} |" for row in self.rows]
        return "\n".join(lines + [f"\n{note}" for note in self.notes])


def cell(value: Any) -> str:
    if value is None or value == "":
        return "n/a"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)


class Report:
    """All sections, each within a limit of its own and the common one; written anew after each, lest one hangs."""

    def __init__(self, seconds: float, path: Path, about: dict[str, Any]):
        self.start, self.limit, self.path, self.about = time.perf_counter(), seconds, path, about
        self.sections: dict[str, Section] = {}

    @property
    def elapsed(self) -> float:
        return time.perf_counter() - self.start

    def run(self, name: str, title: str, seconds: float, measure: Callable[[Section], None]) -> None:
        section = self.sections[name] = Section(title, min(seconds, self.limit - self.elapsed))
        print(f"[{self.elapsed:6.1f} s] {name}", file=sys.stderr, flush=True)
        if section.has_time():
            with section.guarded(name):
                measure(section)
        else:
            section.add(name, failed="no time left")
        section.seconds = time.perf_counter() - section.start
        self.write()

    def markdown(self) -> str:
        return "\n\n".join(section.markdown() for section in self.sections.values()) + "\n"

    def write(self) -> None:
        sections = {
            name: {
                "title": section.title,
                "seconds": section.seconds,
                "limit": section.limit,
                "rows": section.rows,
                "notes": section.notes,
                "details": section.details,
            }
            for name, section in self.sections.items()
        }
        content = {**self.about, "seconds": self.elapsed, "sections": sections}
        self.path.write_text(json.dumps(content, indent=1))
        self.path.with_suffix(".md").write_text(self.markdown())
