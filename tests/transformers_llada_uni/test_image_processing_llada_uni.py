import base64
import http.server
import io
import json
import threading

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor
from transformers.models.glm_image.configuration_glm_image import GlmImageVisionConfig, GlmImageVQVAEConfig
from transformers.models.glm_image.modeling_glm_image import GlmImageVisionModel, GlmImageVQVAE

from transformers_llada_uni import LLaDAUniImageProcessor


RULES = {"understand_single": ("understanding", 1), "understand_multi": ("understanding", 2), "edit": ("editing", 1)}


@pytest.fixture(scope="module")
def processor():
    return LLaDAUniImageProcessor()


@pytest.fixture(scope="module")
def expected_images(official_tiny):
    return json.loads((official_tiny / "expected" / "generation.json").read_text())["images"]


@pytest.fixture(scope="module")
def expected_tensors(official_tiny):
    return load_file(official_tiny / "expected" / "image_tokenizer.safetensors")


@pytest.fixture(scope="module")
def image_tokenizer(official_tiny):
    folder = official_tiny / "image_tokenizer"
    config = json.loads((folder / "config.json").read_text())
    weights = load_file(folder / "image_tokenizer.safetensors")
    vision = GlmImageVisionModel(GlmImageVisionConfig(**config["vision_config"])).eval()
    codebook = GlmImageVQVAE(GlmImageVQVAEConfig(**config["vq_config"])).eval()
    for prefix, module in (("model.visual.", vision), ("model.vqmodel.", codebook)):
        module.load_state_dict({k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)})
    return vision, codebook


def noise(width=70, height=50, channels=3, seed=0):
    shape = (height, width, channels) if channels else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def png(image):
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


# The released numbers


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("index", range(3))
def test_sizes_grids_pixels_and_codes_are_the_released_ones(
    processor, official_tiny, expected_images, expected_tensors, image_tokenizer, rule, index
):
    entry, (mode, count) = expected_images[index], RULES[rule]
    image = Image.open(official_tiny / entry["file"])
    resized = processor.resize_and_crop(image, mode, count)
    assert list(resized.size) == entry[rule]["size"]
    pixels = expected_tensors.get(f"{index}.{rule}.pixels_uint8")
    if pixels is not None:
        assert np.array_equal(np.asarray(resized), pixels.numpy())

    inputs = processor([image] * count, resize_mode=mode, return_tensors="pt")
    assert inputs["image_grid_thw"].tolist() == [entry[rule]["grid_thw"]] * count
    assert inputs["image_grid_thw"].dtype == torch.int64 and inputs["pixel_values"].dtype == torch.float32
    _, height, width = entry[rule]["grid_thw"]
    assert inputs["pixel_values"].shape == (count * height * width, 3 * 16 * 16)

    vision, codebook = image_tokenizer
    with torch.no_grad():
        features = vision(inputs["pixel_values"][: height * width], inputs["image_grid_thw"][:1]).last_hidden_state
        codes = codebook.encode(features.view(1, height, width, -1).permute(0, 3, 1, 2)).image_tokens
    assert codes.flatten().tolist() == entry[rule]["token_ids"]
    if f"{index}.{rule}.features" in expected_tensors:
        torch.testing.assert_close(features, expected_tensors[f"{index}.{rule}.features"], rtol=0, atol=1e-4)


def test_the_fixture_holds_pixels_to_compare_with(expected_tensors):
    assert sum(name.endswith("pixels_uint8") for name in expected_tensors) == 5


def test_patches_are_in_raster_order_channel_by_channel(processor):
    array = noise(64, 32)
    patches = processor(array, resize_mode=None)["pixel_values"]
    assert patches.shape == (8, 768)
    patch = array[16:32, 32:48].transpose(2, 0, 1).reshape(-1)  # second row, third column
    np.testing.assert_allclose(patches[6], patch / 255 * 2 - 1, atol=1e-6)


# Size rules


@pytest.mark.parametrize(
    ("size", "mode", "count", "grid"),
    [
        ((800, 800), "understanding", 1, (50, 50)),
        ((801, 801), "understanding", 1, (50, 50)),
        ((4000, 3000), "understanding", 1, (42, 56)),
        ((4000, 3000), "understanding", 2, (24, 32)),
        ((448, 448), "understanding", 2, (28, 28)),
        ((1, 1), "understanding", 1, (8, 8)),
        ((512, 512), "editing", 1, (32, 32)),
        ((100, 100), "editing", 1, (32, 32)),
        ((5000, 100), "editing", 1, (16, 64)),
        ((64, 96), None, 1, (6, 4)),
    ],
)
def test_grids(processor, size, mode, count, grid):
    assert processor.get_grid(size[1], size[0], mode, count) == grid
    assert processor.get_number_of_image_patches(size[1], size[0], {"resize_mode": mode}) > 0


def test_grids_never_shrink_below_the_target_nor_leave_the_multiples(processor):
    generator = np.random.default_rng(0)
    for _ in range(300):
        width, height = (int(side) for side in generator.integers(1, 3000, 2))
        for mode, count in RULES.values():
            scaled, crop = processor.get_resize_and_crop(height, width, mode, count)
            assert all(side % 32 == 0 and side > 0 for side in crop)
            assert scaled[0] >= crop[0] and scaled[1] >= crop[1]
            if mode == "editing":
                assert crop[0] * crop[1] <= 512 * 512 and max(crop) <= 4 * min(crop)


def test_the_limit_is_chosen_for_each_sample(processor):
    image = Image.fromarray(noise(900, 900))
    alone, pair = [1, 50, 50], [1, 28, 28]
    assert processor([[image], [], [image, image]])["image_grid_thw"].tolist() == [alone, pair, pair]
    assert processor([image, image])["image_grid_thw"].tolist() == [pair, pair]
    assert processor([[image], [image]])["image_grid_thw"].tolist() == [alone, alone]


def test_settings_can_be_changed_for_one_call(processor):
    image = Image.fromarray(noise(900, 900))
    assert processor(image, max_pixels=256 * 256)["image_grid_thw"].tolist() == [[1, 16, 16]]
    assert processor(image)["image_grid_thw"].tolist() == [[1, 50, 50]]
    raw = processor(Image.fromarray(noise(64, 64)), do_normalize=False, do_rescale=False, do_resize=False)
    assert raw["pixel_values"].max() > 200 and raw["pixel_values"].dtype == np.float32


def test_resize_and_crop_serves_masks_too(processor):
    mask = Image.new("L", (200, 133), 255)
    cropped = processor.resize_and_crop(mask, "editing", resample=Image.Resampling.NEAREST)
    assert cropped.mode == "L" and cropped.size == (608, 416) and set(np.asarray(cropped).ravel()) == {255}


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


def test_grey_and_sixteen_bit_pictures(processor):
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


# Saving


def test_saves_and_loads_through_the_auto_class(tmp_path):
    changed = LLaDAUniImageProcessor(max_pixels=320 * 320, image_mean=[0.1, 0.2, 0.3], editing_max_ratio=2)
    changed.save_pretrained(tmp_path)
    loaded = AutoImageProcessor.from_pretrained(tmp_path)
    assert type(loaded) is LLaDAUniImageProcessor
    assert loaded.to_dict() == changed.to_dict()
    assert loaded.max_pixels == 320 * 320 and loaded.editing_max_ratio == 2
    image = Image.fromarray(noise(700, 300))
    for mode in ("understanding", "editing"):
        ours, theirs = changed(image, resize_mode=mode), loaded(image, resize_mode=mode)
        assert np.array_equal(ours["pixel_values"], theirs["pixel_values"])


def test_loads_the_released_config_and_its_merge_size_has_no_effect(official_tiny, tmp_path):
    config = json.loads((official_tiny / "image_tokenizer" / "preprocessor_config.json").read_text())
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**config, "merge_size": 2}))
    loaded = LLaDAUniImageProcessor.from_pretrained(tmp_path)
    image = Image.fromarray(noise())
    assert np.allclose(loaded(image)["pixel_values"], LLaDAUniImageProcessor()(image)["pixel_values"], atol=1e-6)
    assert "merge_size" not in loaded.to_dict()


# Bad input


def truncated_png():
    return base64.b64encode(png(Image.fromarray(noise(200, 200)))[:5000]).decode()


BAD_PICTURES = {
    "corrupt file": (lambda path: path / "bad.png", ValueError, r"`images`: could not read .*bad\.png"),
    "text file": (lambda path: path / "bad.txt", ValueError, r"`images`: could not read .*bad\.txt"),
    "truncated": (lambda path: truncated_png(), ValueError, "`images`: could not read"),
    "no such file": (
        lambda path: "no/such/file.png",
        ValueError,
        r"`images`: 'no/such/file\.png' is no existing file",
    ),
    "unreachable": (lambda path: "http://127.0.0.1:9/a.png", ValueError, "`images`: could not read 'http://127"),
    "a number": (lambda path: 3, TypeError, "`images` must be PIL pictures.*got int"),
    "None": (lambda path: None, TypeError, "`images` must be.*got NoneType"),
    "a dict": (lambda path: [{"url": "a"}], TypeError, "`images` must be.*got dict"),
    "empty list": (lambda path: [], ValueError, "`images` holds no picture"),
    "empty lists": (lambda path: [[], []], ValueError, "`images` holds no picture"),
    "uneven nesting": (lambda path: [noise(), [noise()]], ValueError, "`images` must be one list of pictures"),
    "deep nesting": (lambda path: [[[noise()]]], ValueError, "`images` must be one list of pictures"),
    "no pixels": (lambda path: np.zeros((0, 4, 3), np.uint8), ValueError, "`images` must have at least one pixel"),
    "channels": (lambda path: np.zeros((8, 8, 5), np.uint8), ValueError, r"`images`.*\(8, 8, 5\).*channels"),
    "one dimension": (lambda path: np.zeros(8, np.uint8), ValueError, "`images`.*dimensions, got 1"),
    "five dimensions": (lambda path: np.zeros((1,) * 5), ValueError, "`images`.*dimensions, got 5"),
    "negative": (lambda path: np.full((8, 8, 3), -1.0), ValueError, r"`images`: values must lie in 0\.\.255"),
    "too bright": (lambda path: np.full((8, 8, 3), 300), ValueError, "`images`: values must lie in.*300"),
    "nan": (lambda path: np.full((8, 8, 3), np.nan), ValueError, "`images`: values must lie in.*nan"),
}


@pytest.mark.parametrize("case", BAD_PICTURES)
def test_bad_pictures_are_refused(processor, tmp_path, case):
    (tmp_path / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"rubbish" * 20)
    (tmp_path / "bad.txt").write_text("not a picture")
    make, error, message = BAD_PICTURES[case]
    with pytest.raises(error, match=message):
        processor(make(tmp_path))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"resize_mode": "stretch"}, "`resize_mode` must be one of understanding, editing or None, got 'stretch'"),
        ({"resize_mode": None}, "multiples of 32, got 70 x 50; the nearest valid size is 64 x 64"),
        ({"do_resize": False}, "multiples of 32, got 70 x 50"),
        ({"size": {"height": 32, "width": 32}}, "`size` has no place here"),
        ({"do_center_crop": True}, "`do_center_crop` has no place here"),
        ({"min_pixels": 10**9}, "`min_pixels`"),
    ],
)
def test_bad_arguments_are_refused(processor, kwargs, message):
    with pytest.raises(ValueError, match=message):
        processor(Image.fromarray(noise()), **kwargs)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"patch_size": 15}, "`size_multiple` must be a multiple of `patch_size`"),
        ({"max_pixels": 1}, "`min_pixels`"),
        ({"editing_max_pixels": 100}, "`editing_max_pixels` must be at least 1024"),
        ({"editing_max_ratio": 0.5}, "`editing_max_ratio` at least 1"),
    ],
)
def test_bad_settings_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        LLaDAUniImageProcessor(**kwargs)


def test_a_picture_of_another_mode_is_refused_without_conversion():
    processor = LLaDAUniImageProcessor(do_convert_rgb=False)
    assert processor(Image.fromarray(noise()))["pixel_values"].shape[1] == 768
    with pytest.raises(ValueError, match="mode is L"):
        processor(Image.fromarray(noise(channels=0)))
