"""Images of any kind and PIL mode as upright RGB, with limits to what is read."""

import base64
import binascii
import os
import time
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
from huggingface_hub.utils import httpx
from PIL import Image, ImageOps
from transformers.image_transforms import convert_to_rgb
from transformers.image_utils import ChannelDimension, infer_channel_dimension_format, is_valid_image
from transformers.utils import is_torch_tensor


@dataclass(frozen=True)
class ImageReader:
    """
    Reads images: upright (EXIF), RGB, transparency on white.

    Args:
        max_image_pixels (`int`): Larger images are refused before they are decoded.
        max_image_bytes (`int`): Larger files, downloads and base64 strings are refused.
        url_timeout (`float`): Seconds that a download may take.
        do_convert_rgb (`bool`): Without it, other modes than RGB are refused.
    """

    max_image_pixels: int
    max_image_bytes: int
    url_timeout: float
    do_convert_rgb: bool

    def read(self, image: Any, input_data_format: str | None = None) -> Image.Image | list[Image.Image]:
        """
        One image, or of a 4-D array a list of them.

        Args:
            image: A PIL image, numpy array or torch tensor, URL, path, `data:` URI or base64 string.
            input_data_format (`str`, *optional*): `"channels_first"` or `"channels_last"` for arrays where the shape
                does not tell.

        Raises:
            TypeError, ValueError: which name `images`, if it is none of these, cannot be read or is too large.
        """
        if isinstance(image, list | tuple):
            raise ValueError("`images` must be one list of images, or one list of lists with a list per sample.")
        source = "one"
        if isinstance(image, str | os.PathLike):
            source, image = self._name(image), self._open(image)
        if isinstance(image, Image.Image):
            return self._upright_rgb(image, source)
        if not is_valid_image(image):
            raise TypeError(
                "`images` must be PIL images, numpy arrays, torch tensors, paths, URLs or base64 strings, or lists "
                f"of these, got {type(image).__name__}."
            )
        if is_torch_tensor(image):
            image = image.detach().cpu()
            image = (image.float() if image.is_floating_point() else image).numpy()
        if image.ndim == 4:
            return [self._from_array(entry, input_data_format) for entry in image]
        return self._from_array(image, input_data_format)

    @staticmethod
    def _name(source: str | os.PathLike) -> str:
        text = os.fspath(source)
        return repr(text if len(text) <= 100 else text[:97] + "...")

    def _open(self, source: str | os.PathLike) -> Image.Image:
        text = os.fspath(source)
        try:
            if text.startswith(("http://", "https://")):
                return Image.open(BytesIO(self._download(text)))
            if os.path.isfile(text):
                self._check_bytes(os.path.getsize(text))
                return Image.open(text)
            encoded = text.split(",", 1)[1] if text.startswith("data:image/") else text
            self._check_bytes(len(encoded) * 3 // 4)
            return Image.open(BytesIO(base64.b64decode(encoded, validate=True)))
        except (binascii.Error, UnicodeEncodeError) as error:
            raise ValueError(
                f"`images`: {self._name(source)} is no existing file, no http(s) URL and no base64 string."
            ) from error
        except Exception as error:  # each format, and the network, has errors of its own
            raise ValueError(f"`images`: could not read {self._name(source)} as an image: {error}") from error

    def _download(self, url: str) -> bytes:
        """What is at a URL; stops as soon as it is too much, or takes too long."""
        content, end = bytearray(), time.monotonic() + self.url_timeout
        with httpx.stream("GET", url, timeout=self.url_timeout, follow_redirects=True) as response:
            response.raise_for_status()
            for piece in response.iter_bytes():
                content += piece
                self._check_bytes(len(content))
                if time.monotonic() > end:
                    raise TimeoutError(f"it takes longer than {self.url_timeout:g} seconds (`url_timeout`)")
        return bytes(content)

    def _check_bytes(self, count: int) -> None:
        if count > self.max_image_bytes:
            raise ValueError(f"it has more than {self.max_image_bytes} bytes (`max_image_bytes`)")

    def _upright_rgb(self, image: Image.Image, source: str = "one") -> Image.Image:
        try:
            if image.width * image.height > self.max_image_pixels:
                raise ValueError(
                    f"{image.width} x {image.height} are more than {self.max_image_pixels} pixels (`max_image_pixels`)"
                )
            if not self.do_convert_rgb and image.mode != "RGB":
                raise ValueError(f"its mode is {image.mode}, and `do_convert_rgb` is off")
            file_format, image = image.format, ImageOps.exif_transpose(image)
            if not self.do_convert_rgb or (image.mode == "RGB" and "transparency" not in image.info):
                return image
            rgb = convert_to_rgb(_in_eight_bits(image, file_format), return_numpy=True)
            return Image.fromarray(np.asarray(rgb))
        except Exception as error:  # images are decoded late: a corrupt file shows here
            raise ValueError(f"`images`: could not read {source}: {error}") from error

    def _from_array(self, array: np.ndarray, input_data_format: str | None) -> Image.Image:
        if array.ndim == 2:
            array = array[..., None]
        elif array.ndim == 3:
            try:
                layout = input_data_format or infer_channel_dimension_format(array, num_channels=(1, 3, 4))
            except ValueError as error:
                raise ValueError(
                    f"`images`: an array of shape {array.shape} has no axis of 1, 3 or 4 channels."
                ) from error
            array = np.moveaxis(array, 0, -1) if layout == ChannelDimension.FIRST else array
        else:
            raise ValueError(f"`images`: an array must have 2, 3 or (a batch) 4 dimensions, got {array.ndim}.")
        if array.size == 0:
            raise ValueError(f"`images` must have at least one pixel, got an array of shape {array.shape}.")
        if array.shape[-1] not in (1, 3, 4):
            raise ValueError(f"`images`: an array must have 1, 3 or 4 channels, got {array.shape[-1]}.")
        try:
            array = _to_bytes(array)
        except ValueError as error:
            raise ValueError(f"`images`: {error}") from error
        array = array[..., 0] if array.shape[-1] == 1 else array
        return self._upright_rgb(Image.fromarray(np.ascontiguousarray(array)))


def check_rescaling(images: Any, do_rescale: bool) -> None:
    """
    Raises:
        ValueError: if floats in 0..1, which are read as bytes in 0..255, shall not be scaled back.
    """
    if not do_rescale and _holds_unit_floats(images):
        raise ValueError("`do_rescale=False` is not needed for floats in 0..1: they are known as such. Leave it out.")


def _holds_unit_floats(images: Any) -> bool:
    """Whether there are such among arrays and tensors, in lists or not."""
    if isinstance(images, list | tuple):
        return any(map(_holds_unit_floats, images))
    if isinstance(images, np.ndarray):
        return np.issubdtype(images.dtype, np.floating) and images.size > 0 and float(images.max()) <= 1
    return is_torch_tensor(images) and images.is_floating_point() and images.numel() > 0 and float(images.max()) <= 1


def _to_bytes(array: np.ndarray) -> np.ndarray:
    """Values in 0..255, or floats in 0..1, as uint8; raises ValueError for others."""
    if array.dtype == bool:
        return array * np.uint8(255)
    if array.dtype == np.uint8:
        return array
    low, high = float(array.min()), float(array.max())
    if not (low >= 0 and high <= 255):  # also true of NaN
        raise ValueError(f"values must lie in 0..255 (or 0..1), got {low} to {high}")
    if np.issubdtype(array.dtype, np.floating):
        array = np.rint(array * 255 if high <= 1 else array)
    return array.astype(np.uint8)


def _in_eight_bits(image: Image.Image, file_format: str | None) -> Image.Image:
    """
    An image that PIL converts to RGB as it is meant: not of more than 8 bits, and not premultiplied.

    Raises:
        ValueError: if its values are neither of 8 nor of 16 bits.
    """
    transparent = image.info.get("transparency")
    if image.mode in ("La", "RGBa"):
        return image.convert(image.mode.upper())
    if image.mode == "RGB" and isinstance(transparent, tuple) and max(transparent) > 255:
        image = image.copy()  # PIL keeps the upper half of 16 bits, but not of the transparent colour
        image.info["transparency"] = tuple(value >> 8 for value in transparent)
    if image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
        return image
    values = np.asarray(image)
    low, high = values.min(), values.max()
    # Mode "I" has no range of its own. PIL scales files of the PPM family to 16 bits; of others the values tell.
    if image.mode != "F" and (image.mode != "I" or file_format == "PPM" or high > 255):
        if low < 0 or high > 65535:
            raise ValueError(f"its mode is {image.mode}, with values from {low} to {high}, which are not of 16 bits")
        grey = Image.fromarray((values // 257).astype(np.uint8))
    else:
        try:
            grey = Image.fromarray(_to_bytes(values))
        except ValueError as error:
            raise ValueError(f"its mode is {image.mode}, and {error}") from error
    if transparent is not None:
        grey.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return grey
