import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor
from transformers.models.glm_image.configuration_glm_image import GlmImageVisionConfig, GlmImageVQVAEConfig
from transformers.models.glm_image.modeling_glm_image import GlmImageVisionModel, GlmImageVQVAE

from transformers_llada_uni import LLaDAUniImageProcessor
from transformers_llada_uni.image_sizes import default_side, grid_to_generate


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


def test_resize_and_crop_at_the_decoders_resolution(processor):
    image = Image.fromarray(noise(200, 133))
    (height, width), (crop_height, crop_width) = processor.get_resize_and_crop(133, 200, "editing")
    scaled = image.resize((2 * width, 2 * height), Image.Resampling.LANCZOS)
    left, top = width - crop_width, height - crop_height
    expected = scaled.crop((left, top, left + 2 * crop_width, top + 2 * crop_height))
    assert np.array_equal(np.asarray(processor.resize_and_crop(image, "editing", upscale=2)), np.asarray(expected))


def test_a_code_may_be_drawn_as_it_is_seen():
    """By default twice as large; sizes that are asked for, and the default, count what is drawn."""
    settings = {"patch_size": 16, "size_multiple": 64, "min_pixels": 64**2, "editing_max_pixels": 192**2}
    twice, same = LLaDAUniImageProcessor(**settings), LLaDAUniImageProcessor(**settings, drawn_patch_size=16)
    assert (twice.pixels_per_code, same.pixels_per_code) == (32, 16)
    assert (default_side(twice), default_side(same)) == (384, 192)
    assert grid_to_generate(twice, 128, 64, 12) == (4, 2) and grid_to_generate(same, 128, 64, 12) == (8, 4)
    of_one = LLaDAUniImageProcessor(**settings, drawn_patch_size=16, default_side=64)
    assert grid_to_generate(of_one, None, None, 12) == (4, 4)
    loaded = LLaDAUniImageProcessor.from_dict(of_one.to_dict())
    assert (loaded.pixels_per_code, default_side(loaded)) == (16, 64)


def test_of_what_is_longer_than_a_checkpoint_can_say_the_ends_are_left_out():
    settings = {"patch_size": 16, "size_multiple": 64, "min_pixels": 64**2, "max_pixels": 192**2}
    settings |= {"max_pixels_several": 192**2, "editing_max_pixels": 192**2, "editing_upscales": False}
    any_side, to_192 = LLaDAUniImageProcessor(**settings), LLaDAUniImageProcessor(**settings, max_side=192)
    assert any_side.get_grid(500, 40) == (36, 4) and to_192.get_grid(500, 40) == (12, 4)
    assert to_192.get_grid(40, 500) == (4, 12) and to_192.get_grid(300, 300) == any_side.get_grid(300, 300)
    assert any_side.get_grid(1080, 1920, "editing") == (8, 16) and to_192.get_grid(1080, 1920, "editing") == (8, 12)
    assert max(max(to_192.get_grid(64, side, "editing")) for side in range(1, 2000, 13)) == 12
    image = Image.fromarray(noise(40, 500))
    whole, middle = any_side.resize_and_crop(image), to_192.resize_and_crop(image)
    centre = (whole.height - 192) // 2
    assert middle == whole.crop((0, centre, 64, centre + 192))


def test_what_has_to_be_scaled_may_have_a_limit_of_its_own():
    settings = {"patch_size": 16, "size_multiple": 64, "min_pixels": 64**2, "max_pixels": 192**2, "max_side": 192}
    settings |= {"max_pixels_several": 128**2, "editing_max_pixels": 192**2, "editing_upscales": False}
    of_one = LLaDAUniImageProcessor(**settings, max_pixels_scaled=64**2)
    for mode in ("understanding", "editing"):
        for fits in ((64, 64), (128, 64), (64, 192), (192, 192)):
            assert of_one.get_grid(*fits, mode) == (fits[0] // 16, fits[1] // 16)
        for scaled in ((65, 64), (63, 63), (256, 256), (320, 64), (1080, 1920), (500, 40), (1, 1)):
            assert of_one.get_grid(*scaled, mode) == (4, 4)
    assert of_one.get_grid(192, 192, num_images=2) == (4, 4) and of_one.get_grid(128, 128, num_images=2) == (8, 8)
    assert LLaDAUniImageProcessor.from_dict(of_one.to_dict()).get_grid(300, 300) == (4, 4)
    assert LLaDAUniImageProcessor(**settings).get_grid(300, 300) == (12, 12)
    with pytest.raises(ValueError, match="`max_pixels_scaled`"):
        LLaDAUniImageProcessor(**settings, max_pixels_scaled=63**2)


def test_the_editing_rule_may_keep_the_area_of_an_image():
    """For a decoder that draws several sizes: what it has drawn has as many codes when it is edited."""
    settings = {"patch_size": 16, "size_multiple": 64, "min_pixels": 64**2, "editing_max_pixels": 192**2}
    grows, keeps = (LLaDAUniImageProcessor(**settings, editing_upscales=upscales) for upscales in (True, False))
    sizes = {(64, 64): (4, 4), (64, 128): (4, 8), (128, 128): (8, 8), (192, 192): (12, 12), (72, 70): (4, 4)}
    for (height, width), grid in sizes.items():
        assert keeps.get_grid(height, width, "editing") == grid
    assert keeps.get_grid(2000, 2000, "editing") == (12, 12) and keeps.get_grid(9, 9, "editing") == (4, 4)
    assert grows.get_grid(64, 64, "editing") == (12, 12)
    assert LLaDAUniImageProcessor.from_dict(keeps.to_dict()).editing_upscales is False


@pytest.mark.parametrize("size", [(20_000, 1), (1, 20_000), (100_000, 3)])
@pytest.mark.parametrize("mode", ["understanding", "editing"])
def test_a_strip_takes_no_more_memory_than_what_is_kept(processor, monkeypatch, size, mode):
    largest = 0
    resize = Image.Image.resize

    def watched(image, size, *args, **kwargs):
        nonlocal largest
        largest = max(largest, size[0] * size[1])
        return resize(image, size, *args, **kwargs)

    monkeypatch.setattr(Image.Image, "resize", watched)
    _, height, width = processor(Image.new("RGB", size, (9, 9, 9)), resize_mode=mode)["image_grid_thw"][0]
    assert 0 < largest <= 16 * height * width * 256


def test_cropping_first_changes_the_last_bit_at_most(processor, monkeypatch):
    for size, mode in (((900, 100), "editing"), ((50, 700), "editing"), ((300, 280), "understanding")):
        image = Image.fromarray(noise(*size))
        scaled_first = np.asarray(processor.resize_and_crop(image, mode)).astype(int)
        with monkeypatch.context() as patch:
            patch.setattr("transformers_llada_uni.image_processing_llada_uni._LARGEST_WASTE", 0)
            cropped_first = np.asarray(processor.resize_and_crop(image, mode)).astype(int)
        assert np.abs(scaled_first - cropped_first).max() <= 1


def test_understanding_keeps_its_own_limits(processor):
    generator = np.random.default_rng(0)
    small = LLaDAUniImageProcessor(min_pixels=32 * 32, max_pixels=64 * 64, max_pixels_several=32 * 32)
    for _ in range(500):
        width, height = (int(2 ** generator.uniform(0, 16)) for _ in range(2))
        for settings in (processor, small):
            for count, limit in ((1, settings.max_pixels), (2, settings.max_pixels_several)):
                grid = settings.get_grid(height, width, "understanding", count)
                assert 4 <= grid[0] * grid[1] <= limit // 256 and grid[0] % 2 == grid[1] % 2 == 0


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
        ({"drawn_patch_size": 24}, r"`drawn_patch_size` must be a multiple of `patch_size` \(16\), got 24"),
        ({"default_side": 100}, "`default_side` must be a multiple of 32, got 100"),
        ({"max_side": 16}, "`max_side` must be at least 32, got 16"),
        ({"editing_max_ratio": 0.5}, "`editing_max_ratio` at least 1"),
        ({"max_image_pixels": 0}, "`max_image_pixels` must be positive"),
        ({"max_image_bytes": -1}, "`max_image_bytes` must be positive"),
        ({"url_timeout": 0}, "`url_timeout` must be positive"),
    ],
)
def test_bad_settings_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        LLaDAUniImageProcessor(**kwargs)
