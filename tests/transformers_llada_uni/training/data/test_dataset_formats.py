"""Formats by their columns, images as they are stored, and texts that are none."""

import io

import pytest
from PIL import Image

from transformers_llada_uni.training.data.dataset_formats import (
    check_messages,
    check_text,
    format_of,
    images_of,
    stored_image,
)


def test_formats_by_columns():
    assert format_of(["prompt", "completion", "images"]) == "prompt_completion"
    assert format_of(["image_codes", "instruction"]) == "editing"
    assert format_of(["prompt", "solution"]) == "prompt"


@pytest.mark.parametrize(
    "wrap",
    [
        lambda data, path: data,
        lambda data, path: {"bytes": data, "path": None},
        lambda data, path: {"bytes": None, "path": path},
        lambda data, path: {"path": path},
    ],
)
def test_undecoded_images_are_decoded(wrap, tmp_path):
    buffer = io.BytesIO()
    Image.new("RGB", (5, 3), "red").save(buffer, "PNG")
    path = tmp_path / "image.png"
    path.write_bytes(buffer.getvalue())
    image = stored_image(wrap(buffer.getvalue(), str(path)))
    assert image.size == (5, 3) and image.getpixel((0, 0)) == (255, 0, 0)


def test_other_images_stay_as_they_are():
    for image in (Image.new("L", (1, 1)), "https://example.com/image.png", None):
        assert stored_image(image) is image
    with pytest.raises(OSError, match="cannot identify"):
        stored_image(b"no image")


@pytest.mark.parametrize("nothing", [None, {"bytes": None, "path": None}])
def test_a_place_without_an_image(nothing):
    with pytest.raises(ValueError, match="Row 3: `image` is missing"):
        images_of({"image": nothing, "caption": "a cat"}, "text_to_image", 3)
    chat = [{"role": "user", "content": [{"type": "image", "image": nothing}]}]
    assert images_of({"messages": chat, "images": ["given"]}, "messages", 3) == [("given", "understanding")]


@pytest.mark.parametrize("value", [None, 3, "", "  ", ["a"], "half \ud83d of a smile"])
def test_texts_that_are_none_name_row_and_column(value):
    with pytest.raises(ValueError, match="Row 7: `caption` "):
        check_text(value, 7, "caption")


@pytest.mark.parametrize("content", [None, 3, "\ud83d", [{"type": "text", "text": "\ud83d"}], [{"type": "text"}]])
def test_messages_that_are_none_name_row_and_place(content):
    with pytest.raises(ValueError, match=r"Row 7: `messages\[1\]\['content'\]` "):
        check_messages([{"role": "user", "content": "hi"}, {"role": "assistant", "content": content}], 7, "messages")
