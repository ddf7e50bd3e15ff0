"""Grounds that an emoji may stand on, and how large it stands there."""

from PIL import Image


CELL = 64  # pixels of an emoji's place, down and across
GROUNDS = {
    "white": (255, 255, 255),
    "red": (245, 155, 155),
    "orange": (255, 205, 150),
    "yellow": (255, 242, 150),
    "green": (170, 228, 165),
    "blue": (160, 200, 248),
    "purple": (205, 178, 242),
    "grey": (196, 196, 196),
    "black": (34, 34, 34),
}
SIZES = {"big": CELL, "small": 40}


def on_ground(drawn: Image.Image | None, ground: str = "white", size: str = "big") -> Image.Image:
    """An emoji, or nothing, in the middle of its place: 64 x 64, RGB."""
    cell = Image.new("RGBA", (CELL, CELL), GROUNDS[ground])
    if drawn is not None:
        side = SIZES[size]
        if side != CELL:
            drawn = drawn.resize((side, side), Image.Resampling.LANCZOS)
        margin = (CELL - side) // 2
        cell.alpha_composite(drawn, (margin, margin))
    return cell.convert("RGB")
