from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from llada_uni.demo.examples import IMAGES
from llada_uni.demo.image_work import ImageProgress, ImageRequest, make_images
from llada_uni.demo.model_turns import VisitorGone


def hand() -> PIL.Image.Image:
    return PIL.Image.open(Path(IMAGES, "waving_hand.png"))


def upper_half() -> PIL.Image.Image:
    mask = PIL.Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 64, 32))
    return mask


@pytest.mark.parametrize(
    "wish",
    [
        ImageRequest("a red apple", seed=3),
        ImageRequest("a red apple", num_images=2, seed=3, guidance_scale=1.0, num_steps_per_block=2),
        ImageRequest("make the skin dark", image=hand()),
        ImageRequest("waving hand", num_images=2, seed=1, image=hand(), mask=upper_half(), num_inference_steps=3),
    ],
    ids=["draw", "several", "edit", "fill"],
)
def test_images_are_those_of_the_pipeline_to_the_bit(pipe, wish):
    reports: list[ImageProgress] = []
    make_images(pipe, wish, lambda report: None if report is None else reports.append(report))
    expected = pipe(
        wish.prompt,
        image=wish.image,
        mask_image=wish.mask,
        num_images_per_prompt=wish.num_images,
        guidance_scale=wish.guidance_scale,
        num_steps_per_block=wish.num_steps_per_block,
        num_inference_steps=wish.num_inference_steps,
        generator=wish.generators(),
    ).images
    *before, last = reports
    assert last.is_finished and not any(report.is_finished for report in before)
    assert [image.tobytes() for image in last.images] == [image.tobytes() for image in expected]
    # Blocks have 16 codes, as images have, and prompts end in the midst of one: two blocks, a preview between them.
    done = [report.num_done for report in reports]
    assert done == sorted(done) and 0 < done[0] < 16 and {report.num_codes for report in reports} == {16}
    (preview,) = [report for report in before if report.images is not None]
    assert preview.num_done < 16 and len(preview.images) == wish.num_images


def test_a_preview_shows_what_is_there_and_hides_what_is_not(pipe):
    reports: list[ImageProgress] = []
    make_images(pipe, ImageRequest("a red apple"), lambda report: reports.append(report) if report else None)
    shown = next(report for report in reports if report.images is not None)
    preview, image = (np.asarray(report.images[0], dtype=int) for report in (shown, reports[-1]))
    tiles = preview.reshape(4, 16, 4, 16, 3).swapaxes(1, 2).reshape(16, 16, 16, 3)
    is_hidden = [len(np.unique(tile.reshape(-1, 3), axis=0)) == 2 for tile in tiles]  # a colour and a line around it
    assert is_hidden == [number >= shown.num_done for number in range(16)]
    seen = np.repeat(np.repeat(~np.array(is_hidden).reshape(4, 4), 16, axis=0), 16, axis=1)
    assert np.abs(preview - image)[seen].mean() < 50  # of 255; it is 100 for another emoji


@pytest.mark.parametrize("last", [1, 2, 4], ids=["in a block", "after a part", "in the decoder"])
def test_it_ends_where_its_visitor_leaves(pipe, last):
    num_reports = 0

    def report(update):
        nonlocal num_reports
        num_reports += 1
        if num_reports == last:
            raise VisitorGone

    with pytest.raises(VisitorGone):
        make_images(pipe, ImageRequest("a red apple"), report)
    assert num_reports == last


def test_what_cannot_be_is_refused_before_any_work(pipe):
    def never(report):
        raise AssertionError("it has begun")

    for wish, message in (
        (ImageRequest(" "), "`prompt` must not be empty"),
        (ImageRequest("a", width=100), "`width` must be a multiple of 16"),
        (ImageRequest("a", guidance_scale=-1.0), "`guidance_scale`"),
        (ImageRequest("a", num_inference_steps=0), "`num_inference_steps`"),
        (ImageRequest("a", image=hand(), mask=PIL.Image.new("L", (64, 64))), "`mask_image` must be white"),
    ):
        with pytest.raises(ValueError, match=message):
            make_images(pipe, wish, never)
