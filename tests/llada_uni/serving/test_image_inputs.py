"""Images that requests name: from hosts that are allowed, and never from private networks."""

import io
import socket
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import PIL.Image
import pytest

from llada_uni.serving import image_inputs
from llada_uni.serving.errors import RequestError
from llada_uni.serving.image_inputs import fetch_image
from llada_uni.serving.images import _mask
from llada_uni.serving.settings import ServerSettings


SETTINGS = ServerSettings(allowed_image_hosts=frozenset({"images.example"}))


def resolve_to(monkeypatch, *addresses: str) -> None:
    entries = [(None, None, None, "", (address, 80)) for address in addresses]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: entries)


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.0.1",
        "::1", "::", "fe80::1", "fd00::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "ff02::1",
    ],
)  # fmt: skip
def test_private_addresses(monkeypatch, address):
    resolve_to(monkeypatch, "93.184.216.34", address)  # one of them is enough
    with pytest.raises(RequestError, match="not a public address"):
        fetch_image("http://images.example/a.png", "url", SETTINGS)


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1/a.png", "http://images.example@localhost/", "http://images.example.evil.example/",
        "ftp://images.example/", "//images.example/", "http://[::1", "http://images.example:99999/", "http://",
        "http://images.example\\@localhost/", "",
    ],
)  # fmt: skip
def test_urls_that_are_refused(monkeypatch, url):
    resolve_to(monkeypatch, "127.0.0.1")
    with pytest.raises(RequestError, match="`url`"):
        fetch_image(url, "url", SETTINGS)


class Handler(BaseHTTPRequestHandler):
    hosts: list[str | None] = []

    def do_GET(self) -> None:
        self.hosts.append(self.headers["Host"])
        self.send_response(302 if self.path == "/away" else 200)
        self.send_header("Location", "http://images.example/a.png")
        self.end_headers()
        buffer = io.BytesIO()
        PIL.Image.new("RGB", (3, 2), "red").save(buffer, "PNG")
        self.wfile.write(b"x" * 2000 if self.path == "/long" else buffer.getvalue())

    def log_message(self, *args: object) -> None:
        pass


def test_the_address_that_was_checked_is_asked(monkeypatch):
    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        # `images.example` leads nowhere: asked for again, the name would not be found.
        monkeypatch.setattr(image_inputs, "_public_address", lambda host, port, param: "127.0.0.1")
        monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
        url = f"http://images.example:{server.server_port}"
        assert fetch_image(f"{url}/a.png", "url", SETTINGS).size == (3, 2)
        assert Handler.hosts == [f"images.example:{server.server_port}"]
        with pytest.raises(RequestError, match="answers 302"):
            fetch_image(f"{url}/away", "url", SETTINGS)
        short = ServerSettings(allowed_image_hosts=SETTINGS.allowed_image_hosts, max_body_bytes=1000)
        with pytest.raises(RequestError, match="longer than 1000 bytes"):
            fetch_image(f"{url}/long", "url", short)
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "LA", "P"])
def test_a_mask_where_nothing_is_transparent(mode):
    mask = PIL.Image.new("L", (4, 4))
    mask.paste(255, (0, 0, 2, 4))
    assert _mask(mask.convert(mode), (4, 4)).tobytes() == mask.tobytes()


def test_a_mask_that_is_transparent():
    mask = PIL.Image.new("RGBA", (2, 1), "white")
    mask.putpixel((1, 0), (0, 0, 0, 0))
    assert _mask(mask, (2, 1)).tobytes() == bytes([0, 255])
