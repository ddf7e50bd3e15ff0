"""Clients that are killed, a model that fails, and what is left of requests that are over."""

import gc
import json
import socket
import struct
import threading
import time

import httpx
import pytest
import torch
from openai import APIError, InternalServerError

from diffusers_llada_uni import CodeDecoder
from llada_uni.serving.jobs import Job
from tests.llada_uni.serving.conftest import make_texts_endless
from transformers_llada_uni.generation.continuous_batch import ContinuousBatch


HELLO = [{"role": "user", "content": "hello"}]
LONG = {"model": "emoji", "messages": HELLO, "max_tokens": 64, "temperature": 9}
TELL = {"model": "emoji", "messages": [{"role": "user", "content": "a red apple"}], "modalities": ["text", "image"]}
DRAW = {"model": "emoji", "prompt": "a red apple", "n": 8}
FAILS = 13  # the seed of a request that fails in the model


def send(server, path: str, body: dict) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=30)
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: {len(content)}"
    connection.sendall(head.encode() + b"\r\n\r\n" + content)
    return connection


def kill(connection: socket.socket) -> None:
    """As when a process dies: the connection is reset."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


@pytest.fixture
def submitted(server, monkeypatch):
    """Jobs that the engine gets; texts go on to their full length, whatever the model says."""
    jobs: list[Job] = []
    make_texts_endless(server.engine, monkeypatch)
    submit = server.engine.submit
    monkeypatch.setattr(server.engine, "submit", lambda job: jobs.append(job) or submit(job))
    return jobs


def wait_until(condition, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", LONG),
        ("/v1/chat/completions", {**LONG, "stream": True}),
        ("/v1/chat/completions", TELL),
        ("/v1/chat/completions", {**TELL, "stream": True}),
        ("/v1/images/generations", DRAW),
    ],
    ids=["answer", "streamed answer", "story", "streamed story", "images"],
)
def test_a_client_that_is_killed_before_the_first_byte(server, submitted, monkeypatch, path, body):
    """Whether the engine has the job already, or gets it when the client is gone: it does not do it to its end."""
    is_read = threading.Event()

    def slowly(write):
        def write_slowly(*args):
            is_read.set()
            time.sleep(0.2)
            return write(*args)

        return write_slowly

    for name in ("write_prompt", "write_story_prompt"):
        monkeypatch.setattr(server.engine, name, slowly(getattr(server.engine, name)))
    for is_first in (True, False) if "messages" in body else (False,):
        submitted.clear()
        connection = send(server, path, body)
        if is_first:
            assert is_read.wait(10)
        else:
            wait_until(lambda: submitted)
        kill(connection)
        wait_until(lambda: submitted and submitted[0].result.done())
        assert submitted[0].is_cancelled, is_first


def test_a_client_that_is_killed_in_the_middle(server, submitted, monkeypatch):
    step = ContinuousBatch.step
    # However busy the machine is, it is known that the client is gone before the last of four blocks.
    monkeypatch.setattr(ContinuousBatch, "step", lambda self: time.sleep(0.3) or step(self))
    connection = send(server, "/v1/chat/completions", {**LONG, "stream": True})
    received = b""
    while received.count(b"data: ") < 2:
        received += connection.recv(10_000)
    kill(connection)
    wait_until(lambda: submitted[0].result.done())
    assert submitted[0].is_cancelled
    counted = 'llada_uni_requests_total{route="/v1/chat/completions",status="499"}'
    wait_until(lambda: counted in httpx.get(f"{server.url}/metrics").text)


def test_an_answer_that_fails_fails_alone(client, monkeypatch):
    add = ContinuousBatch.add

    def failing_add(self, input_ids, max_new_tokens=None, generator=None):
        if generator is not None and generator.initial_seed() == FAILS:
            raise RuntimeError("CUDA error: out of luck")
        return add(self, input_ids, max_new_tokens, generator)

    monkeypatch.setattr(ContinuousBatch, "add", failing_add)

    def ask(seed, **settings):
        return client.chat.completions.create(model="emoji", messages=HELLO, max_tokens=4, seed=seed, **settings)

    with pytest.raises(InternalServerError, match="its log says why") as failed:
        ask(FAILS)
    assert "CUDA" not in str(failed.value)
    with pytest.raises(APIError, match="its log says why"):
        list(ask(FAILS, stream=True))
    assert ask(1).choices[0].message.content is not None


def test_an_image_that_fails_fails_alone(server, client, monkeypatch):
    decode = CodeDecoder.decode

    def failing_decode(self, codes, settings, generator, **further):
        if any(one.initial_seed() == FAILS for one in generator):
            raise RuntimeError("CUDA error: out of luck")
        return decode(self, codes, settings, generator)

    monkeypatch.setattr(CodeDecoder, "decode", failing_decode)
    with pytest.raises(InternalServerError, match="its log says why"):
        client.images.generate(model="emoji", prompt="a red apple", n=2, extra_body={"seed": FAILS - 1})
    with pytest.raises(InternalServerError, match="its log says why"):
        client.chat.completions.create(**TELL, seed=FAILS - 1, max_tokens=16, extra_body={"max_images": 1})
    assert client.images.generate(model="emoji", prompt="a red apple").data
    assert server.engine.is_alive


def test_nothing_is_left_of_requests_that_are_over(server):
    chats, drawings = "/v1/chat/completions", "/v1/images/generations"
    short = {**LONG, "max_tokens": 1, "temperature": 0, "num_steps_per_block": 1}
    quick = {**DRAW, "n": 1, "num_inference_steps": 1, "num_steps_per_block": 1}
    bodies = [
        (chats, short, 200), (chats, {**short, "stream": True}, 200), (chats, {**short, "stream": 3}, 400),
        (chats, {**short, "max_tokens": 9999}, 400), (drawings, quick, 200), (drawings, {**quick, "n": 99}, 400),
    ]  # fmt: skip

    def left() -> tuple[int, int]:
        wait_until(lambda: not server.engine._unfinished)
        gc.collect()
        kinds = [type(one) for one in gc.get_objects()]
        return sum(issubclass(kind, Job) for kind in kinds), kinds.count(torch.Tensor)

    with httpx.Client(base_url=server.url, timeout=60) as http:
        for turn in range(10):
            if turn == 1:
                jobs, tensors = left()
            for path, body, status in bodies:
                assert http.post(path, json=body).status_code == status
    more_jobs, more_tensors = left()
    assert more_jobs <= jobs + 1 and more_tensors <= tensors + 9
