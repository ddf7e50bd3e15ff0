import pytest
import torch
from PIL import Image

from comfyui import LLaDAUniDecode, LLaDAUniDraw, LLaDAUniEdit, LLaDAUniEncode, LLaDAUniFill
from diffusers_llada_uni.code_decoding import UPSCALES

from .stand_in import InterruptProcessingException


def generator(seed):
    return torch.Generator().manual_seed(seed)


def draw(model, prompt="a red apple", **inputs):
    defaults = {
        "width": 0,
        "height": 0,
        "seed": 0,
        "batch_size": 1,
        "do_sample": False,
        "guidance_scale": 2.0,
        "guidance_rescale": 0.7,
        "num_steps_per_block": 8,
    }
    return LLaDAUniDraw().generate(model, prompt, **{**defaults, **inputs})


EDITING = {
    "seed": 0,
    "do_sample": False,
    "guidance_scale": 0.0,
    "image_guidance_scale": 0.0,
    "guidance_rescale": 0.7,
    "num_steps_per_block": 8,
}


def decode(model, codes, **inputs):
    defaults = {
        "seed": 0,
        "decoder": "auto",
        "num_inference_steps": 0,
        "decoder_guidance_scale": 1.0,
        "upscale": 2,
    }
    return LLaDAUniDecode().decode(model, codes, **{**defaults, **inputs})[0]


def pil(image):
    return Image.fromarray((image[0] * 255).round().to(torch.uint8).numpy())


def equal(codes, others):
    return len(codes) == len(others) and all(map(torch.equal, codes, others))


def test_draw_gives_the_codes_of_the_pipeline(host, model):
    codes, thoughts = draw(model)
    assert equal(codes, model.pipe("a red apple").codes) and thoughts == ""
    ((*_, last),) = host.bars
    assert last == (16, 16)  # codes of the emoji model's images


def test_seeds_of_a_batch_are_seeds_alone(host, model):
    batch, _ = draw(model, "something", batch_size=3, seed=3)
    second, _ = draw(model, "something", do_sample=True, seed=4)
    again, _ = draw(model, "something", do_sample=True, seed=4)
    assert equal(batch[1:2], second) and equal(second, again) and not equal(batch[:2], batch[1:])
    draw(model, seed=2**64 - 1, batch_size=2)  # the last one's successor is the first


def test_thoughts_come_with_each_image(host, model):
    codes, thoughts = draw(model, batch_size=2, thinking=True, seed=5)
    assert len(codes) == 2 and isinstance(thoughts, str)
    ((*_, last),) = host.bars
    assert last == (2 * (1024 + 16), 2 * (1024 + 16))


def test_a_negative_prompt_guides_away(host, model):
    codes, _ = draw(model, "a person", negative_prompt="dark skin")
    assert equal(codes, model.pipe("a person", negative_prompt="dark skin").codes)


def test_edit_takes_each_image_by_itself_with_the_checkpoints_guidance(host, model, image):
    (codes,) = LLaDAUniEdit().generate(model, image.repeat(2, 1, 1, 1), "change the skin tone to dark", **EDITING)
    expected = model.pipe("change the skin tone to dark", pil(image)).codes
    assert equal(codes, expected * 2)


def test_edit_takes_references(host, model, image):
    references = image.flip(2)
    (codes,) = LLaDAUniEdit().generate(model, image, "make it a man", **EDITING, references=references)
    assert equal(codes, model.pipe("make it a man", [pil(image), pil(references)]).codes)


def test_fill_keeps_the_codes_around_the_mask(host, model, image):
    mask = torch.zeros(1, 32, 32)  # of another size than the image
    mask[:, :16] = 1
    (codes,) = LLaDAUniFill().generate(model, image, prompt="a dog on blue", mask=mask, **EDITING)
    mask_image = Image.fromarray((mask[0] * 255).to(torch.uint8).numpy()).resize((image.shape[2], image.shape[1]), 0)
    assert equal(codes, model.pipe("a dog on blue", pil(image), mask_image).codes)
    (source,) = LLaDAUniEncode().encode(model, image, "editing")
    assert torch.equal(codes[0][2:], source[0][2:]) and not torch.equal(codes[0], source[0])


def test_encode_gives_the_codes_of_the_image_processor(host, model, image):
    processor, language_model = model.pipe.processor.image_processor, model.pipe.model
    for resize_mode in ("editing", "understanding"):
        (codes,) = LLaDAUniEncode().encode(model, image.repeat(2, 1, 1, 1), resize_mode)
        inputs = processor(images=[pil(image)], resize_mode=resize_mode, return_tensors="pt")
        assert equal(codes, language_model.get_image_codes(**inputs) * 2)
        assert host.bars[-1][-1] == (2, 2)


@pytest.mark.parametrize(
    "inputs, settings, size",
    [
        ({}, {}, 64),
        ({"decoder": "normal", "num_inference_steps": 3, "decoder_guidance_scale": 0.0, "upscale": 1},) * 2 + (32,),
    ],
)
def test_decode_gives_the_images_of_the_pipeline(host, model, inputs, settings, size):
    codes, _ = draw(model, batch_size=2)
    host.bars.clear()
    (images,) = decode(model, codes, seed=7, **inputs)
    generators = [generator(7), generator(8)]
    expected = model.pipe.decode_codes(torch.stack(codes), generator=generators, output_type="pt", **settings)
    assert images.shape == (2, size, size, 3) and images.is_contiguous()
    assert torch.equal(images, expected.movedim(1, -1))
    assert torch.equal(decode(model, codes, seed=7, **inputs)[0], images)
    assert not torch.equal(decode(model, codes, seed=8, **inputs)[0], images)
    done, total = host.bars[0][-1]
    assert done == total == (2 if settings else 8)


def test_scenes_are_drawn_in_the_tiles_that_the_decoder_knows(host, model):
    assert model.pipe.config["decoder_tile_size"] == 4
    codes, _ = draw(model, width=128, height=128)
    expected = model.pipe.decode_codes(torch.stack(codes), generator=[generator(7)], output_type="pt")
    assert torch.equal(decode(model, codes, seed=7)[0], expected.movedim(1, -1))


def test_upscale_goes_as_far_as_that_of_the_pipeline():
    _, options = LLaDAUniDecode.INPUT_TYPES()["required"]["upscale"]
    assert tuple(range(options["min"], options["max"] + 1)) == UPSCALES


def test_images_of_several_sizes_come_as_a_list_in_order(host, model):
    codes, _ = draw(model, batch_size=2)
    codes.insert(1, draw(model, width=96, height=32)[0][0])
    images = decode(model, codes)
    assert [image.shape for image in images] == [(1, 64, 64, 3), (1, 32, 96, 3), (1, 64, 64, 3)]
    assert all(0 <= image.min() < image.max() <= 1 for image in images)
    assert host.bars[-1][-1] == (16, 16)


def test_interrupt_stops_at_the_next_block_and_step(host, model):
    side = {"width": 128, "height": 128}  # 64 codes, in five blocks
    expected, _ = draw(model, **side)
    assert len(host.bars[0]) == 6
    works = (lambda: draw(model, **side), lambda: decode(model, expected))
    for work, moves in [(works[0], 1), (works[0], 3), (works[1], 1), (works[1], 2)]:
        host.bars.clear()
        host.interrupt_after = moves
        with pytest.raises(InterruptProcessingException):
            work()
        assert len(host.bars[0]) == moves
    assert equal(draw(model, **side)[0], expected)  # nothing of it is left


@pytest.mark.parametrize(
    "node, inputs, message",
    [
        (draw, {"width": 24}, "`width` must be a multiple of"),
        (draw, {"prompt": " "}, "`prompt` must not be empty"),
        (draw, {"negative_prompt": "blue", "guidance_scale": 1.0}, "`guidance_scale` is 1"),
        (decode, {"codes": []}, "`codes` holds no image"),
        (decode, {"codes": [torch.full((4, 4), 9999)]}, "`codes` must lie in 0..1023"),
        (decode, {"codes": [torch.zeros(4, 4, dtype=torch.long)], "decoder": "none"}, "`decoder` must be one of"),
    ],
)
def test_bad_inputs_are_named_before_any_work(host, model, node, inputs, message):
    with pytest.raises(ValueError, match=message):
        node(model, **inputs)
    assert all(bar == [(0, 8)] for bar in host.bars)


def test_masks_that_do_not_fit_are_named(host, model, image):
    fill = LLaDAUniFill().generate
    # What Load Image gives for an image without transparency
    with pytest.raises(ValueError, match="`mask` marks nothing. Paint .* MaskEditor"):
        fill(model, image, prompt="a hat", mask=torch.zeros(1, 64, 64), **EDITING)
    with pytest.raises(ValueError, match="`mask` has 2 masks for 3 images"):
        fill(model, image.repeat(3, 1, 1, 1), prompt="a hat", mask=torch.ones(2, 64, 64), **EDITING)
