"""Each tab in a real browser, from a click on an example to its result."""

import asyncio
import socket
import time
from collections.abc import Iterator
from importlib.util import find_spec
from itertools import count

import PIL.Image
import pytest

from llada_uni.demo import image_panel, messages
from llada_uni.demo.image_work import ImageProgress
from llada_uni.demo.model_turns import VisitorGone


if find_spec("playwright") is None:
    pytest.skip("playwright is not installed", allow_module_level=True)

from playwright.sync_api import Browser, expect

from .browser import CHROMIUM, PHONE, Visitor, chromium


if CHROMIUM is None:
    pytest.skip("there is no chromium here", allow_module_level=True)

# The editor last: it draws its canvas over and over, and without a graphics card that takes a core.
TABS = {"Draw": Visitor.draw, "Chat": Visitor.ask, "Story": Visitor.tell, "Edit": Visitor.edit}


@pytest.fixture(scope="module")
def asked_hosts() -> Iterator[set[str]]:
    """Hosts that this process, the server, has looked up."""
    hosts, look_up = set(), socket.getaddrinfo

    def note(host, *args, **kwargs):
        hosts.add(host.decode() if isinstance(host, bytes) else str(host))
        return look_up(host, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", note)
        yield hosts


@pytest.fixture(scope="module")
def url(demo, asked_hosts) -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(messages, "MIN_SECONDS", 20)  # an error must be there still when a busy machine looks
        yield demo.launch(prevent_thread_lock=True, quiet=True)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def visitor(browser, url) -> Visitor:
    return Visitor(browser, url)


def test_an_error_is_a_sentence(visitor):
    visitor.open("Draw")
    visitor.page.get_by_label("What to draw").fill("")
    visitor.press("Draw")
    visitor.see("Write what to draw first.")
    visitor.page.get_by_role("button", name="Settings").locator("visible=true").click()
    visitor.fill("Width", "100")
    visitor.page.keyboard.press("Tab")
    visitor.page.get_by_label("What to draw").fill("a <b>red</b> apple")
    visitor.press("Draw")
    visitor.see("Width must be a multiple of 16, got 100; the nearest is 96.")
    visitor.fill("Width", "64")
    assert "Traceback" not in visitor.page.content()


def test_who_stops_or_leaves_ends_his_work_and_others_see_nothing_of_it(browser, url, visitor):
    ended: list[str] = []

    def slow(pipe, wish, report):
        try:
            for number in count():  # as long as the machine takes
                report(ImageProgress(number, 10**6))
                time.sleep(0.2)  # more would keep the page from hearing the click
        except VisitorGone:
            ended.append(wish.prompt)
            raise

    def wait_for(prompts: list[str]) -> None:
        deadline = time.monotonic() + 60
        while ended != prompts and time.monotonic() < deadline:
            time.sleep(0.05)
        assert ended == prompts

    visitor.draw()  # which the other must not see
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(image_panel, "make_images", slow)
        visitor.click_example("cherries")
        visitor.see("Codes: ")
        visitor.press("Stop")
        wait_for(["cherries"])
        visitor.see("Stopped.")
        visitor.page.wait_for_timeout(500)
        visitor.see("Stopped.")  # no late news over it
        other = Visitor(browser, url)
        other.press("Edit it")
        other.see("Nothing has been drawn yet.")
        other.click_example("a bicycle")
        other.see("Codes: ")
        other.leave()
        wait_for(["cherries", "a bicycle"])
    visitor.draw()
    expect(visitor.page.get_by_text("Stopped.").locator("visible=true")).to_have_count(0)


@pytest.mark.parametrize("tab", TABS)
def test_each_tab_does_its_job_from_a_click_on_an_example(visitor, tab):
    TABS[tab](visitor)
    assert visitor.overflow <= 0


def test_a_conversation_goes_on_after_no_answer_and_after_errors(browser, url, demo):
    heard: list[list[str]] = []

    async def answer(conversation, max_new_tokens, **settings):
        words = [message["content"][-1]["text"] for message in conversation]
        if words[-1] == "sizes":
            raise ValueError("`images` must be of one size.")
        heard.append(words)
        yield "" if words[-1] == "hello" else f"You said: {words[-1]}"
        if words[-1] == "break":
            raise RuntimeError("a fault")

    visitor = Visitor(browser, url)
    visitor.open("Chat")
    box = visitor.page.get_by_test_id("textbox").locator("visible=true")

    def say(words: str) -> None:
        expect(box).to_be_enabled()
        expect(visitor.page.get_by_role("button", name="Submit").locator("visible=true")).to_be_visible()
        box.fill(words)
        box.press("Enter")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo.turns, "answer", answer)
        say("hello")
        visitor.see("(no answer)")
        say("sizes")
        visitor.see("Images must be of one size.")
        expect(box).to_have_value("sizes")
        say("break")
        visitor.see(messages.OUR_FAULT)
        expect(box).to_have_value("break")
        say("and now?")
        visitor.see("You said: and now?")
        expect(box).to_be_enabled()
    assert heard == [["hello"], ["hello", "", "break"], ["hello", "", "and now?"]]
    visitor.leave()


def test_who_stops_an_answer_has_asked_all_the_same(browser, url, demo):
    """His question is in the conversation, and not in the box again."""

    async def answer(conversation, max_new_tokens, **settings):
        while True:
            yield "Well ..."
            await asyncio.sleep(0.1)

    visitor = Visitor(browser, url)
    visitor.open("Chat")
    box = visitor.page.get_by_test_id("textbox").locator("visible=true")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo.turns, "answer", answer)
        box.fill("wait")
        box.press("Enter")
        for again in (True, False):
            visitor.see("Well ...")
            visitor.page.locator(".stop-button").locator("visible=true").click()
            expect(visitor.page.get_by_role("button", name="Submit").locator("visible=true")).to_be_visible()
            visitor.page.wait_for_timeout(500)
            expect(box).to_have_value("")
            if again:
                visitor.page.get_by_label("Retry").locator("visible=true").click()
    visitor.leave()


def test_a_drawing_is_painted_on_and_made_anew_there(visitor):
    visitor.draw()
    visitor.press("Edit it")
    visitor.page.get_by_label("What to change").locator("visible=true").fill("a green apple")
    visitor.page.wait_for_timeout(1000)  # the editor takes its time to show an image
    visitor.paint()
    wishes = []
    with pytest.MonkeyPatch.context() as patch:
        make = image_panel.make_images
        patch.setattr(image_panel, "make_images", lambda *args: [wishes.append(args[1]), make(*args)])
        visitor.press("Edit")
        visitor.see("An image in")
        deadline = time.monotonic() + 30
        while not wishes and time.monotonic() < deadline:
            visitor.page.wait_for_timeout(50)
    (wish,) = wishes
    assert wish.image.size == wish.mask.size == (64, 64)  # not as large as it was shown
    left, top, right, bottom = wish.mask.getbbox()
    assert 0 < left < 32 < right < 64 and 0 < top < 32 < bottom < 64


def test_the_image_that_was_chosen_is_edited(browser, url):
    wishes, visitor = [], Visitor(browser, url)

    def make(pipe, wish, report):
        wishes.append(wish)
        images = [PIL.Image.new("RGB", (64, 64), name) for name in ("red", "blue")[: wish.num_images]]
        report(ImageProgress(16, 16, images, True))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(image_panel, "make_images", make)
        visitor.page.get_by_role("button", name="Settings").locator("visible=true").click()
        visitor.page.wait_for_timeout(500)  # see `Visitor.fill`
        visitor.page.get_by_label("number input for Images").locator("visible=true").fill("2")
        visitor.page.keyboard.press("Tab")
        visitor.click_example("cherries")
        visitor.see("2 images in")
        visitor.page.locator(".images button.thumbnail-item").locator("visible=true").nth(1).click()
        visitor.press("Edit it")
        visitor.page.get_by_label("What to change").locator("visible=true").fill("a green apple")
        visitor.page.wait_for_timeout(1000)  # the editor takes its time to show an image
        visitor.press("Edit")
        visitor.see("An image in")
    assert wishes[-1].image.getpixel((32, 32))[:3] == (0, 0, 255)
    visitor.leave()


def test_nothing_comes_from_elsewhere_and_nothing_is_told_elsewhere(visitor, url, asked_hosts):
    assert [request for request in visitor.requests if not request.startswith((url, "data:", "blob:"))] == []
    assert asked_hosts <= {"127.0.0.1", "localhost", "None"}


def test_a_phone_shows_everything_without_scrolling_sideways(browser, url):
    visitor = Visitor(browser, url, PHONE)
    visitor.draw()
    box = visitor.page.locator(".images img").first.bounding_box()
    assert box["y"] + box["height"] < PHONE["height"]  # what was drawn is seen at once
    for tab in TABS:
        visitor.open(tab)
        visitor.page.get_by_role("button", name="Settings").locator("visible=true").click()
        assert visitor.overflow <= 0, tab
    visitor.leave()
