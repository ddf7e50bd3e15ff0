"""Images that requests carry, and those they name."""

import base64
import io
import ipaddress
import re
import socket
import time
import warnings

import httpx
import PIL.Image
from PIL import ImageOps

from .errors import RequestError
from .settings import ServerSettings


FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
FETCH_SECONDS = 10.0
SIZE = re.compile(r"([0-9]{1,5})x([0-9]{1,5})")


def read_size(size: str | None, settings: ServerSettings) -> tuple[int, int] | None:
    """
    Height and width of an image to make, of `"WIDTHxHEIGHT"`; `None` for `"auto"`.

    Raises:
        RequestError: if it is neither, or larger than `max_side`.
    """
    if size is None or size == "auto":
        return None
    match = SIZE.fullmatch(size)
    if match is None:
        raise RequestError(f"`size` must be 'auto' or 'WIDTHxHEIGHT', got {size!r:.100}.", "size")
    width, height = int(match[1]), int(match[2])
    if max(width, height) > settings.max_side:
        raise RequestError(f"`size` may be {settings.max_side} at most on each side.", "size")
    return height, width


def read_image(content: bytes, param: str, settings: ServerSettings) -> PIL.Image.Image:
    """
    An image from a file's bytes, turned upright as its camera says.

    Raises:
        RequestError: if it is none, damaged, or larger than `max_input_pixels`.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", PIL.Image.DecompressionBombWarning)
            image = PIL.Image.open(io.BytesIO(content), formats=FORMATS)
            if image.width * image.height > settings.max_input_pixels:
                raise RequestError(
                    f"`{param}` is {image.width} x {image.height} pixels; at most {settings.max_input_pixels} are "
                    "taken.",
                    param,
                )
            image.load()
            return ImageOps.exif_transpose(image)
    except RequestError:
        raise
    except PIL.UnidentifiedImageError as error:
        raise RequestError(f"`{param}` is no image of the formats {', '.join(FORMATS)}.", param) from error
    except Exception as error:  # PIL raises whatever its decoders raise
        raise RequestError(f"`{param}` is no image that can be read: {error}", param) from error


def read_data_url(url: str, param: str, settings: ServerSettings) -> PIL.Image.Image:
    """
    An image from a `data:image/...;base64,...` URL.

    Raises:
        RequestError: if it is none.
    """
    header, comma, encoded = url.partition(",")
    if not comma or not header.endswith(";base64"):
        raise RequestError(f"`{param}` must be a data URL in base64, such as `data:image/png;base64,...`.", param)
    try:
        content = base64.b64decode(encoded, validate=True)
    except ValueError as error:  # base64's own among them
        raise RequestError(f"`{param}` is no base64: {error}.", param) from error
    return read_image(content, param, settings)


def _public_address(host: str, port: int, param: str) -> str:
    """An address of a host; refuses one whose name leads into a private network, whoever has allowed the name."""
    addresses = [entry[4][0] for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    for address in map(ipaddress.ip_address, addresses):
        if not address.is_global or address.is_multicast:
            raise RequestError(f"`{param}`: {host} is not a public address.", param)
    return str(addresses[0])


def fetch_image(url: str, param: str, settings: ServerSettings) -> PIL.Image.Image:
    """
    An image from a host that is allowed; redirects are not followed.

    Raises:
        RequestError: if the host is not allowed or leads into a private network, or there is no image.
    """
    content, deadline = bytearray(), time.monotonic() + FETCH_SECONDS
    try:
        parsed = httpx.URL(url)
        host = parsed.host.lower()
        if parsed.scheme not in ("http", "https"):
            raise RequestError(f"`{param}` must be a data URL, or one of http or https.", param)
        if host not in settings.allowed_image_hosts:
            raise RequestError(
                f"`{param}`: this server fetches no images from {host or 'there'}; send them as data URLs.", param
            )
        # The address that was checked is the one that is asked: asked again, its name might lead elsewhere.
        address = _public_address(host, parsed.port or (443 if parsed.scheme == "https" else 80), param)
        headers, extensions = {"Host": parsed.netloc.decode()}, {"sni_hostname": host}
        with (
            httpx.Client(trust_env=False, timeout=FETCH_SECONDS, headers=headers) as client,
            client.stream("GET", parsed.copy_with(host=address), extensions=extensions) as response,
        ):
            if response.status_code != 200:
                raise RequestError(f"`{param}`: {host} answers {response.status_code}.", param)
            for chunk in response.iter_bytes():
                content += chunk
                if len(content) > settings.max_body_bytes:
                    raise RequestError(f"`{param}` is longer than {settings.max_body_bytes} bytes.", param)
                if time.monotonic() > deadline:
                    raise RequestError(f"`{param}` has not come in {FETCH_SECONDS:g} seconds.", param)
    except (OSError, httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
        raise RequestError(f"`{param}` cannot be fetched: {error}", param) from error
    return read_image(bytes(content), param, settings)


def image_of_url(url: str, param: str, settings: ServerSettings) -> PIL.Image.Image:
    """The image that a URL holds or leads to."""
    if url[:5].lower() == "data:":
        return read_data_url(url, param, settings)
    return fetch_image(url, param, settings)


def encode_image(image: PIL.Image.Image, output_format: str = "png") -> str:
    """Base64 of a file's bytes."""
    buffer = io.BytesIO()
    image.save(buffer, format=output_format)
    return base64.b64encode(buffer.getvalue()).decode()
