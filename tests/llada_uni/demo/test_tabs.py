"""What the tabs make of what Gradio hands them."""

import asyncio
import logging
import re
import threading
from types import SimpleNamespace

import gradio as gr
import PIL.Image
import pytest
from gradio.components.image_editor import EditorData
from gradio.data_classes import FileData

from llada_uni.demo import chat_tab
from llada_uni.demo.app import _page
from llada_uni.demo.chat_tab import NO_ANSWER, read_history
from llada_uni.demo.edit_tab import as_given, painted, telling, to_paint
from llada_uni.demo.examples import GENERAL, IMAGES, examples_of
from llada_uni.demo.messages import OUR_FAULT, told_in_a_sentence
from llada_uni.demo.settings import MAX_NEW_SEED, settle_seed
from llada_uni.demo.stopping import settle
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


@pytest.mark.parametrize("shown", ["", NO_ANSWER])
def test_the_model_may_have_said_nothing(demo, shown):
    sides = [("user", "hello"), ("assistant", shown), ("user", "hello?")]
    history = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in sides]
    read = read_history(history)
    assert [message["content"][0]["text"] for message in read] == ["hello", "", "hello?"]
    assert demo.turns.engine.write_prompt(read, 100).numel()


def test_what_is_sent_must_be_images_and_words(tmp_path):
    notes = tmp_path / "notes.txt"
    notes.write_text("no image")
    with pytest.raises(ValueError, match="^notes.txt is no image") as refusal:
        read_history([{"role": "user", "content": {"text": "what is this?", "files": [str(notes)]}}])
    assert str(tmp_path) not in str(refusal.value)
    with pytest.raises(ValueError, match="Write something"):
        read_history([{"role": "user", "content": {"text": " ", "files": [str(IMAGES / "rocket.png")]}}])
    with pytest.raises(ValueError, match="may have 16 images"):
        read_history([{"role": "user", "content": {"text": "?", "files": 17 * [str(IMAGES / "rocket.png")]}}])


def test_images_are_read_while_others_are_answered(demo, monkeypatch):
    handlers, threads = [], []

    def read(history):
        threads.append(threading.current_thread())
        return read_history(history)

    chat = SimpleNamespace(goes_on=lambda request: told_in_a_sentence())
    monkeypatch.setattr(chat_tab, "Chat", lambda handler, **settings: handlers.append(handler) or chat)
    monkeypatch.setattr(chat_tab, "read_history", read)
    with gr.Blocks():
        chat_tab.chat_tab(demo.turns, GENERAL)

    async def ask() -> list[str]:
        return [text async for text in handlers[0]({"text": "hello", "files": []}, [], 4, 0, gr.Request())]

    assert asyncio.run(ask()) and len(threads) == 1
    assert threads[0] is not threading.current_thread()


def test_what_is_refused_is_in_the_box_again():
    async def answer(message, history):
        yield "yes?"

    with gr.Blocks():
        chat = chat_tab.Chat(answer, multimodal=True)
    message, request = {"text": "hello", "files": []}, gr.Request()
    request.session_hash = "a"
    assert chat._put_back(message, request).value["text"] == "hello"  # before the answer began, as where all is full
    with pytest.raises(gr.Error), chat.goes_on(request):
        raise ValueError("no")
    assert chat._put_back(message, request).value["text"] == "hello"
    work = chat.goes_on(request)
    work.__enter__()  # and is stopped
    assert chat._put_back(message, request) == gr.skip()
    assert not chat.answering


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
    strip = PIL.Image.new("RGB", (1, 1000))
    assert to_paint(strip)["background"].size == (2, 2000)  # and not 512 x 512,000


def test_what_was_enlarged_to_be_painted_on_is_edited_in_its_own_size():
    given = PIL.Image.effect_noise((128, 64), 50).convert("RGB")
    shown = to_paint(given)
    assert shown["background"].size == (1024, 512)
    layer = PIL.Image.new("RGBA", (1024, 512))
    layer.putpixel((1023, 0), (1, 2, 3, 255))
    # The editor gives its own copy, as PNG.
    edited = {"background": shown["background"].convert("RGBA"), "layers": [layer]}
    image, mask = as_given(edited, given)
    assert image is given and mask.size == (128, 64) and mask.getbbox() == (127, 0, 128, 1)
    assert as_given({**edited, "layers": []}, given) == (given, None)
    other = PIL.Image.new("RGBA", (1024, 512), "red")  # a visitor has put another one there
    image, mask = as_given({"background": other, "layers": [layer]}, given)
    assert image is other and mask.size == other.size
    assert as_given({"background": other, "layers": []}, None) == (other, None)


def test_an_image_that_is_too_large_to_be_painted_on(tmp_path, monkeypatch):
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 50)
    editor = gr.ImageEditor(type="pil")
    for name, content, words in (
        ("large", None, "The image has more than 16,777,216 pixels"),
        ("none", b"x", "The image cannot be read"),
    ):
        path = tmp_path / f"{name}.png"
        PIL.Image.new("RGB", (20, 20)).save(path)
        if content:
            path.write_bytes(content)
        payload = EditorData(background=FileData(path=str(path)), layers=[], composite=None)
        with pytest.raises(gr.Error, match=words):
            telling(editor.preprocess)(payload)


def test_a_seed_is_new_or_stays():
    assert settle_seed(7, False) == 7
    assert 0 <= settle_seed(7, True) <= MAX_NEW_SEED
    with pytest.raises(ValueError, match="Give a seed"):
        settle_seed(None, False)


def test_words_of_a_story_are_words():
    assert block_of(" a <b>moon</b>\nrises ") == "<p>a &lt;b&gt;moon&lt;/b&gt;<br>rises</p>"
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


def test_an_error_is_shown_as_long_as_it_takes_to_read():
    seconds = []
    for words in ("Write what to draw first.", 100 * "x"):
        with pytest.raises(gr.Error) as told, told_in_a_sentence():
            raise ValueError(words)
        seconds.append(told.value.duration)
    assert seconds == [4, 7]


@pytest.mark.parametrize(
    ("status", "then"),
    [("Codes: 3 of 16 ...", "Stopped."), ("An image in 2.0 s.", gr.skip()), (None, gr.skip())],  # nothing done yet
)
def test_only_what_goes_on_is_stopped(status, then):
    assert settle(status) == then


def test_a_model_of_ones_own_gets_a_page_with_words_to_click(demo):
    assert examples_of("path/to/a/model") is GENERAL
    page = _page(demo.turns, GENERAL)
    samples = [block.samples for block in page.blocks.values() if isinstance(block, gr.Dataset)]
    for texts in (GENERAL.drawings, [words for _, words in GENERAL.edits], GENERAL.stories):
        assert [[text] for text in texts] in samples
