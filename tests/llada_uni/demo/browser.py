"""The page in headless Chromium: what a visitor does there, and how a test knows that it is done."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

from playwright.sync_api import Browser, Page, expect, sync_playwright

from llada_uni.demo.examples import EMOJI


DESKTOP, PHONE = {"width": 1200, "height": 800}, {"width": 390, "height": 844}
CHROMIUM = shutil.which("chromium")
# The machine may be busy.
expect.set_options(timeout=60_000)


@contextmanager
def chromium() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


class Visitor:
    """
    Someone with a browser of his own.

    Attributes:
        requests: All that his browser has asked for.
    """

    def __init__(self, browser: Browser, url: str, size: dict[str, int] = DESKTOP):
        self.page: Page = browser.new_context(viewport=size).new_page()
        self.page.set_default_timeout(60_000)
        self.requests: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(url)
        expect(self.page.get_by_role("button", name="Draw", exact=True)).to_be_visible()

    def leave(self) -> None:
        self.page.context.close()

    def open(self, tab: str) -> None:
        self.page.get_by_role("tab", name=tab, exact=True).click()

    def press(self, button: str) -> None:
        self.page.get_by_role("button", name=button, exact=True).locator("visible=true").click()

    def fill(self, label: str, text: str) -> None:
        """A field that has just been folded out takes its first value a moment later, over what was typed at once."""
        field = self.page.get_by_label(label)
        for _ in range(20):
            field.fill(text)
            self.page.wait_for_timeout(200)
            if field.input_value() == text:
                break
        expect(field).to_have_value(text)

    def see(self, text: str) -> None:
        expect(self.page.get_by_text(text).locator("visible=true").first).to_be_visible()

    def click_example(self, text: str) -> None:
        self.page.get_by_text(text, exact=True).locator("visible=true").first.click()

    @property
    def overflow(self) -> int:
        """Pixels by which the page is wider than the window."""
        return self.page.evaluate("document.documentElement.scrollWidth - window.innerWidth")

    # From a click on an example to its result

    def draw(self) -> None:
        self.open("Draw")
        self.click_example(EMOJI.drawings[0])
        self.see("An image in")
        expect(self.page.locator(".images img").first).to_be_visible()

    def edit(self) -> None:
        self.open("Edit")
        self.click_example(EMOJI.edits[0][1])
        self.see("An image in")
        expect(self.page.locator(".images img").locator("visible=true").first).to_be_visible()

    def paint(self) -> None:
        """A stroke through the midst of the image in the editor."""
        canvas = self.page.locator(".editor canvas").first
        expect(canvas).to_be_visible()
        box = canvas.bounding_box()
        assert box is not None
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        self.page.mouse.move(x - 40, y - 40)
        self.page.mouse.down()
        self.page.mouse.move(x + 40, y + 40, steps=5)
        self.page.mouse.up()

    def ask(self) -> None:
        self.open("Chat")
        self.click_example(EMOJI.questions[0][0])
        self.see("rocket")

    def tell(self) -> None:
        self.open("Story")
        self.click_example(EMOJI.stories[1])
        self.see("The end.")
