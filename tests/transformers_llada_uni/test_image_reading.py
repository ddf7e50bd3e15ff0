import base64
import http.server
import io
import struct
import threading
import time
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor

from transformers_llada_uni import LLaDAUniImageProcessor


@pytest.fixture(scope="module")
def processor():
    return LLaDAUniImageProcessor()


def noise(width=70, height=50, channels=3, seed=0):
    shape = (height, width, channels) if channels else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def png(image):
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


# Kinds of input


def kinds():
    array = noise()
    image = Image.fromarray(array)
    encoded = base64.b64encode(png(image)).decode()
    return {
        "pil": image,
        "numpy HWC": array,
        "numpy CHW": array.transpose(2, 0, 1),
        "numpy float 0..1": array / 255,
        "numpy float 0..255": array.astype(np.float32),
        "numpy int64": array.astype(np.int64),
        "torch CHW": torch.from_numpy(array).permute(2, 0, 1),
        "torch float": torch.from_numpy(array).permute(2, 0, 1).float() / 255,
        "batch of one": array[None],
        "list": [image],
        "nested": [[image]],
        "base64": encoded,
        "data uri": f"data:image/png;base64,{encoded}",
        "opaque RGBA": image.convert("RGBA"),
        "opaque RGBA array": np.asarray(image.convert("RGBA")),
    }


@pytest.mark.parametrize("kind", kinds())
def test_every_kind_of_input_gives_the_same(processor, kind):
    reference = processor(Image.fromarray(noise()))
    inputs = processor(kinds()[kind])
    assert np.array_equal(inputs["pixel_values"], reference["pixel_values"])
    assert np.array_equal(inputs["image_grid_thw"], reference["image_grid_thw"])


def test_paths_and_urls(processor, tmp_path):
    image = Image.fromarray(noise())
    path = tmp_path / "a.png"
    image.save(path)

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.path == "/a.png" else 404)
            self.end_headers()
            self.wfile.write(path.read_bytes())

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    reference = processor(image)["pixel_values"]
    try:
        url = f"http://127.0.0.1:{server.server_port}"
        for source in (path, str(path), f"{url}/a.png"):
            assert np.array_equal(processor(source)["pixel_values"], reference)
        with pytest.raises(ValueError, match="`images`.*404"):
            processor(f"{url}/b.png")
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("form", ["RGBA", "LA", "P", "RGB with a transparent colour", "array", "file"])
def test_transparency_is_put_on_white(processor, form, tmp_path):
    rgba = np.zeros((64, 64, 4), dtype=np.uint8)
    rgba[:32, ..., 3] = 255  # the upper half opaque black
    image = Image.fromarray(rgba)
    if form == "array":
        image = rgba
    elif form == "file":
        image.save(tmp_path / "a.png")
        image = str(tmp_path / "a.png")
    elif form == "P":
        image = Image.fromarray((rgba[..., 3] // 255).astype(np.uint8), mode="P")
        image.putpalette([9, 9, 9, 0, 0, 0])
        image.info["transparency"] = 0
    elif form.startswith("RGB with"):
        image = Image.fromarray(np.where(rgba[..., 3:] == 0, np.uint8(7), rgba[..., :3]))
        image.info["transparency"] = (7, 7, 7)
    else:
        image = image.convert(form)
    rgb = np.asarray(processor.fetch_images(image))
    assert (rgb[:32] == 0).all() and (rgb[32:] == 255).all()


def test_half_transparent_blends_with_white(processor):
    rgb = np.asarray(processor.fetch_images(Image.new("RGBA", (32, 32), (0, 0, 0, 128))))
    assert (rgb == 127).all()


def test_exif_orientation_is_applied(processor, tmp_path):
    image = Image.fromarray(noise(96, 32))
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side
    path = tmp_path / "a.png"
    image.save(path, exif=exif)
    upright = image.transpose(Image.Transpose.ROTATE_270)
    for source in (str(path), Image.open(path)):
        assert np.array_equal(np.asarray(processor.fetch_images(source)), np.asarray(upright))
    assert processor(str(path), resize_mode=None)["image_grid_thw"].tolist() == [[1, 6, 2]]


def test_grey_and_sixteen_bit_images(processor):
    grey = noise(32, 32, channels=0)
    expected = np.repeat(grey[..., None], 3, axis=-1)
    sixteen = Image.fromarray(grey.astype(np.uint16) * 257)
    assert sixteen.mode == "I;16"
    for source in (grey, grey[..., None], grey[None], Image.fromarray(grey), sixteen, torch.from_numpy(grey)):
        assert np.array_equal(np.asarray(processor.fetch_images(source)), expected)
    assert set(np.asarray(processor.fetch_images(grey > 127)).ravel()) == {0, 255}


def test_channel_order_can_be_named_where_the_shape_does_not_tell(processor):
    array = noise(3, 3)
    last = processor.fetch_images(array, "channels_last")
    assert np.array_equal(np.asarray(last), array)
    assert np.array_equal(np.asarray(processor.fetch_images(array, "channels_first")), array.transpose(1, 2, 0))


# Modes of PIL: a ramp of grey, in each mode as PIL or a file has it


def ramp():
    return np.arange(256, dtype=np.uint8).reshape(16, 16)


def sixteen_bit_file(file_format, dtype=np.uint16):
    """A ramp over 16 bits as a file."""
    values = ramp().astype(dtype) * 257
    if file_format == "PGM":
        return io.BytesIO(b"P5 16 16 65535\n" + values.astype(">u2").tobytes())
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, format=file_format)
    return buffer


def float_file(largest):
    buffer = io.BytesIO()
    Image.fromarray(ramp().astype(np.float32) * np.float32(largest / 255)).save(buffer, format="TIFF")
    return buffer


GREY_MODES = {
    **{mode: lambda mode=mode: Image.fromarray(ramp()).convert(mode) for mode in ("L", "RGB", "RGBA", "RGBX", "LA")},
    **{
        mode: lambda mode=mode: Image.fromarray(ramp()).convert(mode)
        for mode in ("P", "YCbCr", "HSV", "CMYK", "I", "F")
    },
    "La": lambda: Image.fromarray(ramp()).convert("LA").convert("La"),
    "RGBa": lambda: Image.fromarray(ramp()).convert("RGBA").convert("RGBa"),
    "PA": lambda: Image.fromarray(ramp()).convert("P").convert("PA"),
    **{
        mode: lambda mode=mode, order=order: Image.frombuffer(
            mode, (16, 16), (ramp().astype(order) * 257).tobytes(), "raw", mode, 0, 1
        )
        for mode, order in (("I;16", "<u2"), ("I;16L", "<u2"), ("I;16B", ">u2"))
    },
    "16-bit PNG": lambda: Image.open(sixteen_bit_file("PNG")),
    "16-bit TIFF": lambda: Image.open(sixteen_bit_file("TIFF")),
    "16-bit PGM": lambda: Image.open(sixteen_bit_file("PGM")),
    "16 bits in an int32 TIFF": lambda: Image.open(sixteen_bit_file("TIFF", np.int32)),
    "8 bits in an int32 TIFF": lambda: Image.fromarray(ramp().astype(np.int32)),
    "float32 TIFF, 0..1": lambda: Image.open(float_file(1)),
    "float32 TIFF, 0..255": lambda: Image.open(float_file(255)),
}


@pytest.mark.parametrize("name", GREY_MODES)
def test_every_mode_gives_the_same_grey(processor, name):
    image = GREY_MODES[name]()
    if len(name) < 6:
        assert image.mode == name
    rgb = np.asarray(processor.fetch_images(image)).astype(int)
    assert np.abs(rgb - ramp()[..., None]).max() <= (2 if name == "HSV" else 0)


def test_there_is_a_test_of_every_mode(processor):
    covered = {GREY_MODES[name]().mode for name in GREY_MODES} | {"1", "LAB", "I;16N"}
    assert covered >= set(Image.MODES)
    black_and_white = Image.fromarray(ramp()).convert("1")
    assert set(np.asarray(processor.fetch_images(black_and_white)).ravel()) == {0, 255}
    lab = np.asarray(processor.fetch_images(Image.fromarray(ramp()).convert("RGB").convert("LAB"))).astype(int)
    assert np.abs(lab - ramp()[..., None]).max() <= 3
    native = Image.new("I;16N", (16, 16), 257 * 9)
    assert set(np.asarray(processor.fetch_images(native)).ravel()) == {9}


def test_a_dark_pgm_of_16_bits_stays_dark(processor):
    dark = io.BytesIO(b"P5 2 1 65535\n" + np.array([0, 255], dtype=">u2").tobytes())
    assert np.asarray(processor.fetch_images(Image.open(dark))).max() == 0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.full((4, 4), 70000, np.int32), "its mode is I, with values from 70000 to 70000"),
        (np.full((4, 4), -1, np.int32), "its mode is I, and values must lie in 0..255.*-1"),
        (np.full((4, 4), 300, np.float32), "its mode is F, and values must lie in 0..255 .or 0..1.*300"),
        (np.full((4, 4), np.nan, np.float32), "its mode is F, and values must lie in.*nan"),
    ],
)
def test_values_without_a_range_are_refused(processor, values, message):
    with pytest.raises(ValueError, match=f"`images`: could not read one: {message}"):
        processor(Image.fromarray(values))


def transparent_png(bit_depth, color_type, rows, transparent):
    """A PNG whose colour `transparent` is so, written by hand: PIL cannot write all of them."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    height, width = rows.shape[:2]
    data = b"".join(b"\0" + row.astype(">u2" if bit_depth == 16 else "u1").tobytes() for row in rows)
    header = struct.pack(">IIBBBBB", width, height, bit_depth, color_type, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"tRNS", struct.pack(f">{len(transparent)}H", *transparent))]
    chunks += [(b"IDAT", zlib.compress(data)), (b"IEND", b"")]
    return Image.open(io.BytesIO(b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*entry) for entry in chunks)))


@pytest.mark.parametrize("bit_depth", [8, 16])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_transparent_colour_is_put_on_white(processor, bit_depth, channels):
    unit = 257 if bit_depth == 16 else 1
    rows = np.stack([np.array([[0, 7], [9, 11]]) * unit] * channels, axis=-1).squeeze()
    image = transparent_png(bit_depth, 2 if channels == 3 else 0, rows, [9 * unit] * channels)
    assert np.asarray(processor.fetch_images(image))[..., 0].tolist() == [[0, 7], [255, 11]]


@pytest.mark.parametrize("mode", ["RGBa", "La"])
def test_premultiplied_transparency_is_put_on_white(processor, mode):
    straight = Image.new(mode.upper(), (4, 4), (100, 128) if mode == "La" else (100, 100, 100, 128))
    rgb, expected = (
        np.asarray(processor.fetch_images(image)).astype(int) for image in (straight.convert(mode), straight)
    )
    assert np.abs(rgb - expected).max() <= 1 and expected[0, 0, 0] > 150


# Limits


def test_larger_images_than_a_server_wants_are_refused(processor, tmp_path):
    image = Image.fromarray(noise(70, 50))
    image.save(tmp_path / "a.png")
    sources = [image, np.asarray(image), str(tmp_path / "a.png"), base64.b64encode(png(image)).decode()]
    for source in sources:
        with pytest.raises(ValueError, match="`images`.*70 x 50 are more than 3499 pixels .`max_image_pixels`"):
            processor(source, max_image_pixels=3499)
        processor(source, max_image_pixels=3500)
    size = (tmp_path / "a.png").stat().st_size
    for source in sources[2:]:
        with pytest.raises(ValueError, match=f"`images`.*more than {size - 3} bytes .`max_image_bytes`"):
            processor(source, max_image_bytes=size - 3)
    server = LLaDAUniImageProcessor(max_image_pixels=3499)
    server.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="`max_image_pixels`"):
        AutoImageProcessor.from_pretrained(tmp_path)(image)


@pytest.fixture
def endless_url():
    """Sends a byte now and then, for ever; `/fast` a megabyte at a time."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            try:
                while True:
                    self.wfile.write(b"x" * (2**20 if self.path == "/fast" else 1))
                    if self.path != "/fast":
                        time.sleep(0.02)
            except OSError:
                pass

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_downloads_end(processor, endless_url):
    with pytest.raises(ValueError, match="`images`.*more than 4000000 bytes .`max_image_bytes`"):
        processor(f"{endless_url}/fast", max_image_bytes=4_000_000)
    with pytest.raises(ValueError, match="`images`.*longer than 0.2 seconds .`url_timeout`"):
        processor(f"{endless_url}/slow", url_timeout=0.2)


def test_lists_nested_thousands_deep_are_refused(processor):
    nested = noise()
    for _ in range(5000):
        nested = [nested]
    with pytest.raises(ValueError, match="`images` must be one list of images"):
        processor(nested)


# Bad input


def truncated_png():
    return base64.b64encode(png(Image.fromarray(noise(200, 200)))[:5000]).decode()


BAD_IMAGES = {
    "corrupt file": (lambda path: path / "bad.png", ValueError, r"`images`: could not read .*bad\.png"),
    "text file": (lambda path: path / "bad.txt", ValueError, r"`images`: could not read .*bad\.txt"),
    "truncated": (lambda path: truncated_png(), ValueError, "`images`: could not read"),
    "no such file": (
        lambda path: "no/such/file.png",
        ValueError,
        r"`images`: 'no/such/file\.png' is no existing file",
    ),
    "unreachable": (lambda path: "http://127.0.0.1:9/a.png", ValueError, "`images`: could not read 'http://127"),
    "a number": (lambda path: 3, TypeError, "`images` must be PIL images.*got int"),
    "None": (lambda path: None, TypeError, "`images` must be.*got NoneType"),
    "a dict": (lambda path: [{"url": "a"}], TypeError, "`images` must be.*got dict"),
    "empty list": (lambda path: [], ValueError, "`images` holds no image"),
    "empty lists": (lambda path: [[], []], ValueError, "`images` holds no image"),
    "uneven nesting": (lambda path: [noise(), [noise()]], ValueError, "`images` must be one list of images"),
    "deep nesting": (lambda path: [[[noise()]]], ValueError, "`images` must be one list of images"),
    "no pixels": (lambda path: np.zeros((0, 4, 3), np.uint8), ValueError, "`images` must have at least one pixel"),
    "channels": (lambda path: np.zeros((8, 8, 5), np.uint8), ValueError, r"`images`.*\(8, 8, 5\).*channels"),
    "one dimension": (lambda path: np.zeros(8, np.uint8), ValueError, "`images`.*dimensions, got 1"),
    "five dimensions": (lambda path: np.zeros((1,) * 5), ValueError, "`images`.*dimensions, got 5"),
    "negative": (lambda path: np.full((8, 8, 3), -1.0), ValueError, r"`images`: values must lie in 0\.\.255"),
    "too bright": (lambda path: np.full((8, 8, 3), 300), ValueError, "`images`: values must lie in.*300"),
    "nan": (lambda path: np.full((8, 8, 3), np.nan), ValueError, "`images`: values must lie in.*nan"),
}


@pytest.mark.parametrize("case", BAD_IMAGES)
def test_bad_images_are_refused(processor, tmp_path, case):
    (tmp_path / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"rubbish" * 20)
    (tmp_path / "bad.txt").write_text("not a picture")
    make, error, message = BAD_IMAGES[case]
    with pytest.raises(error, match=message):
        processor(make(tmp_path))


def test_a_image_of_another_mode_is_refused_without_conversion():
    processor = LLaDAUniImageProcessor(do_convert_rgb=False)
    assert processor(Image.fromarray(noise()))["pixel_values"].shape[1] == 768
    with pytest.raises(ValueError, match="mode is L"):
        processor(Image.fromarray(noise(channels=0)))
