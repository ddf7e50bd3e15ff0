"""What the pipeline's calls stand on: its components, the two halves made of them, bars, callbacks, and saving."""

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial, wraps
from typing import Any, TypeVar

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.transformers.transformer_z_image import ZImageTransformer2DModel
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from huggingface_hub import ModelCard
from tqdm import tqdm

# DiffusionPipeline.from_pretrained finds the components' classes only in modules that are imported already.
from transformers_llada_uni.generation.sampling import Generators
from transformers_llada_uni.hub_card import PushedWithCard
from transformers_llada_uni.input_checks import check_flag, check_integer, check_number
from transformers_llada_uni.modeling_llada_uni import LLaDAUniForConditionalGeneration
from transformers_llada_uni.processing_llada_uni import LLaDAUniProcessor

from .code_decoding import CodeDecoder, CodeDecodingSettings
from .code_generation import CodeGenerator
from .decoder_compilation import compile_decoder, quantize_decoder
from .decoders import DECODERS, loaded
from .lora_loading import LLaDAUniLoraLoaderMixin
from .pipeline_card import make_pipeline_card
from .pipeline_saving import check_adapters, saved_as_a_whole, write_transformers_files
from .semantic_embedder import LLaDAUniSemanticEmbedder


Callback = Callable[[Any, int, torch.Tensor, dict[str, torch.Tensor]], dict[str, Any] | None]
Method = TypeVar("Method", bound=Callable[..., Any])


def frees_model_hooks(method: Method) -> Method:
    """
    Under `enable_model_cpu_offload` takes every component off the card at the end of a call, as pipelines do, and also
    of one that is stopped or fails: what stayed there would leave no room to the next.
    """

    @wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return method(self, *args, **kwargs)
        finally:
            self.maybe_free_model_hooks()

    return call  # type: ignore[return-value]  # of the same signature


class DecodingState(threading.local):
    """What callbacks see and change of the decoding under way: every thread has its own, and so has a deep copy."""

    num_timesteps = 0
    guidance_scale = 0.0
    interrupt = False
    is_under_way = False

    @contextmanager
    def begin(self, num_timesteps: int) -> Iterator[None]:
        """A decoding; one that a callback makes meanwhile leaves the callback's own as it was."""
        before = dict(vars(self)) if self.is_under_way else {"is_under_way": False}
        vars(self).update(num_timesteps=num_timesteps, interrupt=False, is_under_way=True)
        try:
            yield
        finally:
            vars(self).update(before)

    def __reduce__(self) -> tuple[type["DecodingState"], tuple[()]]:
        return DecodingState, ()


def kept_by_thread(name: str) -> Any:
    """An attribute of the pipeline that is one of its [`DecodingState`]."""
    return property(
        lambda pipe: getattr(pipe._decoding, name), lambda pipe, value: setattr(pipe._decoding, name, value)
    )


class LLaDAUniPipelineBase(PushedWithCard, LLaDAUniLoraLoaderMixin, DiffusionPipeline):
    """See [`LLaDAUniPipeline`]."""

    # diffusers' default is None.
    model_cpu_offload_seq = "model->semantic_embedder->transformer->transformer_turbo->vae"  # type: ignore[assignment]
    _optional_components = [
        "model",
        "processor",
        "semantic_embedder",
        "vae",
        "transformer",
        "scheduler",
        "transformer_turbo",
        "scheduler_turbo",
    ]
    _callback_tensor_inputs = ["latents", "image_features"]

    model: LLaDAUniForConditionalGeneration | None
    processor: LLaDAUniProcessor | None
    semantic_embedder: LLaDAUniSemanticEmbedder | None
    vae: AutoencoderKL | None
    transformer: ZImageTransformer2DModel | None
    scheduler: FlowMatchEulerDiscreteScheduler | None
    transformer_turbo: ZImageTransformer2DModel | None
    scheduler_turbo: FlowMatchEulerDiscreteScheduler | None

    def __init__(
        self,
        model: LLaDAUniForConditionalGeneration | None,
        processor: LLaDAUniProcessor | None,
        semantic_embedder: LLaDAUniSemanticEmbedder | None,
        vae: AutoencoderKL | None,
        transformer: ZImageTransformer2DModel | None,
        scheduler: FlowMatchEulerDiscreteScheduler | None,
        transformer_turbo: ZImageTransformer2DModel | None,
        scheduler_turbo: FlowMatchEulerDiscreteScheduler | None,
        editing_guidance_scale: float = 4.0,
        decoder_tile_size: int | None = None,
    ) -> None:
        super().__init__()
        check_number("editing_guidance_scale", editing_guidance_scale, 0.0)
        if decoder_tile_size is not None:
            check_integer("decoder_tile_size", decoder_tile_size, 1)
        self.register_modules(
            model=model,
            processor=processor,
            semantic_embedder=semantic_embedder,
            vae=vae,
            transformer=transformer,
            scheduler=scheduler,
            transformer_turbo=transformer_turbo,
            scheduler_turbo=scheduler_turbo,
        )
        self.register_to_config(editing_guidance_scale=editing_guidance_scale, decoder_tile_size=decoder_tile_size)
        self._decoding = DecodingState()

    # The two halves, of the components that are there now

    @property
    def code_generator(self) -> CodeGenerator:
        """From prompts to codes. Raises ValueError if `model` or `processor` is not loaded."""
        model = loaded("model", self.model)
        return CodeGenerator(model, loaded("processor", self.processor), self._execution_device)

    @property
    def code_decoder(self) -> CodeDecoder:
        """From codes to images. Raises ValueError if `semantic_embedder` or the decoders are not loaded."""
        transformers = {name: getattr(self, transformer) for name, (transformer, _) in DECODERS.items()}
        schedulers = {name: getattr(self, scheduler) for name, (_, scheduler) in DECODERS.items()}
        return CodeDecoder(
            loaded("semantic_embedder", self.semantic_embedder),
            self.vae,
            {name: transformer for name, transformer in transformers.items() if transformer is not None},
            {name: scheduler for name, scheduler in schedulers.items() if scheduler is not None},
            self._execution_device,
            self.config["decoder_tile_size"],
        )

    @property
    def loaded_decoders(self) -> list[str]:
        """Names of the decoders that are loaded, the default one first."""
        return [name for name, (transformer, _) in DECODERS.items() if getattr(self, transformer) is not None]

    # What callbacks look at

    _num_timesteps = kept_by_thread("num_timesteps")
    _guidance_scale = kept_by_thread("guidance_scale")
    _interrupt = kept_by_thread("interrupt")

    @property
    def num_timesteps(self) -> int:
        """Steps of the last decoding, of this thread."""
        return self._num_timesteps

    @property
    def guidance_scale(self) -> float:
        """Guidance of the decoding under way, `decoder_guidance_scale`: what diffusers' callbacks change between its
        steps by `pipe._guidance_scale = ...`."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the decoding under way is guided."""
        return self._guidance_scale > 0

    @property
    def interrupt(self) -> bool:
        """A callback sets `pipe._interrupt = True` to skip the remaining steps of its decoding; set by another thread
        it is that thread's affair."""
        return self._interrupt

    def compile_decoders(self, float8: bool = False, **kwargs: Any) -> None:
        r"""
        Makes the decoders that are loaded faster on a GPU: the next image takes longer, all after it, of whatever
        size, less.

            pipe.compile_decoders(float8=True)

        Call it after all that changes the decoder: `pipe.to`, loading a LoRA, setting an attention backend.

        Args:
            float8 (`bool`, defaults to `False`): Put the decoders' weights into float8 first, and what they are
                multiplied with as it comes: half the memory and faster still, but images change a little. Needs
                torchao, weights in bfloat16 and hardware that multiplies float8 (compute capability 8.9, 9.0 or
                above). It cannot be undone, other than by loading the pipeline again.
            **kwargs: Of `torch.compile`, for each of the decoders' main blocks; `dynamic=True` by default.

        Raises:
            ValueError: if no decoder is loaded, or is not for float8.
            ImportError: if torchao is missing, for float8.
        """
        check_flag("float8", float8)
        if not self.loaded_decoders:
            raise ValueError("No decoder is loaded: the pipeline has neither `transformer` nor `transformer_turbo`.")
        for transformer in {getattr(self, DECODERS[name][0]) for name in self.loaded_decoders}:
            if float8:
                quantize_decoder(transformer)
            compile_decoder(transformer, **kwargs)

    # Decoding, with what a pipeline adds: bars and callbacks

    def _decode(
        self,
        codes: Sequence[torch.Tensor],
        settings: CodeDecodingSettings,
        generator: Generators,
        latents: torch.Tensor | None,
        callback: Callback | None,
        tensor_inputs: Sequence[str],
    ) -> Any:
        """Decodes grids `(H, W)`, those of one size together. Arrays and tensors of several sizes come as a list."""
        if not codes:
            return []
        decoder, num_timesteps = self.code_decoder, len(settings.sigmas)
        of_size: dict[tuple[int, ...], list[int]] = {}
        for index, grid_codes in enumerate(codes):
            of_size.setdefault(tuple(grid_codes.shape), []).append(index)
        images: list[Any] = [None] * len(codes)
        with self._decoding.begin(num_timesteps), self._bar("decoding", len(of_size) * num_timesteps) as bar:
            for indices in of_size.values():
                self._guidance_scale = settings.guidance_scale
                batch = torch.stack([codes[index] for index in indices])
                generators = [generator[index] for index in indices] if isinstance(generator, list) else generator
                on_step_end = partial(self._on_step_end, bar, callback, tensor_inputs)
                decoded = decoder.decode(batch, settings, generators, latents, on_step_end)
                if len(of_size) == 1:
                    return decoded
                for index, image in zip(indices, decoded, strict=True):
                    images[index] = image
        return images

    def _on_step_end(
        self,
        bar: tqdm,
        callback: Callback | None,
        tensor_inputs: Sequence[str],
        step: int,
        timestep: torch.Tensor,
        tensors: dict[str, torch.Tensor],
    ) -> dict[str, Any]:
        bar.update()
        changes: dict[str, Any] = {}
        if callback is not None:
            given = {name: tensors[name] for name in tensor_inputs}  # may be changed in place
            returned = callback(self, step, timestep, given) or {}
            changes = given | {name: returned[name] for name in self._callback_tensor_inputs if name in returned}
        return changes | {"guidance_scale": self._guidance_scale, "interrupt": self._interrupt}

    def _check_callback(self, callback: Any, tensor_inputs: Any) -> Sequence[str]:
        """The names of the tensors it gets: diffusers' own callbacks say them themselves."""
        if isinstance(callback, PipelineCallback | MultiPipelineCallbacks):
            tensor_inputs = callback.tensor_inputs
        if callback is not None and not callable(callback):
            raise TypeError(f"`callback_on_step_end` must be callable, got {type(callback).__name__}.")
        if isinstance(tensor_inputs, str) or not isinstance(tensor_inputs, Sequence):
            raise TypeError(f"`callback_on_step_end_tensor_inputs` must be a list of names, got {tensor_inputs!r}.")
        known = self._callback_tensor_inputs
        unknown = [name for name in tensor_inputs if name not in known]
        if unknown:
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` may name {', '.join(map(repr, known))}, got {unknown[0]!r}."
            )
        return tensor_inputs

    # Bars

    @property
    def _shows_progress(self) -> bool:
        return not getattr(self, "_progress_bar_config", {}).get("disable", False)

    @contextmanager
    def _bar(self, name: str, total: int) -> Iterator[tqdm]:
        """The pipeline's bar, by a name if it was given none; it ends at 100%, also what ends early."""
        with self.progress_bar(total=total) as bar:
            if not bar.disable and not bar.desc:
                bar.set_description(name)
            yield bar
            bar.update(total - bar.n)

    @staticmethod
    def _update(bar: tqdm, start: int, done: int, total: int) -> None:
        bar.update(start + done - bar.n)

    # Saving

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        r"""
        As any pipeline's. An adapter of the language model is saved beside it in `model/`, and loaded with it. A model
        without one can be loaded from the pipeline's folder by the Auto classes of transformers, too.

        Raises:
            ValueError: for adapters of the decoders, several of the language model, or one that is merged into its
                weights; nothing has been written then.
        """
        check_adapters(self.components)
        with saved_as_a_whole(self, save_directory):
            super().save_pretrained(save_directory, *args, **kwargs)

    def make_card(self, repo_id: str) -> ModelCard:
        """The card for a repository of this name."""
        return make_pipeline_card(repo_id, self.loaded_decoders, str(self.dtype).removeprefix("torch."))

    def save_config(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """Writes `model_index.json`, after the components; and what transformers looks for in the folder's root."""
        write_transformers_files(self.model, self.processor, save_directory)
        super().save_config(save_directory, *args, **kwargs)
