"""What a server refuses, each with the status and the field; and that it serves on."""

import base64
import io
import json
import socket
import struct
import time
import zlib

import httpx
import PIL.Image
import pytest

from llada_uni.serving.settings import ServerSettings
from tests.llada_uni.serving.conftest import Server


LIMIT = 300_000  # bytes of a body


def png(width: int = 8, height: int = 8, mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    PIL.Image.new(mode, (width, height)).save(buffer, "PNG")
    return buffer.getvalue()


def tiff() -> bytes:
    buffer = io.BytesIO()
    PIL.Image.new("RGB", (8, 8)).save(buffer, "TIFF")
    return buffer.getvalue()


def bomb(width: int, height: int, name: bytes = b"teXt", content: bytes = b"") -> bytes:
    """A PNG that says it is of this size, with a chunk of its own."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", head), (name, content), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )


def data_url(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode()


def chat(**fields: object) -> dict:
    return {"model": "emoji", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4, **fields}


def with_image(url: object) -> dict:
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What?"}]
    return chat(messages=[{"role": "user", "content": parts}])


@pytest.fixture(scope="module")
def strict(pipe):
    settings = ServerSettings(
        "emoji", max_new_tokens=32, max_prompt_tokens=120, max_images=2, max_side=128, max_input_pixels=10_000,
        max_body_bytes=LIMIT, max_body_seconds=2, allowed_image_hosts=frozenset({"localhost"}),
    )  # fmt: skip
    server = Server(pipe, settings)
    yield server
    server.stop()


IMAGE = {"type": "image_url", "image_url": {"url": "data:,"}}
CHATS = {
    "no json": (b"{", 400, None),
    "not an object": (b"[]", 400, None),
    "no messages": ({"model": "emoji"}, 400, "messages"),
    "empty messages": (chat(messages=[]), 400, "messages"),
    "messages of text": (chat(messages="hello"), 400, "messages"),
    "no role": (chat(messages=[{"content": "hello"}]), 400, "messages.0.role"),
    "unknown role": (chat(messages=[{"role": "tool", "content": "hello"}]), 400, "messages.0.role"),
    "no content": (chat(messages=[{"role": "user"}]), 400, "messages.0.content"),
    "null content": (chat(messages=[{"role": "user", "content": None}]), 400, "messages.0.content"),
    "unknown part": (
        chat(messages=[{"role": "user", "content": [{"type": "input_audio"}]}]),
        400,
        "messages.0.content",
    ),
    "other model": (chat(model="gpt-5"), 404, "model"),
    "no model": ({"messages": chat()["messages"]}, 400, "model"),
    "model of another type": (chat(model=3), 400, "model"),
    "temperature of text": (chat(temperature="hot"), 400, "temperature"),
    "negative temperature": (chat(temperature=-1), 400, "temperature"),
    "infinite temperature": (json.dumps(chat(temperature=float("inf"))).encode(), 400, "temperature"),
    "top_p of 2": (chat(top_p=2), 400, "top_p"),
    "top_k of 0": (chat(top_k=0), 400, "top_k"),
    "no tokens": (chat(max_tokens=0), 400, "max_tokens"),
    "too many tokens": (chat(max_tokens=33), 400, "max_tokens"),
    "two answers": (chat(n=2), 400, "n"),
    "negative seed": (chat(seed=-1), 400, "seed"),
    "seed of text": (chat(seed="one"), 400, "seed"),
    "tools": (chat(tools=[{"type": "function"}]), 400, "tools"),
    "logprobs": (chat(logprobs=True), 400, "logprobs"),
    "response format": (chat(response_format={"type": "json_object"}), 400, "response_format"),
    "unknown field": (chat(colour="red"), 400, "colour"),
    "penalty": (chat(presence_penalty=0.5), 400, "presence_penalty"),
    "audio": (chat(modalities=["text", "audio"]), 400, "modalities"),
    "no modality": (chat(modalities=[]), 400, "modalities"),
    "images alone": (chat(modalities=["image"]), 400, "modalities"),
    "images of a text": (chat(max_images=2), 400, "max_images"),
    "size of a text": (chat(size="64x64"), 400, "size"),
    "steps of a text": (chat(num_inference_steps=2), 400, "num_inference_steps"),
    "nothing": (b"", 400, None),
    "null": (b"null", 400, None),
    "a number": (b"3", 400, None),
    "other bytes": (b'{"model": "\xff"}', 400, None),
    "hardly a temperature": (chat(temperature=1e-30), 400, "temperature"),
    "seed of no number": (b'{"model": "emoji", "messages": [], "seed": NaN}', 400, None),
    "seed beyond 64 bits": (chat(seed=2**63), 400, "seed"),
    "two systems": (chat(messages=[{"role": "system", "content": "a"}] * 2), 400, "messages"),
    "images of a user": (
        chat(messages=[{"role": "user", "content": "a", "images": [IMAGE]}]),
        400,
        "messages.0.images",
    ),
    "images twice": (
        chat(messages=[{"role": "assistant", "content": [IMAGE], "images": [IMAGE]}]),
        400,
        "messages.0.images",
    ),
    "broken image of an answer": (
        chat(messages=[{"role": "assistant", "content": "a", "images": [IMAGE]}]),
        400,
        "messages.0.images.0.image_url",
    ),
    "deep content": (b'{"model": "emoji", "messages": ' + b"[" * 50_000 + b"]" * 50_000 + b"}", 400, None),
    "threshold of 2": (chat(threshold=2), 400, "threshold"),
    "no steps": (chat(num_steps_per_block=0), 400, "num_steps_per_block"),
    "stop of numbers": (chat(stop=[1]), 400, "stop"),
    "empty stop": (chat(stop=""), 400, "stop"),
    "empty stop of several": (chat(stop=["a", ""]), 400, "stop"),
    "endless stops": (chat(stop=["a"] * 17), 400, "stop"),
    "endless number": (b'{"model": "emoji", "max_tokens": 1' + b"0" * 5000 + b"}", 400, None),
    "half a character": (
        b'{"model": "emoji", "messages": [{"role": "user", "content": "\\ud800"}]}',
        400,
        "messages",
    ),
    "threshold of no number": (b'{"model": "emoji", "messages": [], "threshold": NaN}', 400, None),
    "stream of text": (chat(stream="perhaps"), 400, "stream"),
    "long prompt": (chat(messages=[{"role": "user", "content": "hello " * 400}]), 400, "messages"),
    "long body": (chat(messages=[{"role": "user", "content": "x" * LIMIT}]), 413, None),
    "deep json": (b"[" * 100_000, 400, None),
    "image of http": (with_image("http://example.com/a.png"), 400, "messages.0.content.0.image_url"),
    "image of a private host": (with_image("http://localhost:1/a.png"), 400, "messages.0.content.0.image_url"),
    "image of a file": (with_image("file:///etc/passwd"), 400, "messages.0.content.0.image_url"),
    "image of nothing": (with_image("data:image/png;base64,"), 400, "messages.0.content.0.image_url"),
    "image not in base64": (with_image("data:image/png;base64,%%%"), 400, "messages.0.content.0.image_url"),
    "image beyond base64": (with_image("data:image/png;base64,é"), 400, "messages.0.content.0.image_url"),
    "image of a broken url": (with_image("http://[::1"), 400, "messages.0.content.0.image_url"),
    "image without base64": (with_image("data:image/png,abc"), 400, "messages.0.content.0.image_url"),
    "image of text": (with_image(data_url(b"hello")), 400, "messages.0.content.0.image_url"),
    "image cut off": (with_image(data_url(png(90, 90)[:-30])), 400, "messages.0.content.0.image_url"),
    "image that says it is huge": (with_image(data_url(bomb(60_000, 60_000))), 400, "messages.0.content.0.image_url"),
    "image with a bomb of words": (
        with_image(data_url(bomb(8, 8, b"zTXt", b"a\0\0" + zlib.compress(b"a" * 50_000_000)))),
        400,
        "messages.0.content.0.image_url",
    ),
    "image of another format": (with_image(data_url(tiff())), 400, "messages.0.content.0.image_url"),
    "image of a drawing": (with_image(data_url(b"<svg/>")), 400, "messages.0.content.0.image_url"),
    "image of spaces": (with_image("data:image/png;base64, AAAA"), 400, "messages.0.content.0.image_url"),
    "image of a script": (with_image("javascript:alert(1)"), 400, "messages.0.content.0.image_url"),
    "image too large": (with_image(data_url(png(101, 100))), 400, "messages.0.content.0.image_url"),
    "url of a number": (with_image(3), 400, "messages.0.content"),
    "too many images": (
        chat(messages=[{"role": "user", "content": with_image(data_url(png()))["messages"][0]["content"][:1] * 3}]),
        400,
        "messages",
    ),
}
DRAWINGS = {
    "no prompt": ({}, 400, "prompt"),
    "empty prompt": ({"prompt": ""}, 400, "prompt"),
    "blank prompt": ({"prompt": "  "}, 400, "prompt"),
    "prompt of a list": ({"prompt": ["a cat"]}, 400, "prompt"),
    "too many images": ({"prompt": "a cat", "n": 3}, 400, "n"),
    "no image": ({"prompt": "a cat", "n": 0}, 400, "n"),
    "size of text": ({"prompt": "a cat", "size": "large"}, 400, "size"),
    "too large": ({"prompt": "a cat", "size": "256x64"}, 400, "size"),
    "size of no multiple": ({"prompt": "a cat", "size": "65x64"}, 400, "size"),
    "size of nothing": ({"prompt": "a cat", "size": "0x0"}, 400, "size"),
    "by url": ({"prompt": "a cat", "response_format": "url"}, 400, "response_format"),
    "unknown format": ({"prompt": "a cat", "output_format": "svg"}, 400, "output_format"),
    "unknown field": ({"prompt": "a cat", "style": "vivid"}, 400, "style"),
    "other model": ({"prompt": "a cat", "model": "dall-e-3"}, 404, "model"),
    "guidance of text": ({"prompt": "a cat", "guidance_scale": "much"}, 400, "guidance_scale"),
    "stream": ({"prompt": "a cat", "stream": True}, 400, "stream"),
    "partial images": ({"prompt": "a cat", "partial_images": 2}, 400, "partial_images"),
    "transparent": ({"prompt": "a cat", "background": "transparent"}, 400, "background"),
    "millions of images": ({"prompt": "a cat", "n": 10**18}, 400, "n"),
    "half an image": ({"prompt": "a cat", "n": 1.5}, 400, "n"),
    "wide digits": ({"prompt": "a cat", "size": "\uff16\uff14x64"}, 400, "size"),
    "too long a prompt": ({"prompt": "a" * 32_001}, 400, "prompt"),
    "too many tokens": ({"prompt": "a " * 5000}, 400, "prompt"),
    "half a character": ({"prompt": "\ud800"}, 400, "prompt"),
    "endless steps": ({"prompt": "a cat", "num_inference_steps": 10**9}, 400, "num_inference_steps"),
}


def post(server: Server, path: str, body: object) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return httpx.post(f"{server.url}{path}", content=content, headers={"content-type": "application/json"}, timeout=60)


def check(response: httpx.Response, status: int, param: str | None) -> None:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error["message"] and error["type"] == "invalid_request_error"
    if param is not None:
        assert error["param"].startswith(param)


@pytest.mark.parametrize("case", CHATS)
def test_bad_conversations(strict, case):
    body, status, param = CHATS[case]
    check(post(strict, "/v1/chat/completions", body), status, param)


@pytest.mark.parametrize("case", DRAWINGS)
def test_bad_drawings(strict, case):
    body, status, param = DRAWINGS[case]
    check(post(strict, "/v1/images/generations", body), status, param)


def edit(server: Server, fields: dict, files: list) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/images/edits", data=fields, files=files, timeout=60)


def test_bad_edits(strict):
    image, prompt = ("image", ("a.png", png(64, 64))), {"prompt": "make it red"}
    check(post(strict, "/v1/images/edits", {"prompt": "make it red"}), 415, None)
    check(edit(strict, prompt, [("mask", ("m.png", png(64, 64)))]), 400, "image")
    check(edit(strict, prompt, [("image", ("a.png", b"hello"))]), 400, "image")
    check(edit(strict, prompt, [image, ("mask", ("m.png", png(32, 64)))]), 400, "mask")
    check(edit(strict, prompt, [image, ("mask", ("m.png", b"hello"))]), 400, "mask")
    check(edit(strict, prompt, [image] * 3), 400, "image")
    check(edit(strict, prompt, [image, ("picture", ("a.png", png()))]), 400, "picture")
    check(edit(strict, prompt, [image, ("mask", ("m.png", png(64, 64)))]), 400, "mask")  # black everywhere
    check(edit(strict, {}, [image]), 400, "prompt")
    check(edit(strict, {**prompt, "n": "many"}, [image]), 400, "n")
    check(edit(strict, {**prompt, "background": "transparent"}, [image]), 400, "background")
    check(edit(strict, prompt, [("image", ("a.png", b"x" * LIMIT))]), 413, None)


def test_a_body_that_does_not_say_its_length(strict):
    def body():
        for _ in range(LIMIT // 10_000 + 1):
            yield b" " * 10_000

    headers = {"content-type": "application/json"}
    check(httpx.post(f"{strict.url}/v1/chat/completions", content=body(), headers=headers), 413, None)


def begin_to_send(server: Server, path: str, content_type: str) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=30)
    head = f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: {content_type}\r\nContent-Length: 100\r\n\r\n-"
    connection.sendall(head.encode())
    return connection


def test_a_body_that_does_not_come(strict):
    with begin_to_send(strict, "/v1/chat/completions", "application/json") as connection:
        assert connection.recv(1000).startswith(b"HTTP/1.1 408 ")


def test_a_client_that_leaves_while_it_sends(strict):
    begin_to_send(strict, "/v1/images/edits", "multipart/form-data; boundary=x").close()
    deadline = time.monotonic() + 10
    while 'route="/v1/images/edits",status="499"' not in httpx.get(f"{strict.url}/metrics").text:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_bodies_that_are_not_json(strict):
    """As of curl without a header: the sentence says what is missing."""
    content = json.dumps(chat()).encode()
    for path in ("/v1/chat/completions", "/v1/images/generations"):
        for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""):
            response = httpx.post(f"{strict.url}{path}", content=content, headers={"content-type": kind})
            check(response, 415, None)
            assert "application/json" in response.text


def test_many_kinds_are_tested():
    assert len(CHATS) + len(DRAWINGS) > 100


def test_a_prompt_of_megabytes_is_refused_at_once(pipe):
    server, messages = Server(pipe, ServerSettings("emoji")), [{"role": "user", "content": "a" * 10_000_000}]
    try:
        for fields in ({}, {"modalities": ["text", "image"]}):
            began = time.perf_counter()
            check(post(server, "/v1/chat/completions", chat(messages=messages, **fields)), 400, "messages")
            assert time.perf_counter() - began < 5
    finally:
        server.stop()


@pytest.mark.parametrize(
    "path, fields, sentence",
    [
        (
            "chat/completions",
            {"mesages": [], "model": "emoji"},
            "`mesages` is not known to this server. Did you mean `messages`?",
        ),
        ("chat/completions", chat(temprature=1), "Did you mean `temperature`?"),
        ("chat/completions", chat(messages=[{"role": "user", "content": "a", "x": 1}]), "`messages.0.x` is not known"),
        (
            "chat/completions",
            chat(
                messages=[{"role": "user", "content": [{"type": "image_url", "image_url": "data:image/png;base64,A"}]}]
            ),
            "`messages.0.content.0.image_url`: Input should be a valid dictionary",
        ),
        (
            "chat/completions",
            chat(messages=[{"role": "user", "content": [{"type": "input_image", "image_url": "a"}]}]),
            "`messages.0.content.0`: Input tag 'input_image' found using 'type' does not match any of the expected",
        ),
        ("chat/completions", chat(messages=[{"role": "user", "content": None}]), "`messages.0.content` is missing."),
        ("chat/completions", chat(str=1), "`str` is not known to this server. Did you mean `stream`?"),
        (
            "chat/completions",
            chat(messages=[{"role": "user", "content": [{"type": "text"}]}]),
            "`messages.0.content.0.text` is missing.",
        ),
        ("images/generations", {"promt": "a cat"}, "Did you mean `prompt`?"),
        ("images/generations", {"prompt": "a cat", "style": "vivid"}, "`style` is not known to this server."),
        ("images/generations", {"prompt": "a cat", "quality": "hd"}, "`quality` may be 'auto' here, got 'hd'."),
        ("images/generations", {"prompt": "a", "response_format": "url"}, "`response_format` may be 'b64_json' here"),
        (
            "images/generations",
            {"prompt": "a", "size": "large"},
            "`size` must be 'auto' or 'WIDTHxHEIGHT', got",
        ),
        ("images/generations", {}, "`prompt` is missing."),
    ],
)
def test_a_refusal_says_what_was_meant_or_what_is_taken(strict, path, fields, sentence):
    message = post(strict, f"/v1/{path}", fields).json()["error"]["message"]
    assert sentence in message and ("Did you mean" in message) == ("Did you mean" in sentence)


def test_an_edit_in_a_charset_that_is_none(strict):
    body = b'--XX\r\nContent-Disposition: form-data; name="prompt"\r\n\r\nab\r\n--XX--\r\n'
    headers = {"content-type": "multipart/form-data; boundary=XX; charset=undefined"}
    response = httpx.post(f"{strict.url}/v1/images/edits", content=body, headers=headers)
    check(response, 400, None)
    assert "charset" in response.text


def test_unknown_paths_and_methods(strict):
    wrong = httpx.post(f"{strict.url}/chat/completions", json=chat())
    assert wrong.status_code == 404 and "Did you mean /v1/chat/completions?" in wrong.json()["error"]["message"]
    assert "Did you mean" not in httpx.get(f"{strict.url}/v1/nothing").text
    check(httpx.get(f"{strict.url}/v1/nothing"), 404, None)
    check(httpx.get(f"{strict.url}/v1/chat/completions"), 405, None)
    check(httpx.get(f"{strict.url}/v1/models/other"), 404, "model")


def test_serves_on_and_counts(strict):
    assert httpx.get(f"{strict.url}/health").json() == {"status": "ok"}
    assert post(strict, "/v1/chat/completions", chat()).status_code == 200
    assert post(strict, "/v1/chat/completions", chat(n=2)).status_code == 400
    assert post(strict, "/v1/images/generations", {"prompt": "a cat", "num_inference_steps": 1}).status_code == 200
    metrics = dict(line.rsplit(" ", 1) for line in httpx.get(f"{strict.url}/metrics").text.splitlines())
    chats = 'llada_uni_requests_total{route="/v1/chat/completions",status='
    assert float(metrics[f'{chats}"200"}}']) == 1 and float(metrics[f'{chats}"400"}}']) >= 1
    assert float(metrics['llada_uni_request_seconds_bucket{le="+Inf",route="/v1/images/generations"}']) >= 1
    for kind in ("text", "image", "story"):
        assert (
            metrics[f'llada_uni_waiting{{kind="{kind}"}}'] == metrics[f'llada_uni_running{{kind="{kind}"}}'] == "0.0"
        )
    assert float(metrics["llada_uni_text_tokens_total"]) >= 1 and float(metrics["llada_uni_images_total"]) >= 1
    assert metrics["llada_uni_alive"] == "1.0" and float(metrics["process_resident_memory_bytes"]) > 1e8
