"""Image processor of LLaDA2.0-Uni: pictures of any kind and size to 16 x 16 patches, with PIL and numpy only."""

import base64
import binascii
import math
import os
from collections.abc import Sequence
from functools import lru_cache
from io import BytesIO
from typing import Any

import numpy as np
from huggingface_hub.utils import httpx
from PIL import Image, ImageOps
from transformers.image_processing_backends import PilBackend
from transformers.image_processing_utils import BatchFeature
from transformers.image_transforms import convert_to_rgb
from transformers.image_utils import (
    ChannelDimension,
    ImageInput,
    PILImageResampling,
    infer_channel_dimension_format,
    is_valid_image,
)
from transformers.processing_utils import ImagesKwargs, Unpack
from transformers.utils import TensorType, is_torch_tensor


RESIZE_MODES = ("understanding", "editing")
URL_TIMEOUT = 60.0  # seconds

# Of transformers' general arguments, those that would contradict the size rules.
_FOREIGN_SIZE_ARGUMENTS = ("size", "crop_size", "pad_size", "do_center_crop", "do_pad")


class LLaDAUniImageProcessorKwargs(ImagesKwargs, total=False):
    r"""
    resize_mode (`str`, *optional*, defaults to `"understanding"`):
        The size rule: `"understanding"`, `"editing"`, or `None` for pictures whose sides are already multiples of
        `size_multiple`.
    patch_size (`int`, *optional*, defaults to 16):
        Side in pixels of the square that becomes one code.
    size_multiple (`int`, *optional*, defaults to 32):
        Sides of a picture are multiples of this.
    min_pixels (`int`, *optional*, defaults to `128 * 128`):
        Smallest area the understanding rule aims at.
    max_pixels (`int`, *optional*, defaults to `800 * 800`):
        Largest area the understanding rule aims at for the only picture of a sample.
    max_pixels_several (`int`, *optional*, defaults to `448 * 448`):
        The same for each of several pictures of a sample.
    editing_max_pixels (`int`, *optional*, defaults to `512 * 512`):
        Largest area of the editing rule's crops.
    editing_max_ratio (`float`, *optional*, defaults to 4.0):
        Largest ratio of the sides of the editing rule's crops.
    editing_resample (`PILImageResampling`, *optional*, defaults to Lanczos):
        Filter of the editing rule; `resample` (bicubic) is that of the understanding rule.
    """

    resize_mode: str | None
    patch_size: int
    size_multiple: int
    min_pixels: int
    max_pixels: int
    max_pixels_several: int
    editing_max_pixels: int
    editing_max_ratio: float | int
    editing_resample: int


# What the size rules, and reading, take from the processor itself.
_SETTINGS = set(LLaDAUniImageProcessorKwargs.__annotations__) - set(ImagesKwargs.__annotations__) - {"resize_mode"}
_SETTINGS |= {"do_resize", "resample", "do_convert_rgb"}


@lru_cache(maxsize=16)
def _editing_crops(max_units: int, max_ratio: float) -> tuple[tuple[int, int], ...]:
    """The (width, height) crops of the editing rule in units of `size_multiple`: a walk below `w * h = max_units`."""
    width, height, crops = max_units, 1, []
    while width > 0:
        if max(width, height) / min(width, height) <= max_ratio:
            crops.append((width, height))
        if (height + 1) * width <= max_units:
            height += 1
        else:
            width -= 1
    return tuple(crops)


class LLaDAUniImageProcessor(PilBackend):
    r"""
    Turns pictures into the patches that the image tokenizer reads: upright (EXIF), RGB, transparency on white, resized
    and centre-cropped by one of two rules, rescaled and then normalised in float32, cut into patches in raster order.

    - `resize_mode="understanding"`: sides are rounded to multiples of 32 with an area within
      [`min_pixels`, `max_pixels`], or `max_pixels_several` where a sample has several pictures; bicubic.
    - `resize_mode="editing"`: the crop of at most `editing_max_pixels` nearest to the picture's shape; Lanczos.
    - `resize_mode=None` (or `do_resize=False`): the picture is taken as it is; its sides must be multiples of 32.

    A flat list of pictures is one sample; a list of lists holds one inner list per sample. The defaults are the
    released values.

    Args:
        **kwargs ([`LLaDAUniImageProcessorKwargs`], *optional*): Any of them may also be given to a call.

    Raises:
        ValueError: if `size_multiple` is no multiple of `patch_size`, or the limits contradict each other.
    """

    valid_kwargs = LLaDAUniImageProcessorKwargs
    model_input_names = ["pixel_values", "image_grid_thw"]

    do_resize = True
    resample = PILImageResampling.BICUBIC
    do_rescale = True
    rescale_factor = 1 / 255
    do_normalize = True
    image_mean = [0.5, 0.5, 0.5]
    image_std = [0.5, 0.5, 0.5]
    do_convert_rgb = True
    resize_mode = "understanding"
    patch_size = 16
    size_multiple = 32
    min_pixels = 128 * 128
    max_pixels = 800 * 800
    max_pixels_several = 448 * 448
    editing_max_pixels = 512 * 512
    editing_max_ratio = 4.0
    editing_resample = PILImageResampling.LANCZOS

    def __init__(self, **kwargs: Unpack[LLaDAUniImageProcessorKwargs]) -> None:
        # In the released preprocessor_config.json; its `merge_size` of 2 is a slip, patches are in raster order.
        for name in ("merge_size", "temporal_patch_size"):
            kwargs.pop(name, None)
        super().__init__(**kwargs)
        if self.patch_size < 1 or self.size_multiple < 1 or self.size_multiple % self.patch_size:
            raise ValueError(
                f"`size_multiple` must be a multiple of `patch_size`, got {self.size_multiple} and {self.patch_size}."
            )
        if not 0 < self.min_pixels <= min(self.max_pixels, self.max_pixels_several):
            raise ValueError(
                f"`min_pixels` ({self.min_pixels}) must be positive and at most `max_pixels` ({self.max_pixels}) and "
                f"`max_pixels_several` ({self.max_pixels_several})."
            )
        if self.editing_max_pixels < self.size_multiple**2 or self.editing_max_ratio < 1:
            raise ValueError(
                f"`editing_max_pixels` must be at least {self.size_multiple**2} and `editing_max_ratio` at least 1, "
                f"got {self.editing_max_pixels} and {self.editing_max_ratio}."
            )

    # Sizes

    def get_resize_and_crop(
        self, height: int, width: int, resize_mode: str | None = "understanding", num_images: int = 1
    ) -> tuple[tuple[int, int], tuple[int, int]]:
        """
        The size a picture is scaled to, and the size then cut from its centre.

        Args:
            height (`int`): Height of the upright picture in pixels.
            width (`int`): Its width.
            resize_mode (`str`, *optional*, defaults to `"understanding"`): The size rule; see the class.
            num_images (`int`, defaults to 1): Pictures in the same sample; matters for understanding.

        Returns:
            `((height, width), (height, width))`: scaled, and cropped. The latter are multiples of `size_multiple`.

        Raises:
            ValueError: for an unknown rule, an empty picture, or with `resize_mode=None` sides that are no multiples.
        """
        if height < 1 or width < 1:
            raise ValueError(f"`images` must have at least one pixel, got a picture of {width} x {height}.")
        unit = self.size_multiple
        if resize_mode is None or not self.do_resize:
            if height % unit or width % unit:
                nearest = [max(unit, round(side / unit) * unit) for side in (width, height)]
                raise ValueError(
                    f"`images`: with `resize_mode=None` both sides must be multiples of {unit}, got {width} x "
                    f"{height}; the nearest valid size is {nearest[0]} x {nearest[1]}."
                )
            return (height, width), (height, width)
        if resize_mode == "understanding":
            target_height, target_width = self._understanding_target(height, width, num_images)
            scale = max(target_height / height, target_width / width)
            scaled = round(height * scale), round(width * scale)
            # The side that had to be stretched further may hold more than its target; what fits is kept.
            return scaled, (
                max(scaled[0] // unit * unit, target_height),
                max(scaled[1] // unit * unit, target_width),
            )
        if resize_mode == "editing":
            crops = _editing_crops(self.editing_max_pixels // unit**2, float(self.editing_max_ratio))

            def likeness(crop: tuple[int, int]) -> tuple[float, int, int]:
                across, down = crop[0] * unit / width, crop[1] * unit / height
                return min(across, down) / max(across, down), *crop

            crop_width, crop_height = (side * unit for side in max(crops, key=likeness))
            scale = max(crop_width / width, crop_height / height)
            return (round(height * scale), round(width * scale)), (crop_height, crop_width)
        raise ValueError(f"`resize_mode` must be one of {', '.join(RESIZE_MODES)} or None, got {resize_mode!r}.")

    def _understanding_target(self, height: int, width: int, num_images: int) -> tuple[int, int]:
        unit = self.size_multiple
        max_pixels = self.max_pixels if num_images == 1 else self.max_pixels_several
        target_height = max(unit, round(height / unit) * unit)
        target_width = max(unit, round(width / unit) * unit)
        if target_height * target_width > max_pixels:
            shrink = math.sqrt(height * width / max_pixels)
            target_height = max(unit, math.floor(height / shrink / unit) * unit)
            target_width = max(unit, math.floor(width / shrink / unit) * unit)
        elif target_height * target_width < self.min_pixels:
            grow = math.sqrt(self.min_pixels / (height * width))
            target_height = math.ceil(height * grow / unit) * unit
            target_width = math.ceil(width * grow / unit) * unit
        return target_height, target_width

    def get_grid(
        self, height: int, width: int, resize_mode: str | None = "understanding", num_images: int = 1
    ) -> tuple[int, int]:
        """The grid (H, W) of codes of a picture; arguments and errors as in [`get_resize_and_crop`]."""
        _, (crop_height, crop_width) = self.get_resize_and_crop(height, width, resize_mode, num_images)
        return crop_height // self.patch_size, crop_width // self.patch_size

    def get_number_of_image_patches(self, height: int, width: int, images_kwargs: dict | None = None) -> int:
        """The number of codes of a picture of this size. Serving engines call it to plan without the picture."""
        resize_mode = (images_kwargs or {}).get("resize_mode", self.resize_mode)
        return math.prod(self.get_grid(height, width, resize_mode))

    def resize_and_crop(
        self,
        image: Image.Image,
        resize_mode: str | None = "understanding",
        num_images: int = 1,
        resample: int | None = None,
    ) -> Image.Image:
        """
        Scales and crops one picture as a call would, for whoever needs to see, or mask, what the model sees.

        Args:
            image (`PIL.Image.Image`): Of any mode; upright.
            resize_mode (`str`, *optional*, defaults to `"understanding"`): The size rule; see the class.
            num_images (`int`, defaults to 1): Pictures in the same sample.
            resample (`int`, *optional*): A filter other than the rule's own, e.g. nearest for a mask.

        Returns:
            `PIL.Image.Image`: of the same mode.
        """
        scaled, (height, width) = self.get_resize_and_crop(image.height, image.width, resize_mode, num_images)
        if resample is None:
            resample = self.editing_resample if resize_mode == "editing" else self.resample
        if scaled != (image.height, image.width):
            image = image.resize((scaled[1], scaled[0]), resample=resample)
        left, top = (image.width - width) // 2, (image.height - height) // 2
        return image.crop((left, top, left + width, top + height))

    # Reading pictures

    def fetch_images(self, image_url_or_urls: Any, input_data_format: str | None = None) -> Any:
        """
        Reads pictures: upright, RGB, transparency on white.

        Args:
            image_url_or_urls: A PIL picture, numpy array or torch tensor (height and width, with 1, 3 or 4 channels
                first or last; uint8, other numbers in 0..255, or floats in 0..1; a 4-D one is a list of pictures),
                URL, path, `data:` URI or base64 string, or a (nested) list of these.
            input_data_format (`str`, *optional*): `"channels_first"` or `"channels_last"` for arrays where the
                shape does not tell.

        Returns:
            `PIL.Image.Image`, or a list nested as the input was.

        Raises:
            TypeError: if `images` holds something else.
            ValueError: if a picture cannot be read, or its values or shape are no picture's.
        """
        images = image_url_or_urls
        if isinstance(images, list | tuple):
            return [self.fetch_images(image, input_data_format) for image in images]
        if isinstance(images, str | os.PathLike):
            source, images = self._name(images), self._open(images)
        else:
            source = "a picture"
        if isinstance(images, Image.Image):
            return self._upright_rgb(images, source)
        if not is_valid_image(images):
            raise TypeError(
                "`images` must be PIL pictures, numpy arrays, torch tensors, paths, URLs or base64 strings, or lists "
                f"of these, got {type(images).__name__}."
            )
        array = images.detach().cpu() if is_torch_tensor(images) else images
        if is_torch_tensor(array):
            array = (array.float() if array.is_floating_point() else array).numpy()
        if array.ndim == 4:
            return [self._from_array(picture, input_data_format) for picture in array]
        return self._from_array(array, input_data_format)

    @staticmethod
    def _name(source: str | os.PathLike) -> str:
        text = os.fspath(source)
        return repr(text if len(text) <= 100 else text[:97] + "...")

    def _open(self, source: str | os.PathLike) -> Image.Image:
        text = os.fspath(source)
        try:
            if text.startswith(("http://", "https://")):
                response = httpx.get(text, timeout=URL_TIMEOUT, follow_redirects=True)
                response.raise_for_status()
                return Image.open(BytesIO(response.content))
            if os.path.isfile(text):
                return Image.open(text)
            encoded = text.split(",", 1)[1] if text.startswith("data:image/") else text
            return Image.open(BytesIO(base64.b64decode(encoded, validate=True)))
        except (binascii.Error, UnicodeEncodeError) as error:
            raise ValueError(
                f"`images`: {self._name(source)} is no existing file, no http(s) URL and no base64 string."
            ) from error
        except Exception as error:  # each format, and the network, has errors of its own
            raise ValueError(f"`images`: could not read {self._name(source)} as a picture: {error}") from error

    def _upright_rgb(self, image: Image.Image, source: str = "a picture") -> Image.Image:
        try:
            image = ImageOps.exif_transpose(image)
            if not self.do_convert_rgb:
                if image.mode != "RGB":
                    raise ValueError(f"its mode is {image.mode}, and `do_convert_rgb` is off")
                return image
            if image.mode.startswith("I;16"):  # 16 bits of grey, which `convert` would clip
                image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
            return Image.fromarray(convert_to_rgb(image, return_numpy=True))
        except Exception as error:  # pictures are decoded late: a corrupt file shows here
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
        if array.dtype == bool:
            array = array * np.uint8(255)
        elif array.dtype != np.uint8:
            low, high = float(array.min()), float(array.max())
            if not (low >= 0 and high <= 255):  # also true of NaN
                raise ValueError(f"`images`: values must lie in 0..255 (or 0..1), got {low} to {high}.")
            if np.issubdtype(array.dtype, np.floating):
                array = np.rint(array * 255 if high <= 1 else array)
            array = array.astype(np.uint8)
        if array.shape[-1] not in (1, 3, 4):
            raise ValueError(f"`images`: an array must have 1, 3 or 4 channels, got {array.shape[-1]}.")
        array = array[..., 0] if array.shape[-1] == 1 else array
        return self._upright_rgb(Image.fromarray(np.ascontiguousarray(array)))

    # Pictures to patches

    def preprocess(self, images: ImageInput, **kwargs: Unpack[LLaDAUniImageProcessorKwargs]) -> BatchFeature:
        """
        Args:
            images: One picture, a list (one sample), or a list of lists (one per sample; may be empty). Anything
                [`fetch_images`] reads.
            **kwargs: `resize_mode`, `return_tensors` (`"pt"`, `"np"` or `None` for numpy arrays) and any attribute of
                the processor.

        Returns:
            [`BatchFeature`]: `pixel_values` (num_patches, 3 * patch_size * patch_size) float32, the patches of all
            pictures one after the other, each in raster order and its values channel by channel; `image_grid_thw`
            (num_images, 3) int64 with 1, H, W in patches.

        Raises:
            TypeError, ValueError: as in [`fetch_images`] and [`get_resize_and_crop`]; also if there is no picture.
        """
        for name in _FOREIGN_SIZE_ARGUMENTS:
            if kwargs.get(name) is not None:
                raise ValueError(
                    f"`{name}` has no place here: sizes follow `resize_mode` and the attributes of its rule."
                )
        processor, kwargs = self.configured(**kwargs)
        if processor is not self:
            return processor.preprocess(images, **kwargs)
        return super().preprocess(images, **kwargs)

    def configured(self, **kwargs: Any) -> tuple["LLaDAUniImageProcessor", dict[str, Any]]:
        """
        Splits the arguments of a call into those that change what the size rules and reading do, and the rest.

        Returns:
            A processor with the former (this one if there are none), and the latter.

        Raises:
            ValueError: as the constructor does.
        """
        changed = {name: value for name, value in kwargs.items() if name in _SETTINGS and value is not None}
        rest = {name: value for name, value in kwargs.items() if name not in _SETTINGS}
        return (type(self)(**{**self.to_dict(), **changed}) if changed else self), rest

    def _validate_preprocess_kwargs(self, do_resize: bool | None = None, **kwargs: Any) -> None:
        super()._validate_preprocess_kwargs(**kwargs)  # which would ask for a `size`

    def _preprocess_image_like_inputs(self, images: Any, **kwargs: Any) -> BatchFeature:
        pictures = self.fetch_images(images, kwargs["input_data_format"])
        if isinstance(pictures, Image.Image):
            pictures = [pictures]
        samples = pictures if any(isinstance(entry, list) for entry in pictures) else [pictures]
        if any(not isinstance(sample, list) for sample in samples) or any(
            not isinstance(picture, Image.Image) for sample in samples for picture in sample
        ):
            raise ValueError("`images` must be one list of pictures, or one list of lists with a list per sample.")
        if not any(samples):
            raise ValueError("`images` holds no picture.")
        return self._preprocess(samples, **kwargs)

    def _preprocess(
        self,
        images: Sequence[Sequence[Image.Image]],
        resize_mode: str | None,
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean: float | Sequence[float],
        image_std: float | Sequence[float],
        patch_size: int,
        return_tensors: str | TensorType | None,
        **kwargs: Any,
    ) -> BatchFeature:
        patches, grids = [], []
        for sample in images:
            for picture in sample:
                picture = self.resize_and_crop(picture, resize_mode, len(sample))
                values = np.moveaxis(np.asarray(picture), -1, 0)  # (3, height, width)
                # One step after the other, in float32: fused arithmetic moves codes that lie near a boundary.
                values = self.rescale(values, rescale_factor) if do_rescale else values.astype(np.float32)
                if do_normalize:
                    values = self.normalize(values, image_mean, image_std)
                height, width = picture.height // patch_size, picture.width // patch_size
                values = values.reshape(3, height, patch_size, width, patch_size).transpose(1, 3, 0, 2, 4)
                patches.append(values.reshape(height * width, -1).astype(np.float32, copy=False))
                grids.append((1, height, width))
        data = {"pixel_values": np.concatenate(patches), "image_grid_thw": np.array(grids, dtype=np.int64)}
        return BatchFeature(data, tensor_type=return_tensors)


__all__ = ["LLaDAUniImageProcessor"]
