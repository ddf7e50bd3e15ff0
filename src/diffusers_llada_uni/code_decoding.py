"""Image codes -> latents -> pixels: the half of the pipeline that needs no language model."""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.transformers.transformer_z_image import ZImageTransformer2DModel
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from diffusers.utils.torch_utils import randn_tensor

from transformers_llada_uni.generation.sampling import Generators
from transformers_llada_uni.input_checks import check_choice, check_integer, check_number

from .decoder_tiles import DecoderTiles
from .decoders import DECODERS, DEFAULT_GUIDANCE, DEFAULT_STEPS, loaded
from .semantic_embedder import LLaDAUniSemanticEmbedder
from .stepped_decoder import SteppedDecoder


OUTPUT_TYPES = ("pil", "np", "pt", "latent")
UPSCALES = (1, 2, 3, 4)  # the decoder learnt 2; the release's own tools go up to 4
# ZImageTransformer2DModel pads the sequence of features to a multiple of this many (its SEQ_MULTI_OF).
FEATURE_PADDING = 32
# Of the images that the VAE decodes at once: more would be no faster, and its full-size channels take much memory.
MAX_PIXELS = 1024 * 1024

Images = list[PIL.Image.Image] | np.ndarray | torch.Tensor
# Called with the step, its timestep and the tensors `latents` and `image_features`; what it returns under their names
# takes their place, `guidance_scale` that of guidance, and a true `interrupt` skips the remaining steps.
OnStepEnd = Callable[[int, torch.Tensor, dict[str, torch.Tensor]], Mapping[str, Any]]


@dataclass(frozen=True)
class CodeDecodingSettings:
    """What [`CodeDecoder.settle`] found good."""

    decoder: str
    num_inference_steps: int
    guidance_scale: float
    upscale: int
    output_type: str

    @property
    def sigmas(self) -> list[float]:
        """The noise levels that steps start from, one for each step."""
        return decoder_sigmas(self.decoder, self.num_inference_steps)


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


def decoder_velocity(
    decoder: SteppedDecoder | ZImageTransformer2DModel,
    latents: torch.Tensor,
    time: torch.Tensor,
    image_features: torch.Tensor,
    guidance_scale: float,
) -> torch.Tensor:
    r"""
    Velocity toward data, float32, as `latents`.

    Args:
        decoder ([`ZImageTransformer2DModel`]): The transformer, or the one of several steps.
        latents (`torch.Tensor` of shape `(batch, channels, h, w)`): Between noise and data.
        time (`torch.Tensor` of shape `()`): 0 is noise, 1 data.
        image_features (`torch.Tensor` of shape `(batch, patches, cap_feat_dim)`): What [`guided_velocity`] guides to.
        guidance_scale (`float`): Its weight; 0 computes no unguided half.
    """
    inputs = latents.to(decoder.dtype).unsqueeze(2)  # (batch, channels, 1 frame, h, w)
    if guidance_scale:
        inputs = torch.cat([inputs, inputs])
        image_features = torch.cat([image_features, torch.zeros_like(image_features)])
    outputs = decoder(
        list(inputs.unbind()),
        time.expand(inputs.shape[0]),
        list(image_features.unbind()),
        patch_size=decoder.config["all_patch_size"][0],
        f_patch_size=decoder.config["all_f_patch_size"][0],
        return_dict=False,
    )[0]
    velocity = torch.stack(outputs).squeeze(2).float()
    if not guidance_scale:
        return velocity
    with_features, without = velocity.chunk(2)
    return guided_velocity(with_features, without, guidance_scale)


class CodeDecoder:
    r"""
    Makes images of image codes. [`LLaDAUniPipeline`] uses it; it can stand elsewhere than what generates the codes.

        decoder = CodeDecoder(pipe.semantic_embedder, pipe.vae, {"turbo": pipe.transformer_turbo},
                              {"turbo": pipe.scheduler_turbo})
        images = decoder.decode(codes, decoder.settle())

    Args:
        semantic_embedder ([`LLaDAUniSemanticEmbedder`]): Codes to the features the decoders take.
        vae ([`AutoencoderKL`], *optional*): Latents to pixels; not needed for `output_type="latent"`.
        transformers (`Mapping[str, ZImageTransformer2DModel]`): At least one; by their names `"turbo"` and `"normal"`.
        schedulers (`Mapping[str, FlowMatchEulerDiscreteScheduler]`): By the same names. They stay as they are:
            every decoding has copies, so that threads may share a decoder.
        device (`torch.device`, *optional*): Where codes and noise are put; that of the embedder by default.
        tile_size (`int`, *optional*): Codes, down and across, that a decoder draws at once: a larger image is drawn in
            tiles. Default: any image at once.

    Raises:
        ValueError: if there is no transformer, or for a tile of no code. What else does not fit, [`settle`] refuses.
    """

    def __init__(
        self,
        semantic_embedder: LLaDAUniSemanticEmbedder,
        vae: AutoencoderKL | None,
        transformers: Mapping[str, ZImageTransformer2DModel],
        schedulers: Mapping[str, FlowMatchEulerDiscreteScheduler],
        device: torch.device | None = None,
        tile_size: int | None = None,
    ) -> None:
        if not transformers:
            raise ValueError("No decoder is loaded: there is neither `transformer` nor `transformer_turbo`.")
        self.semantic_embedder, self.vae = semantic_embedder, vae
        self.transformers, self.schedulers = transformers, schedulers
        self.device = semantic_embedder.device if device is None else device
        if tile_size is not None:
            check_integer("tile_size", tile_size, 1)
        self.tile_size = tile_size

    # Arguments are checked before any work, also that of what generates the codes.

    def settle(
        self,
        decoder: str | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        upscale: int = 2,
        output_type: str = "pil",
    ) -> CodeDecodingSettings:
        """
        Checks what does not depend on the codes, as [`LLaDAUniPipeline.decode_codes`] says; fills in defaults.

        Raises:
            ValueError: if an argument is out of range, a component is missing, or the parts are not of one checkpoint.
            TypeError: for a scheduler that does not sample flows at given noise levels.
        """
        names = [name for name in DECODERS if name in self.transformers]
        decoder = names[0] if decoder is None else decoder
        check_choice("decoder", decoder, list(DECODERS))
        if decoder not in names:
            raise ValueError(f"`decoder` is {decoder!r}, but only {names[0]!r} is loaded.")
        self._check_components(decoder)
        check_choice("output_type", output_type, OUTPUT_TYPES)
        if output_type != "latent":
            loaded("vae", self.vae)
        check_choice("upscale", upscale, UPSCALES)
        steps = DEFAULT_STEPS[decoder] if num_inference_steps is None else num_inference_steps
        check_integer("num_inference_steps", steps, minimum=2 if decoder == "normal" else 1)
        guidance_scale = DEFAULT_GUIDANCE[decoder] if guidance_scale is None else guidance_scale
        check_number("decoder_guidance_scale", guidance_scale, 0.0)
        if decoder == "turbo" and guidance_scale:
            raise ValueError(
                f"`decoder_guidance_scale` must be 0 for the decoder 'turbo', distilled without it, got "
                f"{guidance_scale}."
            )
        return CodeDecodingSettings(decoder, steps, float(guidance_scale), upscale, output_type)

    def _check_components(self, decoder: str) -> None:
        _, name = DECODERS[decoder]
        scheduler = loaded(name, self.schedulers.get(decoder))
        if not isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
            raise TypeError(
                f"`{name}` must be a FlowMatchEulerDiscreteScheduler, as the decoder predicts the velocity of a flow, "
                f"got {type(scheduler).__name__}."
            )
        if scheduler.config["use_dynamic_shifting"]:
            raise ValueError(f"`{name}` has `use_dynamic_shifting=True`; the decoders are sampled at a fixed `shift`.")
        embedder, config = self.semantic_embedder.config, self.transformers[decoder].config
        feature_dim = embedder["out_dim"] or embedder["embedding_dim"]
        if feature_dim != config["cap_feat_dim"]:
            raise ValueError(
                f"`semantic_embedder` makes features of width {feature_dim}, but the decoder {decoder!r} takes "
                f"{config['cap_feat_dim']} (`cap_feat_dim`): they are not of the same checkpoint."
            )

    def check_codes(self, codes: Any) -> None:
        """Image codes `(batch, H, W)`, or a list of `(H, W)`."""
        if isinstance(codes, list | tuple) and codes and all(isinstance(own, torch.Tensor) for own in codes):
            for own in codes:
                if own.ndim != 2:
                    raise ValueError(f"`codes` must hold grids of the shape (H, W), got one of {tuple(own.shape)}.")
                self.check_codes(own[None])
            return
        if not isinstance(codes, torch.Tensor):
            kind = type(codes).__name__
            raise TypeError(f"`codes` must be a tensor of shape (batch, H, W), or a list of (H, W), got {kind}.")
        if codes.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"`codes` must hold integers, got {codes.dtype}.")
        if codes.ndim != 3 or not codes.numel():
            raise ValueError(f"`codes` must have the shape (batch, H, W), none of them 0, got {tuple(codes.shape)}.")
        low, high, size = codes.min().item(), codes.max().item(), self.semantic_embedder.config["codebook_size"]
        if low < 0 or high >= size:
            raise ValueError(f"`codes` must lie in 0..{size - 1}, got {low if low < 0 else high}.")

    def check_grid(self, grid: Sequence[int], settings: CodeDecodingSettings) -> None:
        """The decoder has rotary positions for so many features, rows and columns; past them is an index error."""
        lengths = self.transformers[settings.decoder].config["axes_lens"]
        tiles = DecoderTiles.of((grid[0], grid[1]), self.tile_size)
        rows, columns = settings.upscale * tiles.height, settings.upscale * tiles.width
        # Features take positions 1..padded of the first axis, the latents position padded + 1.
        padded = -(-rows * columns // FEATURE_PADDING) * FEATURE_PADDING
        needed = [padded + 2, rows, columns]
        if any(need > length for need, length in zip(needed, lengths, strict=True)):
            raise ValueError(
                f"A grid of {tiles.height} x {tiles.width} codes at `upscale` {settings.upscale} needs the decoder "
                f"positions {needed}, but `axes_lens` in its config is {list(lengths)}."
            )

    def check_latents(
        self, latents: Any, batch_size: int, grid: Sequence[int], settings: CodeDecodingSettings
    ) -> None:
        """Initial noise, or `None`."""
        if latents is None:
            return
        if not isinstance(latents, torch.Tensor):
            raise TypeError(f"`latents` must be a tensor, got {type(latents).__name__}.")
        expected = self._latents_shape(batch_size, grid, settings)
        if tuple(latents.shape) != expected:
            raise ValueError(f"`latents` must have the shape {expected}, got {tuple(latents.shape)}.")

    @torch.no_grad()
    def decode(
        self,
        codes: torch.Tensor,
        settings: CodeDecodingSettings,
        generator: Generators = None,
        latents: torch.Tensor | None = None,
        on_step_end: OnStepEnd | None = None,
    ) -> Images:
        r"""
        Codes `(batch, H, W)` to images, see [`LLaDAUniPipeline.decode_codes`]. The checks above are the caller's.

        1. Codes to features, one for each patch of the latents, tile by tile.
        2. Initial noise; latents stay in float32 through all steps.
        3. From noise to latents, step by step.
        4. Latents to pixels.
        """
        transformer = self.transformers[settings.decoder]
        scheduler = copy.deepcopy(self.schedulers[settings.decoder])  # it keeps the step it is at

        # 1. Codes to features, one for each patch of the latents, tile by tile.
        grid = codes.shape[1], codes.shape[2]
        tiles, side = DecoderTiles.of(grid, self.tile_size), self._side_of_code(settings)
        tile_codes = tiles.split(codes.to(self.device))
        image_features = self.semantic_embedder(tile_codes, settings.upscale, return_dict=False)[0]
        image_features = image_features.to(transformer.dtype)

        # 2. Initial noise; latents stay in float32 through all steps.
        if latents is None:
            shape = self._latents_shape(codes.shape[0], codes.shape[1:], settings)
            latents = randn_tensor(shape, generator=generator, device=self.device, dtype=torch.float32)
        else:
            latents = latents.to(self.device, torch.float32)

        # 3. From noise to latents, step by step.
        scheduler.set_timesteps(sigmas=settings.sigmas, device=self.device)
        scheduler.set_begin_index(0)
        decoder, guidance_scale = SteppedDecoder(transformer), settings.guidance_scale
        for step, timestep in enumerate(scheduler.timesteps):
            time = 1 - timestep / scheduler.config["num_train_timesteps"]
            velocity = decoder_velocity(decoder, tiles.split(latents, side), time, image_features, guidance_scale)
            velocity = tiles.join(velocity, grid, side)
            # The transformer points from noise to data, the scheduler wants the direction from data to noise.
            arguments: Any = {"generator": generator, "return_dict": False}  # it takes lists of generators, too
            latents = scheduler.step(-velocity, timestep, latents, **arguments)[0]  # type: ignore[arg-type]  # any float
            if on_step_end is None:
                continue
            changes = on_step_end(step, timestep, {"latents": latents, "image_features": image_features})
            latents = changes.get("latents", latents)
            if "image_features" in changes:
                image_features = changes["image_features"]
                decoder.forget_condition()
            guidance_scale = changes.get("guidance_scale", guidance_scale)
            if changes.get("interrupt"):
                break

        # 4. Latents to pixels.
        return latents if settings.output_type == "latent" else self._to_images(latents, settings.output_type)

    def _to_images(self, latents: torch.Tensor, output_type: str) -> Images:
        vae = loaded("vae", self.vae)
        config = vae.config
        scale = 2 ** (len(config["block_out_channels"]) - 1)  # pixels per latent, down and across
        latents = (latents / config["scaling_factor"] + (config["shift_factor"] or 0.0)).to(vae.dtype)
        pixels_of_one = math.prod(latents.shape[2:]) * scale**2
        parts = latents.split(max(1, MAX_PIXELS // pixels_of_one))
        pixels = torch.cat([vae.decode(part, return_dict=False)[0] for part in parts])
        return VaeImageProcessor(vae_scale_factor=scale).postprocess(pixels, output_type=output_type)

    def _latents_shape(
        self, batch_size: int, grid: Sequence[int], settings: CodeDecodingSettings
    ) -> tuple[int, int, int, int]:
        """One feature belongs to one patch of the latents, so the grid and the patch give the size."""
        side, channels = self._side_of_code(settings), self.transformers[settings.decoder].config["in_channels"]
        return batch_size, channels, side * grid[0], side * grid[1]

    def _side_of_code(self, settings: CodeDecodingSettings) -> int:
        """In latents."""
        return settings.upscale * self.transformers[settings.decoder].config["all_patch_size"][0]
