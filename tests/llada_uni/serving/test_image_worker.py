"""The threads of images, without a model: groups, what fails alone, and the decoder beside."""

import threading
import time
from types import SimpleNamespace

import pytest
import torch

from diffusers_llada_uni.code_generation import PromptGroup
from llada_uni.serving.engine import Engine
from llada_uni.serving.image_jobs import ImageJob, PartsJob
from llada_uni.serving.jobs import EngineStopped, TextJob


class Pipe:
    """
    Draws the first letter of each prompt, and the seed; refuses "bad", has no memory for the pixels of several "z";
    makes codes when `codes_go` is set, pixels when `pixels_go` is.
    """

    def __init__(self) -> None:
        self.config = {"editing_guidance_scale": 4.0}
        self.code_generator = SimpleNamespace(
            model=None, processor=None, grid_of=lambda *size: (1, 1), write_prompts=self.write, generate=self.generate
        )
        self.code_decoder = SimpleNamespace(
            settle=lambda **settings: settings, check_grid=lambda *args: None, decode=self.decode
        )
        self.calls: list[list[str]] = []
        self.begun, self.codes_go, self.pixels_go = threading.Event(), threading.Event(), threading.Event()
        self.pixels_go.set()
        self.decoding, self.num_given_up = threading.Event(), 0

    def write(self, texts, grid):
        return [PromptGroup(list(range(len(texts))), texts, grid)]

    def generate(self, group, settings, generators, callback):
        self.calls.append(group.inputs)
        self.begun.set()
        assert self.codes_go.wait(10)
        callback(1, 1)
        if "bad" in group.inputs:
            raise ValueError("`prompt` is bad.")
        return torch.tensor([ord(text[0]) for text in group.inputs])[:, None, None]

    def decode(self, codes, settings, generators, on_step_end):
        self.decoding.set()
        assert self.pixels_go.wait(10)
        try:
            on_step_end(0, 1.0, {})
        except Exception:
            self.num_given_up += 1
            raise
        letters = [chr(code) for code in codes.flatten()]
        images = [f"{letter} {one.initial_seed()}" for letter, one in zip(letters, generators, strict=True)]
        if letters.count("z") > 1:
            for one in generators:
                torch.rand((), generator=one)
            raise MemoryError
        return [f"{image} {torch.rand((), generator=one):.2f}" if "z" in image else image
                for image, one in zip(images, generators, strict=True)]  # fmt: skip


@pytest.fixture
def pipe():
    return Pipe()


@pytest.fixture
def engine(pipe):
    engine = Engine(pipe, max_images=3)
    engine.start()
    yield engine
    pipe.codes_go.set()
    pipe.pixels_go.set()
    engine.stop()


def submit(engine, pipe, *jobs):
    """While the first is drawn, so that the others wait together."""
    first = ImageJob("first")
    engine.submit(first)
    assert pipe.begun.wait(10)
    for job in jobs:
        engine.submit(job)
    return first


def test_a_bad_job_fails_alone(engine, pipe):
    jobs = [ImageJob("a"), ImageJob("bad"), ImageJob("c")]
    submit(engine, pipe, *jobs)
    pipe.codes_go.set()
    assert jobs[0].result.result(10) == ["a 0"] and jobs[2].result.result(10) == ["c 0"]
    with pytest.raises(ValueError, match="is bad"):
        jobs[1].result.result(10)
    assert pipe.calls == [["first"], ["a", "bad", "c"], ["a"], ["bad"], ["c"]]


def test_pixels_that_fail_together_are_made_alone_of_the_same_noise(engine, pipe):
    expected = [f"z {seed} {torch.rand((), generator=torch.Generator().manual_seed(seed)):.2f}" for seed in (1, 2)]
    job = ImageJob("z", [1, 2])
    submit(engine, pipe, job)
    pipe.codes_go.set()
    assert job.result.result(10) == expected


def test_no_more_images_at_once_than_allowed(engine, pipe):
    many, one = ImageJob("many", [1, 2, 3, 4, 5, 6, 7]), ImageJob("one")
    submit(engine, pipe, many, one)
    pipe.codes_go.set()
    assert many.result.result(10) == [f"m {seed}" for seed in range(1, 8)]
    assert one.result.result(10) == ["o 0"]
    assert pipe.calls[1:] == [["many"] * 3, ["many"] * 3, ["many"], ["one"]]


def test_jobs_of_other_settings_are_no_part_of_a_group(engine, pipe):
    jobs = [ImageJob("a"), ImageJob("b", settings={"width": 64}), ImageJob("c")]
    submit(engine, pipe, *jobs)
    pipe.codes_go.set()
    assert [job.result.result(10) for job in jobs] == [["a 0"], ["b 0"], ["c 0"]]
    assert pipe.calls[1:] == [["a", "c"], ["b"]]
    assert len({ImageJob("a", images=images, mask=mask).kind for images in ([], [1]) for mask in (None, 1)}) == 4


def test_a_cancelled_job_is_not_drawn(engine, pipe):
    gone, kept = ImageJob("gone"), ImageJob("kept")
    first = submit(engine, pipe, gone, kept)
    gone.cancel()
    first.cancel()  # while it is drawn: nobody waits for that batch, and it ends at the next block
    pipe.codes_go.set()
    assert kept.result.result(10) == ["k 0"]
    assert pipe.calls == [["first"], ["kept"]] and engine.is_alive and not engine._unfinished
    assert engine.num_images == 1


def test_pixels_that_nobody_waits_for_are_given_up(engine, pipe):
    pipe.pixels_go.clear()
    left, first = ImageJob("left"), ImageJob("first")
    pipe.codes_go.set()
    engine.submit(left)
    assert pipe.decoding.wait(10)
    left.cancel()
    pipe.pixels_go.set()
    engine.submit(first)
    assert first.result.result(10) == ["f 0"]
    assert pipe.num_given_up == 1 and engine.is_alive


def test_codes_are_made_while_pixels_are(engine, pipe):
    pipe.pixels_go.clear()
    jobs = [ImageJob(letter, settings={"width": number}) for number, letter in enumerate("abcd")]
    first = submit(engine, pipe, *jobs)
    pipe.codes_go.set()
    # The first is decoded, a waits for that, b has its codes, and c must wait: codes do not pile up.
    deadline = time.monotonic() + 10
    while len(pipe.calls) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert pipe.calls == [["first"], ["a"], ["b"]]
    assert engine.num_running(ImageJob) == 3 and len(engine.images) == 2
    pipe.pixels_go.set()
    assert [job.result.result(10) for job in (first, *jobs)] == [[f"{letter} 0"] for letter in "fabcd"]


def test_an_engine_that_dies_says_so(engine, pipe, monkeypatch):
    waiting = ImageJob("waits")
    first = submit(engine, pipe, waiting)
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


def test_a_decoder_that_dies_holds_up_nobody(engine, pipe, monkeypatch):
    pipe.pixels_go.clear()
    monkeypatch.setattr(engine._pixels, "_decode", lambda *args: 1 / 0)
    jobs = [ImageJob(letter, settings={"width": number}) for number, letter in enumerate("abc")]
    first = submit(engine, pipe, *jobs)
    pipe.codes_go.set()
    for job in (first, *jobs):
        with pytest.raises(EngineStopped):
            job.result.result(10)
    engine.stop()


def test_parts_come_in_their_order():
    told: list[str] = []
    job = PartsJob(on_part=told.append)
    job.take(1, "image")
    assert told == []
    job.take(0, "text")
    assert told == ["text", "image"]
    job.take(2, "end")
    assert not job.is_done
    job.end_after(3)
    assert job.result.result(0) == told == ["text", "image", "end"]
    empty = PartsJob()
    empty.end_after(0)
    assert empty.result.result(0) == []


def test_the_last_part_is_told_although_another_thread_says_how_many_there_are():
    told: list[str] = []

    class Parts(list):
        def append(self, part):
            super().append(part)
            other = threading.Thread(target=job.end_after, args=(1,))
            other.start()
            other.join(10)

    job = PartsJob(on_part=told.append)
    job._parts = Parts()
    job.take(0, "image")
    assert job.result.result(0) == told == ["image"]
