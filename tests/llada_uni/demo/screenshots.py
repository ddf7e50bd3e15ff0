"""
Takes the screenshots of docs/demo.md: `python -m tests.llada_uni.demo.screenshots docs/images`.

The page is as visitors see it; only the preview is held until it has been taken.
"""

import sys
import tempfile
import threading
from pathlib import Path

import PIL.Image

from diffusers_llada_uni import LLaDAUniPipeline, embedded_checkpoint
from llada_uni.demo import image_panel
from llada_uni.demo.app import Demo
from llada_uni.demo.examples import EMOJI

from .browser import PHONE, Visitor, chromium


DESKTOP = {"width": 1100, "height": 740}
NUM_COLORS = 128  # of a page there are few


def take(visitor: Visitor, path: Path, full: bool = False) -> None:
    visitor.page.mouse.move(0, 0)
    visitor.page.wait_for_timeout(1500)  # moving things come to rest
    with tempfile.TemporaryDirectory() as folder:
        visitor.page.screenshot(path=f"{folder}/page.png", full_page=full)
        image = PIL.Image.open(f"{folder}/page.png").convert("RGB")
        image.quantize(NUM_COLORS, dither=PIL.Image.Dither.NONE).save(path, optimize=True)
    print(f"{path}: {path.stat().st_size // 1000} kB")


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    demo = Demo(LLaDAUniPipeline.from_pretrained(embedded_checkpoint("emoji")))
    url = demo.launch(prevent_thread_lock=True, quiet=True)
    goes_on, make_images = threading.Event(), image_panel.make_images

    def held(pipe, wish, report):
        def report_and_wait(update):
            report(update)
            if update is not None and update.images is not None and not update.is_finished:
                goes_on.wait(60)

        make_images(pipe, wish, report_and_wait)

    with chromium() as browser:
        visitor = Visitor(browser, url, DESKTOP)
        visitor.page.get_by_role("button", name="Settings").locator("visible=true").click()
        visitor.page.get_by_label("number input for Images").locator("visible=true").fill("4")
        visitor.page.keyboard.press("Tab")
        visitor.page.get_by_role("button", name="Settings").locator("visible=true").click()
        image_panel.make_images = held
        visitor.click_example("cherries")
        visitor.page.locator(".images img").first.wait_for()
        take(visitor, folder / "demo-drawing.png")
        goes_on.set()
        visitor.see("4 images in")
        take(visitor, folder / "demo-draw.png")
        visitor.ask()
        take(visitor, folder / "demo-chat.png")
        visitor.open("Story")
        visitor.click_example(EMOJI.stories[0])
        visitor.see("The end.")
        take(visitor, folder / "demo-story.png", full=True)
        visitor.leave()
        phone = Visitor(browser, url, PHONE)
        phone.draw()
        take(phone, folder / "demo-phone.png")
        phone.leave()
        visitor = Visitor(browser, url, {**DESKTOP, "height": 1200})  # all of it: a stroke is made where it is seen
        visitor.edit()
        visitor.page.wait_for_timeout(1000)
        visitor.paint()
        visitor.page.get_by_label("What to change").locator("visible=true").fill("waving hand")
        image_panel.make_images = make_images
        visitor.press("Edit")
        visitor.page.wait_for_timeout(10_000)  # the status before says the same
        take(visitor, folder / "demo-edit.png")
    demo.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
