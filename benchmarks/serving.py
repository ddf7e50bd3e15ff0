"""
`llada-uni serve` with many clients at once against the same requests one by one: answers a second, how long they take,
whether any is lost or differs, and whether the server's memory stays flat.

    python benchmarks/serving.py
    python benchmarks/serving.py --clients 16 --kinds text --model llada-uni
    python benchmarks/serving.py --soak 2000

It starts the server on a free port of this machine, asks it over HTTP, and ends it. Every client asks its next
question when the last is answered. In images a difference of `ROUNDING` is none. Exits with 1 if anything is lost or
differs.
"""

import argparse
import asyncio
import base64
import io
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import PIL.Image


ROUNDING = 2  # of 255: rows of a batch differ from one alone by rounding
STARTS_WITHIN = 120.0  # seconds
PROMPTS = ("red apple", "cat face", "grinning face", "blue heart", "green leaf", "yellow star", "dog face", "house")
QUESTIONS = ("What is this?", "What colour is it?", "Is it round?", "What do you see here?")


@dataclass(frozen=True)
class Request:
    """What is asked for, and whether that is an image."""

    path: str
    body: dict[str, Any]

    @property
    def is_image(self) -> bool:
        return self.path.startswith("images")

    def answer_in(self, response: httpx.Response) -> str:
        response.raise_for_status()
        content = response.json()
        return content["data"][0]["b64_json"] if self.is_image else content["choices"][0]["message"]["content"]

    def differs(self, answer: str, other: str) -> bool:
        if not self.is_image or answer == other:
            return answer != other
        first, second = (
            np.asarray(PIL.Image.open(io.BytesIO(base64.b64decode(one))), dtype=int) for one in (answer, other)
        )
        return bool(np.abs(first - second).max() > ROUNDING)


@dataclass
class Run:
    """
    What came of many requests: of each its answer (`None`: lost) and its seconds; how long all took, and the server's
    time on its processors.
    """

    answers: list[str | None]
    latencies: list[float]
    seconds: float
    cpu_seconds: float

    @property
    def answers_per_second(self) -> float:
        return sum(answer is not None for answer in self.answers) / self.seconds

    def cells(self) -> list[str]:
        """Answers a second, milliseconds of an answer, milliseconds of processors for one."""
        rates = [f"{self.answers_per_second:.1f}", *(f"{self.percentile(percent) * 1000:.0f}" for percent in (50, 99))]
        return [*rates, f"{self.cpu_seconds / len(self.answers) * 1000:.0f}"]

    def percentile(self, percent: int) -> float:
        if len(self.latencies) < 2:
            return self.latencies[0] if self.latencies else math.nan
        return statistics.quantiles(self.latencies, n=100, method="inclusive")[percent - 1]


@dataclass(frozen=True)
class Server:
    url: str
    process: int

    def cpu_seconds(self) -> float:
        """That it has used; of Linux."""
        user, system = Path(f"/proc/{self.process}/stat").read_text().rpartition(")")[2].split()[11:13]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")

    def resident_megabytes(self) -> float:
        """Its memory; of Linux."""
        status = Path(f"/proc/{self.process}/status").read_text()
        return int(re.findall(r"VmRSS:\s+(\d+) kB", status)[0]) / 1024


@contextmanager
def running_server(model: str, options: list[str]) -> Iterator[Server]:
    command = [sys.executable, "-m", "llada_uni.cli", "serve", "--model", model, "--port", "0", *options]
    with tempfile.TemporaryDirectory() as folder, open(Path(folder, "log"), "w+") as log:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=log)
        try:
            deadline = time.monotonic() + STARTS_WITHIN
            while not (found := re.search(r"running on (http\S+)", Path(log.name).read_text())):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise SystemExit(f"The server has not started:\n{Path(log.name).read_text()}")
                time.sleep(0.1)
            yield Server(found[1], process.pid)
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()


async def ask(client: httpx.AsyncClient, request: Request) -> tuple[str | None, float]:
    began = time.perf_counter()
    try:
        answer = request.answer_in(await client.post(request.path, json=request.body))
    except (httpx.HTTPError, KeyError) as error:
        print(f"lost: {error!r}", file=sys.stderr)
        answer = None
    return answer, time.perf_counter() - began


async def ask_all(server: Server, requests: list[Request], num_clients: int, seconds: float) -> Run:
    """By so many clients side by side, each of which takes the next request as soon as it can."""
    waiting = iter(enumerate(requests))
    answers: list[str | None] = [None] * len(requests)
    latencies: list[float] = []
    limits = httpx.Limits(max_connections=num_clients)

    async def work(client: httpx.AsyncClient) -> None:
        for index, request in waiting:
            answers[index], latency = await ask(client, request)
            latencies.append(latency)

    async with httpx.AsyncClient(base_url=f"{server.url}/v1/", limits=limits, timeout=seconds) as client:
        began, cpu_began = time.perf_counter(), server.cpu_seconds()
        try:
            async with asyncio.timeout(seconds):
                await asyncio.gather(*(work(client) for _ in range(num_clients)))
        except TimeoutError:
            print(f"stopped after {seconds:g} s", file=sys.stderr)
        return Run(answers, latencies, time.perf_counter() - began, server.cpu_seconds() - cpu_began)


def text_request(model: str, index: int, image: str | None = None) -> Request:
    question = f"{QUESTIONS[index % len(QUESTIONS)]}{' Really?' * (index // len(QUESTIONS))}"
    content: Any = question
    if image is not None:
        url = f"data:image/png;base64,{image}"
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
    messages = [{"role": "user", "content": content}]
    return Request("chat/completions", {"model": model, "messages": messages, "max_tokens": 24})


def image_request(model: str, index: int) -> Request:
    prompt = PROMPTS[index % len(PROMPTS)]
    return Request("images/generations", {"model": model, "prompt": prompt, "seed": index})


def make_requests(server: Server, model: str, count: int) -> dict[str, list[Request]]:
    """So many different ones of each kind."""
    drawings = [image_request(model, index) for index in range(count)]
    drawn = asyncio.run(ask_all(server, drawings[: len(PROMPTS)], 1, STARTS_WITHIN)).answers
    return {
        "text": [text_request(model, index) for index in range(count)],
        "questions": [text_request(model, index, drawn[index % len(drawn)]) for index in range(count)],
        "drawings": drawings,
    }


def compare(server: Server, name: str, requests: list[Request], arguments: argparse.Namespace) -> int:
    """One row of the table; returns how many answers were lost or differ."""
    asyncio.run(ask_all(server, requests[:2], 2, arguments.seconds))  # warms up
    alone = asyncio.run(ask_all(server, requests, 1, arguments.seconds))
    asked = requests * (-(-arguments.clients * arguments.rounds // len(requests)))
    together = asyncio.run(ask_all(server, asked, arguments.clients, arguments.seconds))
    lost = sum(answer is None for answer in alone.answers + together.answers)
    expected = alone.answers * (len(asked) // len(requests))
    different = sum(
        request.differs(answer, other)
        for request, answer, other in zip(asked, together.answers, expected, strict=True)
        if answer is not None and other is not None
    )
    ratio = f"{together.answers_per_second / alone.answers_per_second:.1f}x"
    cells = [name, *alone.cells(), *together.cells(), ratio, str(len(asked)), str(lost), str(different)]
    print(f"| {' | '.join(cells)} |", flush=True)
    return lost + different


def soak(server: Server, requests: dict[str, list[Request]], arguments: argparse.Namespace) -> int:
    """Many requests of all kinds in turn; says how memory grew. Returns how many were lost."""
    kinds = list(requests.values())
    mixed = [kinds[index % len(kinds)][index // len(kinds) % len(kinds[0])] for index in range(arguments.soak)]
    lost, part, began = 0, -(-len(mixed) // 10), time.perf_counter()
    print("\nThe server's memory, MB:", end="", flush=True)
    for first in range(0, len(mixed), part):
        run = asyncio.run(ask_all(server, mixed[first : first + part], arguments.clients, arguments.seconds))
        lost += sum(answer is None for answer in run.answers)
        print(f" {server.resident_megabytes():.0f}", end="", flush=True)
    print(f"\n{len(mixed)} requests in {time.perf_counter() - began:.0f} s, {lost} lost", flush=True)
    return lost


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="emoji")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--different", type=int, default=16, help="requests of each kind, which are asked one by one")
    parser.add_argument("--rounds", type=int, default=2, help="requests of each client")
    parser.add_argument("--kinds", nargs="+", default=["text", "questions", "drawings"])
    parser.add_argument("--soak", type=int, default=0, help="so many requests of all kinds afterwards")
    parser.add_argument("--seconds", type=float, default=600, help="most that a part of it may take")
    parser.add_argument("--serve", nargs=argparse.REMAINDER, default=[], help="what follows are options of the server")
    arguments = parser.parse_args()

    with running_server(arguments.model, arguments.serve) as server:
        requests = make_requests(server, arguments.model, arguments.different)
        columns = "answers/s | p50, ms | p99, ms | processors, ms"
        print(
            f"| | one by one: {columns} | {arguments.clients} clients: {columns} | throughput | asked | lost |", end=""
        )
        print(" different |\n|" + "---|" * 13, flush=True)
        num_wrong = sum(compare(server, name, requests[name], arguments) for name in arguments.kinds)
        if arguments.soak:
            num_wrong += soak(server, requests, arguments)
    sys.exit(bool(num_wrong))


if __name__ == "__main__":
    main()
