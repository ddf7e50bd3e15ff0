"""The colours that an emoji has, seen in its pixels."""

import colorsys
from functools import cache

import numpy as np
from emoji_table import Emoji


# Where the hues of a colour wheel end, in degrees
HUES = (
    (14, "red"),
    (35, "orange"),
    (68, "yellow"),
    (165, "green"),
    (258, "blue"),
    (300, "purple"),
    (342, "pink"),
    (360, "red"),
)
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "grey", "white")
CLEAR, OTHER = 0.5, 0.22  # shares of an emoji: above one a colour is its colour, below the other it has no part in it


def colour_of(red: int, green: int, blue: int) -> str:
    hue, lightness, saturation = colorsys.rgb_to_hls(red / 255, green / 255, blue / 255)
    degrees = 360 * hue
    is_reddish = degrees < 16 or degrees > 330
    if lightness > 0.88:
        return "white"
    if lightness < 0.13 or (lightness < 0.27 and saturation < 0.25):
        return "black"
    if saturation < 0.2:
        return "grey"
    if is_reddish and lightness > 0.7:
        return "pink"
    if (degrees < 42 or degrees > 345) and (
        lightness < 0.45 and saturation < 0.75 or lightness < 0.62 and saturation < 0.6
    ):
        return "brown"
    return next(name for end, name in HUES if degrees <= end)


_known = cache(colour_of)


def shares_of_colours(emoji: Emoji) -> dict[str, float]:
    """Of what is drawn, not of the ground."""
    pixels = np.asarray(emoji.drawn.resize((32, 32))).reshape(-1, 4)
    drawn = [tuple(int(value) // 8 * 8 for value in pixel[:3]) for pixel in pixels if pixel[3] > 200]
    shares: dict[str, float] = {}
    for pixel in drawn:
        colour = _known(*pixel)
        shares[colour] = shares.get(colour, 0.0) + 1 / len(drawn)
    return shares


def clear_colour(emoji: Emoji) -> str | None:
    """The one that most of it has, if there is one."""
    shares = shares_of_colours(emoji)
    colour = max(shares, key=lambda name: shares[name], default=None)
    return colour if colour is not None and shares[colour] >= CLEAR else None
