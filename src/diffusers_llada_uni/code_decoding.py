"""Image codes -> latents -> pixels: the half of the pipeline that needs no language model."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, ZImageTransformer2DModel
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor

from .decoder_compilation import compile_decoder, quantize_decoder
from .input_checks import (
    check_callback,
    check_choice,
    check_finite,
    check_flag,
    check_generator,
    check_integer,
    require_components,
)
from .stepped_decoder import SteppedDecoder


DECODERS = {"turbo": ("transformer_turbo", "scheduler_turbo"), "normal": ("transformer", "scheduler")}
DEFAULT_STEPS = {"turbo": 8, "normal": 50}
DEFAULT_GUIDANCE = {"turbo": 0.0, "normal": 1.0}
OUTPUT_TYPES = ("pil", "np", "pt", "latent")
# ZImageTransformer2DModel pads the sequence of features to a multiple of this many (its SEQ_MULTI_OF).
FEATURE_PADDING = 32
# Of the pictures that the VAE decodes at once: more would be no faster, and its full-size channels take much memory.
MAX_PIXELS = 1024 * 1024

Callback = Callable[[Any, int, torch.Tensor, dict[str, Any]], dict[str, Any] | None]
Generator = torch.Generator | list[torch.Generator] | None
Images = list[PIL.Image.Image] | np.ndarray | torch.Tensor


@dataclass
class CodeDecodingSettings:
    """The arguments of [`CodeDecodingMixin.decode_codes`] that hold for all pictures."""

    decoder: str | None
    num_inference_steps: int | None
    decoder_guidance_scale: float | None
    upscale: int
    output_type: str
    callback_on_step_end: Callback | None
    callback_on_step_end_tensor_inputs: Sequence[str]


def decoder_sigmas(decoder: str, num_inference_steps: int) -> list[float]:
    r"""
    Noise levels the released samplers start their steps from, before the scheduler's shift; 1 is pure noise.

    "normal" counts the points of the grid, as the release does: n = 50 means 49 Euler steps, at 1 - i/(n-1) for
    i = 0..n-2. "turbo" takes n steps, at 1 - i/n.
    """
    intervals = num_inference_steps - 1 if decoder == "normal" else num_inference_steps
    return [1.0 - i / intervals for i in range(intervals)]


def guided_velocity(with_features: torch.Tensor, without: torch.Tensor, guidance_scale: float) -> torch.Tensor:
    r"""
    Guidance against zero features, v = p + w (p - q), each image scaled back to the norm of p where v is longer.

    Args:
        with_features (`torch.Tensor` of shape `(batch, channels, h, w)`): p.
        without (`torch.Tensor` of the same shape): q.
        guidance_scale (`float`): w.
    """
    guided = with_features + guidance_scale * (with_features - without)
    limit = torch.linalg.vector_norm(with_features, dim=(1, 2, 3), keepdim=True)
    norm = torch.linalg.vector_norm(guided, dim=(1, 2, 3), keepdim=True)
    return torch.where(norm > limit, guided * (limit / norm), guided)


class CodeDecodingMixin:
    r"""
    `decode_codes` for a `DiffusionPipeline` with the components `semantic_embedder`, `vae`, and one or both of the
    decoders: `transformer` with `scheduler` ("normal", many steps) and `transformer_turbo` with `scheduler_turbo`
    ("turbo", few steps).
    """

    _callback_tensor_inputs = ["latents", "image_features"]

    @property
    def vae_scale_factor(self) -> int:
        """Pixels per latent, down and across."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1) if self.vae is not None else 8

    @property
    def loaded_decoders(self) -> list[str]:
        """Names of the decoders that are loaded, the default one first."""
        return [name for name, (transformer, _) in DECODERS.items() if getattr(self, transformer) is not None]

    @property
    def num_timesteps(self) -> int:
        """Steps of the last decoding."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """A callback sets `pipe._interrupt = True` to skip the remaining decoding steps."""
        return self._interrupt

    def compile_decoders(self, float8: bool = False, **kwargs: Any) -> None:
        r"""
        Makes the decoders that are loaded faster on a GPU: the next picture takes longer, all after it, of whatever
        size, less.

            pipe.compile_decoders(float8=True)

        Call it after all that changes the decoder: `pipe.to`, loading a LoRA, setting an attention backend.

        Args:
            float8 (`bool`, defaults to `False`): Put the decoders' weights into float8 first, and what they are
                multiplied with as it comes: half the memory and faster still, but pictures change a little. Needs
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

    @torch.no_grad()
    def decode_codes(
        self,
        codes: torch.LongTensor,
        decoder: str | None = None,
        num_inference_steps: int | None = None,
        decoder_guidance_scale: float | None = None,
        upscale: int = 2,
        generator: Generator = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> Images:
        r"""
        Turns grids of image codes into pictures.

        Args:
            codes (`torch.LongTensor` of shape `(batch, H, W)`): Image codes, 0..codebook_size-1.
            decoder (`str`, *optional*): `"turbo"` or `"normal"`; turbo when it is loaded, by default.
            num_inference_steps (`int`, *optional*): 8 for turbo, 50 for normal by default. For "normal" n counts the
                points of the noise schedule as the release does, which makes n - 1 steps.
            decoder_guidance_scale (`float`, *optional*): Weight of guidance against zero features, for "normal" only
                (turbo was distilled without); 1.0 by default, 0 turns it off and halves the work.
            upscale (`int`, defaults to 2): A code becomes 16 * upscale pixels down and across.
            generator (`torch.Generator` or list of one per image, *optional*): Source of all noise.
            latents (`torch.Tensor` of shape `(batch, 16, 2 * upscale * H, 2 * upscale * W)`, *optional*): The initial
                noise.
            output_type (`str`, defaults to `"pil"`): `"pil"`, `"np"`, `"pt"` or `"latent"`.
            callback_on_step_end (`Callable`, *optional*): Called as `callback(pipe, step, timestep, tensors)` after
                each step; may return tensors under the same names to replace them.
            callback_on_step_end_tensor_inputs (`Sequence[str]`): Which tensors the callback gets; of `latents`
                (float32) and `image_features`.

        Returns:
            A list of pictures, an array `(batch, height, width, 3)` or tensor `(batch, 3, height, width)` in 0..1, or
            latents `(batch, 16, h, w)`.

        Raises:
            ValueError: if an argument is out of range or a component is not loaded; nothing has been computed then.
            TypeError: if an argument is of the wrong type.
        """
        settings = self._check_decoding(
            CodeDecodingSettings(
                decoder,
                num_inference_steps,
                decoder_guidance_scale,
                upscale,
                output_type,
                callback_on_step_end,
                callback_on_step_end_tensor_inputs,
            )
        )
        self._check_codes(codes)
        check_generator(generator, codes.shape[0])
        self._check_grid(codes.shape[1:], settings)
        self._check_latents(latents, codes.shape[0], codes.shape[1:], settings)
        images = self._decode(codes, settings, generator, latents)
        self.maybe_free_model_hooks()
        return images

    def _decode_grids(
        self,
        codes: Sequence[torch.LongTensor],
        settings: CodeDecodingSettings,
        generator: Generator,
        latents: torch.Tensor | None,
    ) -> Images | list[np.ndarray] | list[torch.Tensor]:
        """Decodes grids `(H, W)`, those of one size together. Arrays and tensors of several sizes come as a list."""
        of_size: dict[tuple[int, ...], list[int]] = {}
        for index, grid_codes in enumerate(codes):
            of_size.setdefault(tuple(grid_codes.shape), []).append(index)
        images: list[Any] = [None] * len(codes)
        for indices in of_size.values():
            batch = torch.stack([codes[index] for index in indices])
            generators = [generator[index] for index in indices] if isinstance(generator, list) else generator
            decoded = self._decode(batch, settings, generators, latents)
            if len(of_size) == 1:
                return decoded
            for index, image in zip(indices, decoded, strict=True):
                images[index] = image
        return images

    def _decode(
        self,
        codes: torch.LongTensor,
        settings: CodeDecodingSettings,
        generator: Generator,
        latents: torch.Tensor | None,
    ) -> Images:
        """`decode_codes` after its checks."""
        device = self._execution_device
        transformer_name, scheduler_name = DECODERS[settings.decoder]
        transformer: ZImageTransformer2DModel = getattr(self, transformer_name)
        scheduler: FlowMatchEulerDiscreteScheduler = getattr(self, scheduler_name)

        # 1. Codes to features: one for each patch of the latents
        image_features = self.semantic_embedder(codes.to(device), upscale=settings.upscale).to(transformer.dtype)

        # 2. Initial noise; latents stay in float32 through all steps
        shape = self._latents_shape(codes.shape[0], codes.shape[1:], settings)
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        else:
            latents = latents.to(device, torch.float32)

        # 3. Noise levels
        scheduler.set_timesteps(sigmas=decoder_sigmas(settings.decoder, settings.num_inference_steps), device=device)
        scheduler.set_begin_index(0)
        self._num_timesteps = len(scheduler.timesteps)
        self._interrupt = False

        # 4. From noise to latents
        decoder = SteppedDecoder(transformer)
        latents = self._denoise(decoder, scheduler, latents, image_features, settings, generator)

        # 5. Latents to pixels
        if settings.output_type == "latent":
            return latents
        config = self.vae.config
        latents = (latents / config.scaling_factor + config.shift_factor).to(self.vae.dtype)
        pixels_of_one = math.prod(latents.shape[2:]) * self.vae_scale_factor**2
        parts = latents.split(max(1, MAX_PIXELS // pixels_of_one))
        pixels = torch.cat([self.vae.decode(part, return_dict=False)[0] for part in parts])
        return VaeImageProcessor(vae_scale_factor=self.vae_scale_factor).postprocess(
            pixels, output_type=settings.output_type
        )

    def _denoise(
        self,
        decoder: SteppedDecoder | ZImageTransformer2DModel,
        scheduler: FlowMatchEulerDiscreteScheduler,
        latents: torch.Tensor,
        image_features: torch.Tensor,
        settings: CodeDecodingSettings,
        generator: Generator,
    ) -> torch.Tensor:
        """All steps from noise to latents `(batch, channels, h, w)`, float32."""
        for step, timestep in enumerate(self.progress_bar(scheduler.timesteps)):
            if self._interrupt:
                continue
            sigma = timestep / scheduler.config.num_train_timesteps
            velocity = self._velocity(decoder, latents, 1 - sigma, image_features, settings.decoder_guidance_scale)
            # The transformer points from noise to data, the scheduler wants the direction from data to noise.
            latents = scheduler.step(-velocity, timestep, latents, generator=generator, return_dict=False)[0]
            if settings.callback_on_step_end is not None:
                tensors = {"latents": latents, "image_features": image_features}
                given = {name: tensors[name] for name in settings.callback_on_step_end_tensor_inputs}
                replaced = settings.callback_on_step_end(self, step, timestep, given) or {}
                latents = replaced.get("latents", latents)
                image_features = replaced.get("image_features", image_features)
                if "image_features" in given or "image_features" in replaced:
                    decoder.forget_condition()  # in place or by new ones, the features may have been changed
        return latents

    def _velocity(
        self,
        decoder: SteppedDecoder | ZImageTransformer2DModel,
        latents: torch.Tensor,
        time: torch.Tensor,
        image_features: torch.Tensor,
        guidance_scale: float,
    ) -> torch.Tensor:
        """Velocity toward data of latents `(batch, channels, h, w)` at `time` (0 noise, 1 data), float32."""
        inputs = latents.to(decoder.dtype).unsqueeze(2)  # (batch, channels, 1 frame, h, w)
        if guidance_scale:
            inputs = torch.cat([inputs, inputs])
            image_features = torch.cat([image_features, torch.zeros_like(image_features)])
        outputs = decoder(
            list(inputs.unbind()),
            time.expand(inputs.shape[0]),
            list(image_features.unbind()),
            patch_size=decoder.config.all_patch_size[0],
            f_patch_size=decoder.config.all_f_patch_size[0],
            return_dict=False,
        )[0]
        velocity = torch.stack(outputs).squeeze(2).float()
        return guided_velocity(*velocity.chunk(2), guidance_scale) if guidance_scale else velocity

    def _latents_shape(
        self, batch_size: int, grid: Sequence[int], settings: CodeDecodingSettings
    ) -> tuple[int, int, int, int]:
        """One feature belongs to one patch of the latents, so the grid and the patch give the size."""
        config = getattr(self, DECODERS[settings.decoder][0]).config
        side = settings.upscale * config.all_patch_size[0]
        return batch_size, config.in_channels, side * grid[0], side * grid[1]

    def _check_decoding(self, settings: CodeDecodingSettings) -> CodeDecodingSettings:
        """Checks what does not depend on the codes; returns the settings with defaults filled in."""
        loaded = self.loaded_decoders
        if not loaded:
            raise ValueError("No decoder is loaded: the pipeline has neither `transformer` nor `transformer_turbo`.")
        decoder = loaded[0] if settings.decoder is None else settings.decoder
        check_choice("decoder", decoder, list(DECODERS))
        if decoder not in loaded:
            raise ValueError(f"`decoder` is {decoder!r}, but only {loaded[0]!r} is loaded.")
        require_components(self, ["semantic_embedder", DECODERS[decoder][1]], "decode image codes")
        check_choice("output_type", settings.output_type, OUTPUT_TYPES)
        if settings.output_type != "latent":
            require_components(self, ["vae"], "turn latents into pixels")
        check_choice("upscale", settings.upscale, (1, 2))
        check_callback(
            settings.callback_on_step_end, settings.callback_on_step_end_tensor_inputs, self._callback_tensor_inputs
        )

        steps, guidance = settings.num_inference_steps, settings.decoder_guidance_scale
        steps = DEFAULT_STEPS[decoder] if steps is None else steps
        check_integer("num_inference_steps", steps, minimum=2 if decoder == "normal" else 1)
        guidance = DEFAULT_GUIDANCE[decoder] if guidance is None else guidance
        check_finite("decoder_guidance_scale", guidance, minimum=0.0)
        if decoder == "turbo" and guidance:
            raise ValueError(
                f"`decoder_guidance_scale` must be 0 for the decoder 'turbo', distilled without it, got {guidance}."
            )
        transformer, embedder = getattr(self, DECODERS[decoder][0]), self.semantic_embedder
        feature_dim = embedder.config.out_dim or embedder.config.embedding_dim
        if feature_dim != transformer.config.cap_feat_dim:
            raise ValueError(
                f"`semantic_embedder` makes features of width {feature_dim}, but the decoder {decoder!r} takes "
                f"{transformer.config.cap_feat_dim} (`cap_feat_dim`): they are not of the same checkpoint."
            )
        return replace(settings, decoder=decoder, num_inference_steps=steps, decoder_guidance_scale=float(guidance))

    def _check_codes(self, codes: torch.LongTensor) -> None:
        if not isinstance(codes, torch.Tensor):
            raise TypeError(f"`codes` must be a tensor of shape (batch, H, W), got {type(codes).__name__}.")
        if codes.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"`codes` must hold integers, got {codes.dtype}.")
        if codes.ndim != 3 or not codes.numel():
            raise ValueError(f"`codes` must have the shape (batch, H, W), none of them 0, got {tuple(codes.shape)}.")
        low, high, size = codes.min().item(), codes.max().item(), self.semantic_embedder.config.codebook_size
        if low < 0 or high >= size:
            raise ValueError(f"`codes` must lie in 0..{size - 1}, got {low if low < 0 else high}.")

    def _check_grid(self, grid: Sequence[int], settings: CodeDecodingSettings) -> None:
        """The decoder has rotary positions for so many features, rows and columns; past them is an index error."""
        lengths = getattr(self, DECODERS[settings.decoder][0]).config.axes_lens
        rows, columns = settings.upscale * grid[0], settings.upscale * grid[1]
        # Features take positions 1..padded of the first axis, the latents position padded + 1.
        padded = -(-rows * columns // FEATURE_PADDING) * FEATURE_PADDING
        needed = [padded + 2, rows, columns]
        if any(need > length for need, length in zip(needed, lengths, strict=True)):
            raise ValueError(
                f"A grid of {grid[0]} x {grid[1]} codes at `upscale` {settings.upscale} needs the decoder positions "
                f"{needed}, but `axes_lens` in its config is {list(lengths)}."
            )

    def _check_latents(
        self, latents: torch.Tensor | None, batch_size: int, grid: Sequence[int], settings: CodeDecodingSettings
    ) -> None:
        if latents is None:
            return
        if not isinstance(latents, torch.Tensor):
            raise TypeError(f"`latents` must be a tensor, got {type(latents).__name__}.")
        expected = self._latents_shape(batch_size, grid, settings)
        if tuple(latents.shape) != expected:
            raise ValueError(f"`latents` must have the shape {expected}, got {tuple(latents.shape)}.")
