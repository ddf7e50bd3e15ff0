"""A pipeline under ComfyUI's memory management."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import nn

from . import host


if TYPE_CHECKING:
    from diffusers_llada_uni import LLaDAUniPipeline
    from transformers_llada_uni import LLaDAUniForConditionalGeneration

# Beside the weights; docs/performance.md has the measurements, of a card and 1024 x 1024.
BYTES_PER_TOKEN = 256 * 2**10  # keys, values and buffers of recorded steps: 0.25 GB for 1,024 guided codes
BYTES_PER_PIXEL = 2800  # the decoder's, and those of its autoencoder: 2.7 GB


class ManagedPipeline:
    """
    What the loader gives to the other nodes: a pipeline whose components ComfyUI moves one by one.

    Args:
        pipe ([`LLaDAUniPipeline`]): On the CPU.
    """

    def __init__(self, pipe: "LLaDAUniPipeline") -> None:
        self.pipe = pipe
        release = {} if pipe.model is None else {"model": pipe.model.release_cuda_graphs}
        modules = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
        self._patchers = {name: host.managed(part, release.get(name)) for name, part in modules.items()}

    def writer(
        self,
        num_rows: int,
        num_tokens: int,
        on_text: Callable[[int], None] = lambda tokens: None,
        on_codes: Callable[[int, int], None] = lambda done, total: None,
    ) -> "LLaDAUniPipeline":
        """
        The half that is the language model's, on the card.

        Args:
            num_rows, num_tokens: Rows, and words and codes of each, for the memory that they take.
            on_text: Called after every block of text with the tokens since it began.
            on_codes: Called after every block of image codes with the codes done and all, of an image.
        """
        model = self.pipe.code_generator.model
        longest = model.config.get_text_config().max_position_embeddings
        self._bring_in(["model"], num_rows * min(num_tokens, longest) * BYTES_PER_TOKEN)
        return self._half({"model": _watched(model, on_text, on_codes), "processor": self.pipe.processor})

    def decoder(self, name: str, num_pixels: int) -> "LLaDAUniPipeline":
        """
        The half that decodes codes, on the card.

        Args:
            name: `"turbo"` or `"normal"`.
            num_pixels: Of all images, for the memory that they take.
        """
        from diffusers_llada_uni.decoders import DECODERS

        names = ["semantic_embedder", "vae", *DECODERS[name]]
        self._bring_in(names, num_pixels * BYTES_PER_PIXEL)
        return self._half({part: self.pipe.components[part] for part in names})

    def unload(self) -> None:
        """Takes all of it off the card."""
        host.take_away(list(self._patchers.values()))

    def _bring_in(self, names: list[str], working_bytes: int) -> None:
        host.bring_in([self._patchers[name] for name in names if name in self._patchers], working_bytes)

    def _half(self, components: dict[str, Any]) -> "LLaDAUniPipeline":
        """A pipeline of some components: it is on the device that these are on, wherever the others wait."""
        settings = {name: self.pipe.config[name] for name in ("editing_guidance_scale", "decoder_tile_size")}
        half = type(self.pipe)(**{**dict.fromkeys(self.pipe.components), **components, **settings})
        half.set_progress_bar_config(disable=True)  # ComfyUI has its own
        return half


def _watched(
    model: "LLaDAUniForConditionalGeneration", on_text: Callable[[int], None], on_codes: Callable[[int, int], None]
) -> "LLaDAUniForConditionalGeneration":
    """The model, which tells after each block how far it is: chat, thoughts and stories pass it no callback."""
    from diffusers_llada_uni.module_sharing import shallow_copy

    class Counter:
        """What `generate` takes as a streamer: the prompt comes first, then each block's tokens."""

        def __init__(self) -> None:
            self.num_tokens: int | None = None

        def put(self, tokens: Any) -> None:
            self.num_tokens = 0 if self.num_tokens is None else self.num_tokens + tokens.numel()
            on_text(self.num_tokens)

        def end(self) -> None:
            pass

    def generate(*args: Any, **kwargs: Any) -> Any:
        return model.generate(*args, **{"streamer": Counter(), **kwargs})

    def generate_image_codes(*args: Any, **kwargs: Any) -> Any:
        return model.generate_image_codes(*args, **{**kwargs, "callback": on_codes})

    watched = shallow_copy(model)
    vars(watched).update(generate=generate, generate_image_codes=generate_image_codes)
    return watched
