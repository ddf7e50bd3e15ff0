"""Many clients at once: nothing lost, nothing mixed up, nobody starved."""

import base64
import io
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import PIL.Image
import pytest
from openai import APIStatusError, RateLimitError

from llada_uni.serving.engine import Engine
from llada_uni.serving.jobs import EngineStopped, TextJob
from llada_uni.serving.settings import ServerSettings
from tests.llada_uni.serving.conftest import Server, make_texts_endless


def say(client, text, **settings) -> str:
    messages = [{"role": "user", "content": text}]
    answer = client.chat.completions.create(model="emoji", messages=messages, max_tokens=24, **settings)
    return answer.choices[0].message.content


def test_answers_of_64_clients_are_those_of_one(server, client, pipe):
    texts = [f"What is {'really ' * index}this?" for index in range(16)]
    expected = [pipe.chat([{"role": "user", "content": text}], max_new_tokens=24) for text in texts]
    with ThreadPoolExecutor(64) as clients:
        assert list(clients.map(lambda text: say(client, text), texts * 4)) == expected * 4
    with ThreadPoolExecutor(8) as clients:
        sampled = list(clients.map(lambda seed: say(client, texts[0], temperature=2, seed=seed), range(8)))
    assert sampled == [say(client, texts[0], temperature=2, seed=seed) for seed in range(8)]
    assert len(set(sampled)) > 1


def pixels(encoded: str) -> np.ndarray:
    return np.asarray(PIL.Image.open(io.BytesIO(base64.b64decode(encoded))))


def test_64_clients_of_all_kinds(client):
    """Nothing is lost, nothing mixed up; everybody has what he would have alone."""
    quick = {"num_inference_steps": 1, "num_steps_per_block": 2}

    def draw(seed):
        prompt = ["red apple", "cat face"][seed % 2]
        made = client.images.generate(model="emoji", prompt=prompt, extra_body={"seed": seed, **quick})
        return [item.b64_json for item in made.data]

    def edit(seed):
        made = client.images.edit(model="emoji", image=source, prompt="blue", extra_body={"seed": seed, **quick})
        return [item.b64_json for item in made.data]

    def tell(seed):
        answer = client.chat.completions.create(
            model="emoji", messages=[{"role": "user", "content": "a red apple"}], modalities=["text", "image"],
            seed=seed, max_tokens=16,
            extra_body={"max_images": 1, "num_inference_steps": 1, "num_image_steps_per_block": 2},
        )  # fmt: skip
        message = answer.choices[0].message
        return [message.content, *(part["image_url"]["url"].partition(",")[2] for part in message.images)]

    def ask(seed, **settings):
        messages = [{"role": "user", "content": f"What is number {seed}?"}]
        extra = {"num_steps_per_block": 4}
        return client.chat.completions.create(
            model="emoji", messages=messages, max_tokens=8, extra_body=extra, **settings
        )

    def stream(seed):
        return ["".join(chunk.choices[0].delta.content or "" for chunk in ask(seed, stream=True))]

    def answer(seed):
        return [ask(seed).choices[0].message.content]

    file = io.BytesIO()
    PIL.Image.new("RGB", (64, 64), "red").save(file, "PNG")
    source = ("red.png", file.getvalue(), "image/png")
    asked = [(draw, 0), (draw, 1), (edit, 0), (tell, 0)]
    asked += [(kind, seed) for kind in (stream, answer) for seed in range(6)]
    alone = {(kind, seed): kind(seed) for kind, seed in asked}
    assert len({str(result) for result in alone.values()}) > 6
    asked *= 4
    assert len(asked) == 64
    with ThreadPoolExecutor(64) as clients:
        together = list(clients.map(lambda one: one[0](one[1]), asked))
    for one, parts in zip(asked, together, strict=True):
        if one[0] in (stream, answer, tell):
            assert parts == alone[one], one
        else:  # rows of a batch differ from one alone by rounding
            difference = np.abs(pixels(parts[0]).astype(int) - pixels(alone[one][0]).astype(int))
            assert difference.max() <= 2, one


def test_a_full_queue_turns_away(pipe):
    server = Server(pipe, ServerSettings("emoji", max_new_tokens=900), max_rows=1, max_waiting=1)
    try:
        client = server.client()
        with ThreadPoolExecutor(8) as clients:

            def ask(index):
                try:
                    return say(client, f"What is number {index}?")
                except RateLimitError as error:
                    return error

            answers = list(clients.map(ask, range(8)))
        refused = [answer for answer in answers if isinstance(answer, RateLimitError)]
        assert refused and len(refused) < 8
        assert all(error.response.headers["retry-after"] == "2" for error in refused)
        assert say(client, "What is this?")  # and serves on
    finally:
        server.stop()


def test_a_client_that_hangs_up_frees_its_row(pipe, monkeypatch):
    server = Server(pipe, ServerSettings("emoji", max_new_tokens=900), max_rows=1)
    make_texts_endless(server.engine, monkeypatch)
    try:
        client = server.client()
        messages = [{"role": "user", "content": "What is this?"}]
        body = {"model": "emoji", "messages": messages, "temperature": 10, "max_tokens": 900}
        stream = client.chat.completions.create(**body, stream=True)
        next(iter(stream))
        # One that waits for the row, and has not begun to be answered, hangs up, too.
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=0.5)
        stream.close()
        assert say(client, "What is this?") is not None  # the only row is free again
        deadline = time.monotonic() + 10
        while (server.engine.num_texts_running or len(server.engine.texts)) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert server.engine.num_texts_running == len(server.engine.texts) == 0
    finally:
        server.stop()


def test_an_api_key(pipe):
    server = Server(pipe, ServerSettings("emoji", api_key="secret", max_new_tokens=8))
    try:
        assert [model.id for model in server.client("secret").models.list()] == ["emoji"]
        for key in ("wrong", "secret2"):
            with pytest.raises(APIStatusError) as refused:
                server.client(key).models.list()
            assert refused.value.status_code == 401
        assert httpx.get(f"{server.url}/v1/models").status_code == 401
        assert httpx.get(f"{server.url}/health").status_code == 200
    finally:
        server.stop()


def test_a_stopped_engine_does_what_it_has(pipe):
    engine = Engine(pipe, max_rows=2)
    ids = pipe.processor.apply_chat_template(
        [{"role": "user", "content": "hello"}], tokenize=True, return_tensors="pt", return_dict=True
    )["input_ids"][0]
    jobs = [TextJob(ids, 8) for _ in range(6)]
    for job in jobs:
        engine.submit(job)
    engine.start()
    stopping = threading.Thread(target=engine.stop)
    stopping.start()
    results = [job.result.result(timeout=60) for job in jobs]
    stopping.join(60)
    assert not stopping.is_alive() and all(result == results[0] for result in results)
    with pytest.raises(EngineStopped):
        engine.submit(TextJob(ids, 8))


def test_sigterm_loses_no_request():
    """What has been accepted is answered, of whatever kind; what comes later finds nobody."""
    command = [sys.executable, "-m", "llada_uni.cli", "serve", "--port", "0", "--max-new-tokens", "64"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        line = ""
        while "running on" not in line:
            line = process.stderr.readline()
            assert line, "the server has not started"
        url = line.split("running on ")[1].split()[0]
        threading.Thread(target=process.stderr.read, daemon=True).start()
        chat = {"model": "emoji", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 64}
        tell = {**chat, "modalities": ["text", "image"], "max_images": 1}
        asked = [("chat/completions", chat), ("chat/completions", {**chat, "stream": True})] * 3
        asked += [("chat/completions", tell), ("chat/completions", {**tell, "stream": True})]
        asked += [("images/generations", {"prompt": "a red apple", "n": n}) for n in (1, 2)]
        with ThreadPoolExecutor(len(asked)) as clients:
            answers = [clients.submit(httpx.post, f"{url}/v1/{path}", json=body, timeout=60) for path, body in asked]
            accepted = re.compile(r"^llada_uni_(?:waiting|running|requests_total).* (\d+)\.0$", re.MULTILINE)
            probes = 0
            while sum(map(int, accepted.findall(httpx.get(f"{url}/metrics").text))) - probes < len(asked):
                probes += 1  # the one that has just counted
                time.sleep(0.05)
            process.send_signal(signal.SIGTERM)
            time.sleep(0.5)
            with pytest.raises(httpx.TransportError):
                httpx.post(f"{url}/v1/chat/completions", json=chat)
            for (path, body), answer in zip(asked, answers, strict=True):
                response = answer.result()
                assert response.status_code == 200
                if body.get("stream"):
                    assert response.text.endswith("data: [DONE]\n\n") and '"finish_reason": "' in response.text
                else:
                    assert response.json()["choices" if "chat" in path else "data"]
        assert process.wait(30) in (0, -signal.SIGTERM)
    finally:
        process.kill()
