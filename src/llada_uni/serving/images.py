"""`/v1/images/generations` and `/v1/images/edits`."""

import asyncio
import random
import time
from typing import Any, Literal

import PIL.Image
from fastapi import APIRouter, Request
from pydantic import Field, ValidationError
from starlette.datastructures import UploadFile

from .chat_request import Strict
from .clients import while_connected
from .engine import Engine
from .errors import RequestError, check_model, refusal_of, refusal_of_failure
from .image_inputs import encode_image, read_image, read_size
from .image_jobs import ImageJob
from .settings import ServerSettings


class ImageRequest(Strict):
    """
    OpenAI's request, as far as this model has what it asks for, and settings of the pipeline's call. What asks for
    nothing, such as a quality of "auto", may stand there.
    """

    model: str | None = None
    prompt: str = Field(min_length=1, max_length=32_000)
    n: int = Field(1, ge=1)
    size: str = "auto"
    response_format: Literal["b64_json"] = "b64_json"
    output_format: Literal["png", "jpeg", "webp"] = "png"
    seed: int | None = Field(None, ge=0, lt=2**63)
    guidance_scale: float | None = Field(None, ge=0, le=100)
    num_inference_steps: int | None = Field(None, ge=1, le=1000)
    num_steps_per_block: int | None = Field(None, ge=1, le=1024)
    user: str | None = None
    stream: bool = False
    partial_images: int = Field(0, ge=0, le=3)
    quality: Literal["auto"] = "auto"
    background: Literal["auto", "opaque"] = "auto"
    moderation: Literal["auto"] = "auto"

    def job(self, settings: ServerSettings, images: list[PIL.Image.Image], mask: PIL.Image.Image | None) -> ImageJob:
        """
        Raises:
            RequestError: for a size or a number of images that this server does not make.
        """
        if self.model is not None:
            check_model(self.model, settings)
        for name in ("stream", "partial_images"):
            if getattr(self, name):
                raise RequestError(f"`{name}`: images come whole here, when they are finished.", name)
        if self.n > settings.max_images:
            raise RequestError(f"`n` may be {settings.max_images} at most, got {self.n}.", "n")
        call: dict[str, Any] = {}
        if (size := read_size(self.size, settings)) is not None:
            call["height"], call["width"] = size
        for name in ("guidance_scale", "num_inference_steps", "num_steps_per_block"):
            if getattr(self, name) is not None:
                call[name] = getattr(self, name)
        # Several images of one prompt would be the same one, but for the decoder's noise, were their codes not drawn.
        if self.n > 1 or self.seed is not None:
            call["generation_kwargs"] = {"do_sample": True}
        first = random.getrandbits(62) if self.seed is None else self.seed
        return ImageJob(self.prompt, [first + index for index in range(self.n)], images, mask, settings=call)


def image_router(engine: Engine, settings: ServerSettings) -> APIRouter:
    router = APIRouter()

    async def wait_for(job: ImageJob) -> list[PIL.Image.Image]:
        try:
            return await asyncio.wrap_future(job.result)
        except Exception as error:
            raise refusal_of_failure(error, "prompt") from error

    async def answer(
        request: Request, body: ImageRequest, images: list[PIL.Image.Image], mask: PIL.Image.Image | None
    ) -> Any:
        job = body.job(settings, images, mask)
        engine.submit(job)
        made = await while_connected(request, job, wait_for(job))
        encoded = await asyncio.to_thread(lambda: [encode_image(image, body.output_format) for image in made])
        return {
            "created": int(time.time()),
            "data": [{"b64_json": content} for content in encoded],
            "output_format": body.output_format,
        }

    @router.post("/v1/images/generations")
    async def generations(body: ImageRequest, request: Request) -> Any:
        return await answer(request, body, [], None)

    @router.post("/v1/images/edits")
    async def edits(request: Request) -> Any:
        if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
            raise RequestError("Edits are sent as multipart/form-data, with the files `image` and `mask`.", status=415)
        fields: dict[str, Any] = {}
        files: list[tuple[str, bytes]] = []
        mask_file: bytes | None = None
        try:
            async with request.form(max_files=settings.max_images + 1, max_fields=64) as form:
                for name, value in form.multi_items():
                    if not isinstance(value, UploadFile):
                        fields[name] = value
                    elif name in ("image", "image[]"):
                        files.append((name, await value.read()))
                    elif name == "mask":
                        mask_file = await value.read()
                    else:
                        raise RequestError(f"`{name}` is not known to this server.", name, code="unknown_parameter")
        except UnicodeError as error:  # of a charset that is none
            raise RequestError("The form's charset cannot be read.") from error
        if not files:
            raise RequestError("`image` is missing: the file to edit.", "image")
        if len(files) > settings.max_images:
            raise RequestError(f"`image` may come {settings.max_images} times at most.", "image")
        try:
            body = ImageRequest.model_validate(fields)
        except ValidationError as error:
            raise refusal_of(error.errors(), ImageRequest.model_fields) from error

        def read() -> tuple[list[PIL.Image.Image], PIL.Image.Image | None]:
            images = [read_image(content, name, settings) for name, content in files]
            mask = None if mask_file is None else _mask(read_image(mask_file, "mask", settings), images[0].size)
            return images, mask

        images, mask = await asyncio.to_thread(read)
        return await answer(request, body, images, mask)

    return router


def _mask(image: PIL.Image.Image, size: tuple[int, int]) -> PIL.Image.Image:
    """
    White where the image is to be made anew: for OpenAI's clients that is where the mask is transparent; where nothing
    is, where it is white.
    """
    if image.size != size:
        raise RequestError(f"`mask` is {image.size}, but `image` is {size}: they must be of one size.", "mask")
    transparent = image.convert("RGBA").getchannel("A").point(lambda alpha: 255 if alpha < 128 else 0)
    return transparent if transparent.getbbox() else image.convert("L")
