"""What the tabs make of what Gradio hands them."""

import logging
import re

import gradio as gr
import PIL.Image
import pytest

from llada_uni.demo.app import _page
from llada_uni.demo.chat_tab import read_history
from llada_uni.demo.edit_tab import painted, to_paint
from llada_uni.demo.examples import GENERAL, IMAGES, examples_of
from llada_uni.demo.messages import OUR_FAULT, told_in_a_sentence
from llada_uni.demo.settings import MAX_NEW_SEED, settle_seed
from llada_uni.demo.story_tab import block_of
from llada_uni.serving.jobs import EngineBusy


def test_one_turn_of_several_messages():
    rocket = str(IMAGES / "rocket.png")
    history = [
        {"role": "user", "content": [{"type": "text", "text": "hello"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "yes?"}]},
        {"role": "user", "content": [{"type": "file", "file": {"path": rocket}}]},
        {"role": "user", "content": {"text": "what is this?", "files": [rocket]}},
    ]
    read = read_history(history)
    assert [message["role"] for message in read] == ["user", "assistant", "user"]
    assert [part["type"] for part in read[2]["content"]] == ["image", "image", "text"]
    assert read[2]["content"][0]["image"].size == (64, 64)
    assert read[0]["content"] == [{"type": "text", "text": "hello"}]


def test_what_is_sent_must_be_images_and_words(tmp_path):
    notes = tmp_path / "notes.txt"
    notes.write_text("no image")
    with pytest.raises(ValueError, match="^notes.txt is no image") as refusal:
        read_history([{"role": "user", "content": {"text": "what is this?", "files": [str(notes)]}}])
    assert str(tmp_path) not in str(refusal.value)
    with pytest.raises(ValueError, match="Write something"):
        read_history([{"role": "user", "content": {"text": " ", "files": [str(IMAGES / "rocket.png")]}}])


def test_what_is_painted_is_white():
    shown = to_paint(PIL.Image.new("RGB", (64, 64), "red"))
    assert shown["background"].size == (512, 512) and painted(shown) is None
    layer = PIL.Image.new("RGBA", (512, 512))
    assert painted({**shown, "layers": [layer]}) is None
    layer.paste((0, 0, 0, 200), (100, 100, 200, 200))  # black is a colour, too
    mask = painted({**shown, "layers": [layer]})
    assert mask.getbbox() == (100, 100, 200, 200) and set(mask.tobytes()) == {0, 255}
    large = PIL.Image.new("RGB", (600, 2000))
    assert to_paint(large)["background"] is large


def test_a_seed_is_new_or_stays():
    assert settle_seed(7, False) == 7
    assert 0 <= settle_seed(7, True) <= MAX_NEW_SEED
    with pytest.raises(ValueError, match="Give a seed"):
        settle_seed(None, False)


def test_words_of_a_story_are_words():
    assert block_of(" a <b>moon</b> ") == "<p>a &lt;b&gt;moon&lt;/b&gt;</p>"
    assert re.match('<img alt="" src="data:image/webp;base64,', block_of(PIL.Image.new("RGB", (64, 64))))


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (ValueError("`width` must be a multiple of 32, got 100."), "Width must be a multiple of 32, got 100."),
        (TypeError("`prompt` is\n<b>bold</b>"), "Prompt is &lt;b&gt;bold&lt;/b&gt;"),
        (EngineBusy("64 requests wait already."), "Too many visitors wait already; please try again in a minute."),
        (RuntimeError("CUDA out of memory"), OUR_FAULT),
        (gr.Error("as it is"), "as it is"),
    ],
)
def test_errors_are_told_in_a_sentence(error, sentence, caplog):
    with caplog.at_level(logging.ERROR), pytest.raises(gr.Error) as told, told_in_a_sentence():
        raise error
    assert told.value.message == sentence
    assert bool(caplog.records) == isinstance(error, RuntimeError)  # ours is for the log, with its traceback


def test_a_model_of_ones_own_gets_a_page_with_words_to_click(demo):
    assert examples_of("path/to/a/model") is GENERAL
    page = _page(demo.turns, GENERAL)
    samples = [block.samples for block in page.blocks.values() if isinstance(block, gr.Dataset)]
    for texts in (GENERAL.drawings, [words for _, words in GENERAL.edits], GENERAL.stories):
        assert [[text] for text in texts] in samples
