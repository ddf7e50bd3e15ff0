"""The decoder's thread: from codes to pixels, beside the threads that make the codes."""

import logging
import threading
from collections.abc import Sequence
from functools import partial

import torch

from diffusers_llada_uni import LLaDAUniPipeline
from diffusers_llada_uni.code_decoding import CodeDecodingSettings

from .image_jobs import CodesOfImage
from .jobs import EngineStopped


logger = logging.getLogger(__name__)


class NobodyWaits(Exception):
    """Whoever asked for the images of a batch has left."""


def _stop_if_nobody_waits(images: Sequence[CodesOfImage], *_: object) -> dict[str, object]:
    """To be called after each step of a decoding."""
    if all(image.job.is_done for image in images):
        raise NobodyWaits
    return {}


class PixelWorker:
    """
    Decodes what others hand over, one batch after the other. One batch may wait: who brings the next is held up, so
    that codes do not pile up before a decoder that is slower than what makes them.

    Args:
        pipe ([`LLaDAUniPipeline`]): Its decoder is this worker's alone.

    Attributes:
        num_images: Images so far.
    """

    def __init__(self, pipe: LLaDAUniPipeline):
        self.pipe, self.num_images = pipe, 0
        self._changed = threading.Condition()
        self._waiting: tuple[Sequence[CodesOfImage], CodeDecodingSettings] | None = None
        self._is_closed = False

    def put(self, images: Sequence[CodesOfImage], settings: CodeDecodingSettings) -> None:
        """
        Hands over codes of one grid.

        Raises:
            EngineStopped: after [`close`].
        """
        with self._changed:
            self._changed.wait_for(lambda: self._waiting is None or self._is_closed)
            if self._is_closed:
                raise EngineStopped("The decoder has ended.")
            self._waiting = images, settings
            self._changed.notify_all()

    def close(self) -> None:
        """Nothing more will come; what waits is still to be decoded."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def run(self) -> None:
        """Until it is closed."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting is not None or self._is_closed)
                if self._waiting is None:
                    return
                (images, settings), self._waiting = self._waiting, None
                self._changed.notify_all()
            self._decode(images, settings)

    def _decode(self, images: Sequence[CodesOfImage], settings: CodeDecodingSettings) -> None:
        images = [image for image in images if not image.job.is_done]
        if not images:
            return
        try:
            codes = torch.stack([image.codes for image in images])
            # Copies: who is decoded a second time gets the noise of the first.
            generators = [image.generator.clone_state() for image in images]
            decoded = self.pipe.code_decoder.decode(
                codes, settings, generators, on_step_end=partial(_stop_if_nobody_waits, images)
            )
        except NobodyWaits:
            return
        except Exception as error:
            if len(images) > 1:  # one is at fault, or there are too many
                logger.warning("A batch of %d images has failed, and is decoded one by one: %s", len(images), error)
                for image in images:
                    self._decode([image], settings)
            else:
                images[0].job.fail(error)
            return
        self.num_images += len(images)
        for image, pixels in zip(images, decoded, strict=True):
            image.job.take(image.place, pixels)
