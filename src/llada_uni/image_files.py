"""Images that a command is given; torch is not needed to see that one is missing."""

import PIL.Image
from PIL import ImageOps


SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif"}


def open_image(path: str, name: str = "image") -> PIL.Image.Image:
    """
    An image, turned upright as its camera says.

    Raises:
        ValueError: naming the file, if it is no image.
    """
    try:
        with PIL.Image.open(path) as image:
            return ImageOps.exif_transpose(image)
    except FileNotFoundError as error:
        raise ValueError(f"`{name}`: there is no file {path}.") from error
    except IsADirectoryError as error:
        raise ValueError(f"`{name}`: {path} is a folder, and no image.") from error
    except Exception as error:  # PIL raises whatever its decoders raise
        raise ValueError(f"`{name}`: {path} is no image that can be read: {error}") from error
