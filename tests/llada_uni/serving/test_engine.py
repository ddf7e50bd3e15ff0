"""The engine and its queues, without a model."""

import asyncio
import threading
import time
from types import SimpleNamespace

import pytest
from starlette.requests import ClientDisconnect

from llada_uni.serving.clients import while_connected
from llada_uni.serving.engine import Engine
from llada_uni.serving.jobs import EngineBusy, EngineStopped, ImageJob, Job, JobQueue, TextJob


class Pipe:
    """Draws a word for each prompt and seed; refuses "bad"; begins when `go` is set."""

    def __init__(self) -> None:
        self.code_generator = SimpleNamespace(model=None, processor=None)
        self.calls: list[list[str]] = []
        self.begun, self.go = threading.Event(), threading.Event()

    def __call__(self, prompts, generator, **settings):
        self.calls.append(prompts)
        self.begun.set()
        assert self.go.wait(10)
        if "bad" in prompts:
            raise ValueError("`prompt` is bad.")
        seeds = [one.initial_seed() for one in generator]
        return SimpleNamespace(images=[f"{prompt} {seed}" for prompt, seed in zip(prompts, seeds, strict=True)])


@pytest.fixture
def pipe():
    return Pipe()


@pytest.fixture
def engine(pipe):
    engine = Engine(pipe, max_images=3)
    engine.start()
    yield engine
    pipe.go.set()
    engine.stop()


def submit(engine, *jobs):
    """While the first is drawn, so that the others wait together."""
    first = ImageJob("first")
    engine.submit(first)
    assert engine.pipe.begun.wait(10)
    for job in jobs:
        engine.submit(job)
    return first


def test_a_bad_job_fails_alone(engine, pipe):
    jobs = [ImageJob("a"), ImageJob("bad"), ImageJob("b")]
    submit(engine, *jobs)
    pipe.go.set()
    assert jobs[0].result.result(10) == ["a 0"] and jobs[2].result.result(10) == ["b 0"]
    with pytest.raises(ValueError, match="is bad"):
        jobs[1].result.result(10)
    assert pipe.calls == [["first"], ["a", "bad", "b"], ["a"], ["bad"], ["b"]]


def test_no_more_images_at_once_than_allowed(engine, pipe):
    many, one = ImageJob("many", [1, 2, 3, 4, 5, 6, 7]), ImageJob("one")
    submit(engine, many, one)
    pipe.go.set()
    assert many.result.result(10) == [f"many {seed}" for seed in range(1, 8)]
    assert one.result.result(10) == ["one 0"]
    assert pipe.calls[1:] == [["many"] * 3, ["many"] * 3, ["many"], ["one"]]


def test_jobs_of_other_settings_are_no_part_of_a_group(engine, pipe):
    jobs = [ImageJob("a"), ImageJob("b", settings={"width": 64}), ImageJob("c"), ImageJob("d", images=["image"])]
    submit(engine, *jobs)
    pipe.go.set()
    assert [job.result.result(10) for job in jobs] == [["a 0"], ["b 0"], ["c 0"], ["d 0"]]
    assert pipe.calls[1:] == [["a", "c"], ["b"], ["d"]]


def test_a_cancelled_job_is_not_drawn(engine, pipe):
    gone, kept = ImageJob("gone"), ImageJob("kept")
    first = submit(engine, gone, kept)
    gone.cancel()
    first.cancel()  # while it is drawn
    pipe.go.set()
    assert kept.result.result(10) == ["kept 0"]
    assert pipe.calls == [["first"], ["kept"]] and engine.is_alive and not engine._unfinished


def test_an_engine_that_dies_says_so(engine, pipe, monkeypatch):
    waiting = ImageJob("waits")
    first = submit(engine, waiting)
    monkeypatch.setattr(engine, "_let_in", lambda *args: 1 / 0)
    text = TextJob(None, 8)
    engine.submit(text)
    for job in (text, waiting, first):
        with pytest.raises(EngineStopped, match="died"):
            job.result.result(10)
    with pytest.raises(EngineStopped):
        engine.submit(ImageJob("late"))
    engine._threads[0].join(10)
    assert not engine.is_alive


def test_a_queue():
    queue: JobQueue[Job] = JobQueue(2)
    jobs = [Job(), Job(), Job()]
    queue.put(jobs[0])
    queue.put(jobs[1])
    with pytest.raises(EngineBusy):
        queue.put(jobs[2])
    jobs[0].cancel()
    queue.put(jobs[2])  # a cancelled one takes no place
    assert queue.wait() and queue.take(lambda job: True, 1) == [jobs[1]]
    jobs[2].cancel()
    threading.Timer(0.2, queue.close).start()
    began, cpu = time.perf_counter(), time.thread_time()
    assert not queue.wait()  # nor is there anything to wait for with it
    assert time.perf_counter() - began > 0.1 > time.thread_time() - cpu
    with pytest.raises(EngineStopped):
        queue.put(Job())


def test_results_of_those_who_have_left():
    job = Job()
    job.cancel()
    job.succeed(1)
    job.fail(ValueError())
    assert job.is_cancelled


def test_a_client_that_hangs_up_while_it_waits():
    class Request:
        async def receive(self):
            await asyncio.sleep(0.05)
            return {"type": "http.disconnect"}

    async def ask(seconds):
        job = Job()

        async def wait():
            asyncio.get_running_loop().call_later(seconds, job.succeed, "done")
            return await asyncio.wrap_future(job.result)

        try:
            return await while_connected(Request(), wait()), job
        except ClientDisconnect:
            await asyncio.sleep(0)
            return None, job

    answer, job = asyncio.run(ask(0.01))
    assert answer == "done" and not job.is_cancelled
    answer, job = asyncio.run(ask(5))
    assert answer is None and job.is_cancelled
