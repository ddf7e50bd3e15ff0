"""Image processor of LLaDA2.0-Uni: images of any kind and size to 16 x 16 patches, with PIL and numpy only."""

import math
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image
from transformers.image_processing_backends import PilBackend
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import PILImageResampling
from transformers.processing_utils import ImagesKwargs, Unpack

from .image_reading import ImageReader, check_rescaling


RESIZE_MODES = ("understanding", "editing")

# An image of which scaling would make so many times what is kept is cropped first. Others are scaled first, as the
# released code does; the two differ in the last bit.
_LARGEST_WASTE = 16

# Of transformers' general arguments, those that would contradict the size rules.
_FOREIGN_SIZE_ARGUMENTS = ("size", "crop_size", "pad_size", "do_center_crop", "do_pad")


class LLaDAUniImageProcessorKwargs(ImagesKwargs, total=False):
    r"""
    resize_mode (`str`, *optional*, defaults to `"understanding"`):
        The size rule: `"understanding"`, `"editing"`, or `None` for images whose sides are already multiples of
        `size_multiple`.
    patch_size (`int`, *optional*, defaults to 16):
        Side in pixels of the square that becomes one code.
    size_multiple (`int`, *optional*, defaults to 32):
        Sides of an image are multiples of this.
    min_pixels (`int`, *optional*, defaults to `128 * 128`):
        Smallest area the understanding rule aims at.
    max_pixels (`int`, *optional*, defaults to `800 * 800`):
        Largest area of the understanding rule for the only image of a sample.
    max_pixels_several (`int`, *optional*, defaults to `448 * 448`):
        The same for each of several images of a sample, where it is less.
    max_pixels_scaled (`int`, *optional*):
        Largest area by either rule of an image whose sides are not multiples of `size_multiple` within the other
        limits, and which has to be scaled anyway. For a checkpoint that knows larger images as it draws them, part by
        part, and all others in one size. Default: any.
    editing_max_pixels (`int`, *optional*, defaults to `512 * 512`):
        Largest area of the editing rule's crops.
    editing_max_ratio (`float`, *optional*, defaults to 4.0):
        Largest ratio of the sides of the editing rule's crops.
    max_side (`int`, *optional*):
        Longest side by either rule, in pixels; of a longer image the ends are left out. Default: any.
    editing_upscales (`bool`, *optional*, defaults to `True`):
        Whether the editing rule makes small images as large as its largest crops. Otherwise an image keeps its area,
        rounded to whole units of `size_multiple`, up to `editing_max_pixels`.
    drawn_patch_size (`int`, *optional*):
        Side in pixels of what the decoder makes of a code; a multiple of `patch_size`, by default twice that.
    default_side (`int`, *optional*):
        Side in pixels of an image that is drawn where no size is asked for. By default that of the largest square that
        the editing rule leaves, as it is drawn.
    editing_resample (`PILImageResampling`, *optional*, defaults to Lanczos):
        Filter of the editing rule; `resample` (bicubic) is that of the understanding rule.
    max_image_pixels (`int`, *optional*, defaults to 178,956,970):
        Larger images are refused before they are decoded; the default is where PIL refuses (it warns at half of it).
    max_image_bytes (`int`, *optional*, defaults to `2**28`):
        Larger files, downloads and base64 strings are refused.
    url_timeout (`float`, *optional*, defaults to 60.0):
        Seconds that a download may take.
    """

    resize_mode: str | None
    patch_size: int
    size_multiple: int
    min_pixels: int
    max_pixels: int
    max_pixels_several: int
    max_side: int | None
    max_pixels_scaled: int | None
    editing_max_pixels: int
    editing_max_ratio: float | int
    editing_upscales: bool
    drawn_patch_size: int | None
    default_side: int | None
    editing_resample: int
    max_image_pixels: int
    max_image_bytes: int
    url_timeout: float | int


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
    Turns images into the patches that the image tokenizer reads: upright (EXIF), RGB, transparency on white, resized
    and centre-cropped by one of two rules, rescaled and then normalised in float32, cut into patches in raster order.

    - `resize_mode="understanding"`: sides are rounded to multiples of 32 with an area within
      [`min_pixels`, `max_pixels`], or `max_pixels_several` where a sample has several images; bicubic.
    - `resize_mode="editing"`: the crop of at most `editing_max_pixels` nearest to the image's shape, the largest of
      that shape unless `editing_upscales` is `False`; Lanczos.
    - `resize_mode=None` (or `do_resize=False`): the image is taken as it is; its sides must be multiples of 32.

    A call takes one image, a list (one sample), or a list of lists (one per sample; may be empty) of anything
    [`fetch_images`] reads, and returns a [`BatchFeature`]: `pixel_values` (num_patches, 3 * patch_size * patch_size)
    float32, the patches of all images one after the other, each in raster order and its values channel by channel;
    `image_grid_thw` (num_images, 3) int64 with 1, H, W in patches. `return_tensors` is `"pt"`, `"np"` or `None` for
    numpy arrays. It raises what [`fetch_images`] and [`get_resize_and_crop`] raise, and ValueError if there is no
    image. The defaults are the released values.

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
    max_side = None
    max_pixels_scaled = None
    editing_max_pixels = 512 * 512
    editing_max_ratio = 4.0
    editing_upscales = True
    drawn_patch_size = None
    default_side = None
    editing_resample = PILImageResampling.LANCZOS
    max_image_pixels = 178_956_970
    max_image_bytes = 2**28
    url_timeout = 60.0

    def __init__(self, **kwargs: Unpack[LLaDAUniImageProcessorKwargs]) -> None:
        # In the released preprocessor_config.json; its `merge_size` of 2 is a slip, patches are in raster order.
        slips = ("merge_size", "temporal_patch_size")
        settings: dict[str, Any] = {name: value for name, value in kwargs.items() if name not in slips}
        super().__init__(**settings)
        if self.patch_size < 1 or self.size_multiple < 1 or self.size_multiple % self.patch_size:
            raise ValueError(
                f"`size_multiple` must be a multiple of `patch_size`, got {self.size_multiple} and {self.patch_size}."
            )
        if not 0 < self.min_pixels <= min(self.max_pixels, self.max_pixels_several):
            raise ValueError(
                f"`min_pixels` ({self.min_pixels}) must be positive and at most `max_pixels` ({self.max_pixels}) and "
                f"`max_pixels_several` ({self.max_pixels_several})."
            )
        if self.max_side is not None and self.max_side < self.size_multiple:
            raise ValueError(f"`max_side` must be at least {self.size_multiple}, got {self.max_side}.")
        least = max(self.min_pixels, self.size_multiple**2)
        if self.max_pixels_scaled is not None and self.max_pixels_scaled < least:
            raise ValueError(f"`max_pixels_scaled` must be at least {least}, got {self.max_pixels_scaled}.")
        if self.editing_max_pixels < self.size_multiple**2 or self.editing_max_ratio < 1:
            raise ValueError(
                f"`editing_max_pixels` must be at least {self.size_multiple**2} and `editing_max_ratio` at least 1, "
                f"got {self.editing_max_pixels} and {self.editing_max_ratio}."
            )
        if self.pixels_per_code < 1 or self.pixels_per_code % self.patch_size:
            raise ValueError(
                f"`drawn_patch_size` must be a multiple of `patch_size` ({self.patch_size}), got "
                f"{self.drawn_patch_size}."
            )
        if self.default_side is not None and (self.default_side < 1 or self.default_side % self.pixels_per_code):
            raise ValueError(f"`default_side` must be a multiple of {self.pixels_per_code}, got {self.default_side}.")
        for name in ("max_image_pixels", "max_image_bytes", "url_timeout"):
            if not getattr(self, name) > 0:
                raise ValueError(f"`{name}` must be positive, got {getattr(self, name)}.")

    # Sizes

    @property
    def pixels_per_code(self) -> int:
        """Side in pixels of what the decoder makes of a code."""
        return 2 * self.patch_size if self.drawn_patch_size is None else self.drawn_patch_size

    def get_resize_and_crop(
        self, height: int, width: int, resize_mode: str | None = "understanding", num_images: int = 1
    ) -> tuple[tuple[int, int], tuple[int, int]]:
        """
        The size an image is scaled to, and the size then cut from its centre.

        Args:
            height (`int`): Height of the upright image in pixels.
            width (`int`): Its width.
            resize_mode (`str`, *optional*, defaults to `"understanding"`): The size rule; see the class.
            num_images (`int`, defaults to 1): Images in the same sample; matters for understanding.

        Returns:
            `((height, width), (height, width))`: scaled, and cropped. The latter are multiples of `size_multiple`.

        Raises:
            ValueError: for an unknown rule, an empty image, or with `resize_mode=None` sides that are no multiples.
        """
        if height < 1 or width < 1:
            raise ValueError(f"`images` must have at least one pixel, got one of {width} x {height}.")
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
            largest_area = self._largest_area(height, width, num_images)
            target_height, target_width = self._understanding_target(height, width, largest_area)
            scale = max(target_height / height, target_width / width)
            scaled = round(height * scale), round(width * scale)
            # The side that had to be stretched further may hold more than its target; what fits is kept.
            crop_height = max(scaled[0] // unit * unit, target_height)
            crop_width = max(scaled[1] // unit * unit, target_width)
            # Of a strip that fits in no other way, the ends are left out.
            largest = max(1, largest_area // unit**2)
            rows, columns = crop_height // unit, crop_width // unit
            if rows * columns > largest:
                rows, columns = min(rows, max(1, largest // columns)), min(columns, max(1, largest // rows))
            if self.max_side is not None:
                rows, columns = min(rows, self.max_side // unit), min(columns, self.max_side // unit)
            return scaled, (rows * unit, columns * unit)
        if resize_mode == "editing":
            max_units = self._limited(height, width, self.editing_max_pixels) // unit**2
            if not self.editing_upscales:
                max_units = min(max_units, max(1, round(height * width / unit**2)))
            crops = _editing_crops(max_units, float(self.editing_max_ratio))
            if self.max_side is not None:
                most = self.max_side // unit
                crops = tuple((min(width, most), min(height, most)) for width, height in crops)

            def likeness(crop: tuple[int, int]) -> tuple[float, int, int]:
                across, down = crop[0] * unit / width, crop[1] * unit / height
                return min(across, down) / max(across, down), *crop

            crop_width, crop_height = (side * unit for side in max(crops, key=likeness))
            scale = max(crop_width / width, crop_height / height)
            return (round(height * scale), round(width * scale)), (crop_height, crop_width)
        raise ValueError(f"`resize_mode` must be one of {', '.join(RESIZE_MODES)} or None, got {resize_mode!r}.")

    def _largest_area(self, height: int, width: int, num_images: int) -> int:
        area = self.max_pixels if num_images == 1 else min(self.max_pixels, self.max_pixels_several)
        return self._limited(height, width, area)

    def _limited(self, height: int, width: int, area: int) -> int:
        """The largest area for an image, which is less if it has to be scaled."""
        unit, most = self.size_multiple, self.max_side or max(height, width)
        fits = not (height % unit or width % unit) and height * width <= area and max(height, width) <= most
        return area if fits or self.max_pixels_scaled is None else min(area, self.max_pixels_scaled)

    def _understanding_target(self, height: int, width: int, max_pixels: int) -> tuple[int, int]:
        unit = self.size_multiple
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
        """The grid (H, W) of codes of an image; arguments and errors as in [`get_resize_and_crop`]."""
        _, (crop_height, crop_width) = self.get_resize_and_crop(height, width, resize_mode, num_images)
        return crop_height // self.patch_size, crop_width // self.patch_size

    def resize_and_crop(
        self,
        image: Image.Image,
        resize_mode: str | None = "understanding",
        num_images: int = 1,
        resample: int | None = None,
        upscale: int = 1,
    ) -> Image.Image:
        """
        Scales and crops one image as a call would, for whoever needs to see, or mask, what the model sees.

        Args:
            image (`PIL.Image.Image`): Of any mode; upright.
            resize_mode (`str`, *optional*, defaults to `"understanding"`): The size rule; see the class.
            num_images (`int`, defaults to 1): Images in the same sample.
            resample (`int`, *optional*): A filter other than the rule's own, e.g. nearest for a mask.
            upscale (`int`, defaults to 1): So many times the sides, for what decoders draw.

        Returns:
            `PIL.Image.Image`: of the same mode.
        """
        sizes = self.get_resize_and_crop(image.height, image.width, resize_mode, num_images)
        scaled, (height, width) = ((upscale * height, upscale * width) for height, width in sizes)
        if resample is None:
            resample = self.editing_resample if resize_mode == "editing" else self.resample
        left, top = (scaled[1] - width) // 2, (scaled[0] - height) // 2
        if scaled[0] * scaled[1] > _LARGEST_WASTE * height * width:
            down, across = image.height / scaled[0], image.width / scaled[1]
            right, bottom = (left + width) * across, (top + height) * down
            box = (left * across, top * down, min(right, image.width), min(bottom, image.height))
            return image.resize((width, height), resample=resample, box=box)
        if scaled != (image.height, image.width):
            image = image.resize((scaled[1], scaled[0]), resample=resample)
        return image.crop((left, top, left + width, top + height))

    def as_drawn(self, image: Image.Image) -> Image.Image:
        """What the decoder should make of an image's codes: the image by the rule of editing, as large as it draws."""
        return self.resize_and_crop(image, "editing", upscale=self.pixels_per_code // self.patch_size)

    # Reading images

    def fetch_images(self, image_url_or_urls: Any, input_data_format: str | None = None) -> Any:
        """
        Reads images: upright, RGB, transparency on white. PIL's 16-bit modes are scaled to 8 bits; of its modes "I"
        and "F", which have no range of their own, values in 0..255, in 0..65535 ("I") and in 0..1 ("F") are known.

        Args:
            image_url_or_urls: A PIL image, numpy array or torch tensor (height and width, with 1, 3 or 4 channels
                first or last; uint8, other numbers in 0..255, or floats in 0..1; a 4-D one is a list of images),
                URL, path, `data:` URI or base64 string, a list of these, or a list of lists.
            input_data_format (`str`, *optional*): `"channels_first"` or `"channels_last"` for arrays where the
                shape does not tell.

        Returns:
            `PIL.Image.Image`, or a list nested as the input was.

        Raises:
            TypeError: if `images` holds something else.
            ValueError: if an image cannot be read, is larger than `max_image_pixels` or `max_image_bytes`, or its
                values or shape are no image's.
        """
        images = image_url_or_urls
        reader = ImageReader(self.max_image_pixels, self.max_image_bytes, self.url_timeout, self.do_convert_rgb)
        if not isinstance(images, list | tuple):
            return reader.read(images, input_data_format)
        return [
            [reader.read(image, input_data_format) for image in entry]
            if isinstance(entry, list | tuple)
            else reader.read(entry, input_data_format)
            for entry in images
        ]

    # Images to patches

    def configured(self, **kwargs: Any) -> tuple["LLaDAUniImageProcessor", dict[str, Any]]:
        """
        Splits the arguments of a call into those that change what the size rules and reading do, and the rest.

        Returns:
            A processor with the former (this one if there are none), and the latter.

        Raises:
            ValueError: as the constructor does.
        """
        given = {name: value for name, value in kwargs.items() if name in _SETTINGS and value is not None}
        rest = {name: value for name, value in kwargs.items() if name not in _SETTINGS}
        if all(value == getattr(self, name) for name, value in given.items()):
            return self, rest
        return type(self)(**{**self.to_dict(), **given}), rest

    def _validate_preprocess_kwargs(self, *args: Any, **kwargs: Any) -> None:
        for name in _FOREIGN_SIZE_ARGUMENTS:
            if kwargs.get(name) is not None:
                raise ValueError(
                    f"`{name}` has no place here: sizes follow `resize_mode` and the attributes of its rule."
                )
        super()._validate_preprocess_kwargs(*args, **{**kwargs, "do_resize": None})  # which would ask for a `size`

    def _preprocess_image_like_inputs(self, images: Any, *args: Any, **kwargs: Any) -> BatchFeature:
        """transformers' hook for all that is between the checked arguments of a call and its result."""
        processor, settings = self.configured(**kwargs)
        check_rescaling(images, settings["do_rescale"])
        fetched = processor.fetch_images(images, settings["input_data_format"])
        if isinstance(fetched, Image.Image):
            fetched = [fetched]
        samples = fetched if any(isinstance(entry, list) for entry in fetched) else [fetched]
        if any(not isinstance(sample, list) for sample in samples) or any(
            not isinstance(image, Image.Image) for sample in samples for image in sample
        ):
            raise ValueError("`images` must be one list of images, or one list of lists with a list per sample.")
        if not any(samples):
            raise ValueError("`images` holds no image.")
        patches, grids = [], []
        for sample in samples:
            for image in sample:
                image = processor.resize_and_crop(image, settings["resize_mode"], len(sample))
                image_patches, grid = processor._patches(image, settings)
                patches.append(image_patches)
                grids.append((1, *grid))
        data = {"pixel_values": np.concatenate(patches), "image_grid_thw": np.array(grids, dtype=np.int64)}
        return BatchFeature(data, tensor_type=settings["return_tensors"])

    def _patches(self, image: Image.Image, settings: dict[str, Any]) -> tuple[np.ndarray, tuple[int, int]]:
        """The values (H * W, 3 * patch_size * patch_size) of an image's patches, and (H, W)."""
        values = np.moveaxis(np.asarray(image), -1, 0)  # (3, height, width)
        # One step after the other, in float32: fused arithmetic moves codes that lie near a boundary.
        if settings["do_rescale"]:
            values = self.rescale(values, settings["rescale_factor"])
        else:
            values = values.astype(np.float32)
        if settings["do_normalize"]:
            values = self.normalize(values, settings["image_mean"], settings["image_std"])
        side = self.patch_size
        height, width = image.height // side, image.width // side
        values = values.reshape(3, height, side, width, side).transpose(1, 3, 0, 2, 4)
        return values.reshape(height * width, -1).astype(np.float32, copy=False), (height, width)
