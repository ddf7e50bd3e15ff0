"""The pipeline: prompts and pictures -> language model -> image codes -> decoder -> pictures."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import PIL.Image
import torch
from accelerate.hooks import CpuOffload
from diffusers import AutoencoderKL, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, ZImageTransformer2DModel
from transformers.image_processing_utils import BatchFeature

# DiffusionPipeline.from_pretrained finds the components' classes only in modules that are imported already.
from transformers_llada_uni.generation_configuration import BlockDiffusionGenerationConfig
from transformers_llada_uni.modeling_llada_uni import LLaDAUniForConditionalGeneration
from transformers_llada_uni.processing_llada_uni import LLaDAUniProcessor

from .code_decoding import Callback, CodeDecodingMixin, CodeDecodingSettings
from .input_checks import (
    check_callback,
    check_finite,
    check_flag,
    check_generator,
    check_integer,
    check_prompt,
    check_settings,
    check_side,
    require_components,
)
from .picture_inputs import masks_per_prompt, pictures_per_prompt, touched_codes
from .pipeline_output import LLaDAUniPipelineOutput
from .semantic_embedder import LLaDAUniSemanticEmbedder

DEFAULT_SIDE = 1024  # pixels
DEFAULT_MAX_THINKING_TOKENS = 1024
Generator = torch.Generator | list[torch.Generator] | None


@dataclass
class _Group:
    """Prompts whose pictures have the same grid, so that the language model can take them as one batch."""

    rows: list[int]
    inputs: BatchFeature
    known_codes_mask: torch.Tensor | None = None  # (rows, H * W), True = regenerate


class LLaDAUniPipeline(CodeDecodingMixin, DiffusionPipeline):
    r"""
    Text-to-image (also with thinking), editing, infilling, interleaved generation and chat with LLaDA2.0-Uni.

    Every component may be absent (`LLaDAUniPipeline.from_pretrained(path, vae=None, transformer=None, ...)`); a call
    that needs it says so.

    Args:
        model ([`LLaDAUniForConditionalGeneration`], *optional*): Reads and writes text and image codes.
        processor ([`LLaDAUniProcessor`], *optional*): Words and pictures to the model's inputs.
        semantic_embedder ([`LLaDAUniSemanticEmbedder`], *optional*): Codes to the features the decoders take.
        vae ([`AutoencoderKL`], *optional*): Latents to pixels; `pipe.vae.enable_tiling()` and `enable_slicing()` save
            memory.
        transformer ([`ZImageTransformer2DModel`], *optional*): The many-step decoder, "normal".
        scheduler ([`FlowMatchEulerDiscreteScheduler`], *optional*): That of the many-step decoder.
        transformer_turbo ([`ZImageTransformer2DModel`], *optional*): The few-step decoder, "turbo".
        scheduler_turbo ([`FlowMatchEulerDiscreteScheduler`], *optional*): That of the few-step decoder.
    """

    model_cpu_offload_seq = "model->semantic_embedder->transformer->transformer_turbo->vae"
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

    def __init__(
        self,
        model: LLaDAUniForConditionalGeneration | None = None,
        processor: LLaDAUniProcessor | None = None,
        semantic_embedder: LLaDAUniSemanticEmbedder | None = None,
        vae: AutoencoderKL | None = None,
        transformer: ZImageTransformer2DModel | None = None,
        scheduler: FlowMatchEulerDiscreteScheduler | None = None,
        transformer_turbo: ZImageTransformer2DModel | None = None,
        scheduler_turbo: FlowMatchEulerDiscreteScheduler | None = None,
    ) -> None:
        super().__init__()
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

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        image: Any = None,
        mask_image: Any = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        image_guidance_scale: float = 0.0,
        guidance_rescale: float = 0.7,
        num_steps_per_block: int = 8,
        thinking: bool = False,
        num_images_per_prompt: int = 1,
        decoder: str | None = None,
        decoder_guidance_scale: float | None = None,
        upscale: int = 2,
        generator: Generator = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        generation_kwargs: dict[str, Any] | None = None,
        thinking_kwargs: dict[str, Any] | None = None,
    ) -> LLaDAUniPipelineOutput | tuple:
        r"""
        Makes pictures from prompts; edits or fills in pictures where `image` is given.

        1. Check the arguments.
        2. Read the pictures and masks; write the prompts.
        3. With thinking: let the model write its thoughts.
        4. Generate the image codes.
        5. Decode them.

        Args:
            prompt (`str` or `list[str]`): What to draw, or how to change `image`.
            image (picture or list, *optional*): The source to edit; of a list, the others are references. With a list
                of prompts a picture for all, or a list with a picture (or list of pictures) for each.
            mask_image (picture or list, *optional*): White where `image` (the first, of several) is to be made anew;
                of the same size. The codes under it are generated, all others stay. For outpainting, paste the picture
                on a larger canvas and mask the rest.
            height, width (`int`, *optional*): Of the output, in pixels: multiples of 16 * `upscale`, 1024 by default.
                Editing keeps the source's grid, so they can only repeat the size that follows from it.
            num_inference_steps (`int`, *optional*): Of the decoder: 8 for turbo, 50 for normal by default; see
                [`decode_codes`].
            guidance_scale (`float`, *optional*): Guidance of the language model by the text, 1 is none; 2.0 by
                default, 4.0 for editing.
            image_guidance_scale (`float`, defaults to 0.0): Guidance by the source picture, for editing.
            guidance_rescale (`float`, defaults to 0.7): Share of rescaled logits in guidance, 0 to 1.
            num_steps_per_block (`int`, defaults to 8): Steps the language model takes for a block of codes.
            thinking (`bool`, defaults to `False`): Let the model write down its thoughts first (text-to-image only).
            num_images_per_prompt (`int`, defaults to 1): Pictures per prompt. Their codes are the same and their
                decoding differs, unless `generation_kwargs` samples (`do_sample=True`).
            decoder (`str`, *optional*): `"turbo"` or `"normal"`; turbo when it is loaded, by default.
            decoder_guidance_scale (`float`, *optional*): Guidance of the "normal" decoder, 1.0 by default.
            upscale (`int`, defaults to 2): 1 or 2: a code becomes 16 or 32 pixels down and across.
            generator (`torch.Generator` or list of one per image, *optional*): Source of all randomness.
            latents (`torch.Tensor` of shape `(images, 16, height // 8, width // 8)`, *optional*): Initial noise.
            output_type (`str`, defaults to `"pil"`): `"pil"`, `"np"`, `"pt"` or `"latent"`.
            return_dict (`bool`, defaults to `True`): Return [`LLaDAUniPipelineOutput`], else a tuple of its fields.
            callback_on_step_end (`Callable`, *optional*), callback_on_step_end_tensor_inputs: See [`decode_codes`].
            generation_kwargs (`dict`, *optional*): More settings of [`BlockDiffusionGenerationConfig`] for the image
                codes (`threshold`, `do_sample`, `temperature`, `cache_implementation`, ...).
            thinking_kwargs (`dict`, *optional*): The same for the thoughts; `max_new_tokens` is 1024 by default.

        Returns:
            [`LLaDAUniPipelineOutput`], or the tuple `(images, codes)`, with thinking `(images, codes, thoughts)`.

        Raises:
            ValueError: if an argument is out of range or does not fit the others, or a component is not loaded;
                nothing has been computed then.
            TypeError: if an argument is of the wrong type.
        """
        # 1. Check the arguments.
        prompts = check_prompt(prompt)
        num_images = len(prompts) * check_integer("num_images_per_prompt", num_images_per_prompt, minimum=1)
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
        self._check_generation(
            guidance_scale,
            image_guidance_scale,
            guidance_rescale,
            num_steps_per_block,
            generation_kwargs,
        )
        check_generator(generator, num_images)
        self._check_task(image, mask_image, thinking, image_guidance_scale, thinking_kwargs)
        guidance_scale = (2.0 if image is None else 4.0) if guidance_scale is None else guidance_scale
        generation_kwargs, thinking_kwargs = dict(generation_kwargs or {}), dict(thinking_kwargs or {})
        thinking_kwargs.setdefault("max_new_tokens", DEFAULT_MAX_THINKING_TOKENS)

        # 2. Read the pictures and masks; write the prompts. Sampled codes need a row of their own per image.
        repeats = num_images_per_prompt
        if generation_kwargs.get("do_sample") or (thinking and thinking_kwargs.get("do_sample")):
            repeats = 1
        rows = [row for row in range(len(prompts)) for _ in range(num_images_per_prompt // repeats)]
        if image is None:
            groups = [self._write_prompts(prompts, rows, height, width, settings, thinking)]
        else:
            pictures = pictures_per_prompt(
                image, len(prompts), isinstance(prompt, (list, tuple)), self.processor.image_processor
            )
            masks = None
            if mask_image is not None:
                masks = masks_per_prompt(mask_image, pictures, self.processor.image_processor)
            groups = self._write_edit_prompts(prompts, rows, pictures, masks, height, width, settings)
        grids = {group.inputs["grid"] for group in groups} if not thinking else {self._grid(height, width, upscale)}
        if latents is not None and len(grids) > 1:
            raise ValueError("`latents` cannot be given for pictures of different sizes.")
        for grid in grids:
            self._check_grid(grid, settings)
            self._check_latents(latents, num_images, grid, settings)

        codes: list[torch.LongTensor | None] = [None] * len(rows)
        thoughts: list[str] | None = None
        self._bring_in("model")
        for group in groups:
            group_generator = generator
            if isinstance(generator, list):  # of the images of a row, the first one's
                group_generator = [generator[row * repeats] for row in group.rows]
            # 3. With thinking: let the model write its thoughts.
            if thinking:
                thoughts, group.inputs = self._think(
                    group.inputs, *self._grid(height, width, upscale), group_generator, thinking_kwargs
                )
            # 4. Generate the image codes.
            group_codes = self._generate_codes(
                group,
                guidance_scale,
                image_guidance_scale,
                guidance_rescale=guidance_rescale,
                num_steps_per_block=num_steps_per_block,
                generator=group_generator,
                **generation_kwargs,
            )
            for row, grid_codes in zip(group.rows, group_codes, strict=True):
                codes[row] = grid_codes
        codes = [grid_codes for grid_codes in codes for _ in range(repeats)]
        if thoughts is not None:
            thoughts = [thought for thought in thoughts for _ in range(repeats)]

        # 5. Decode them.
        images = self._decode_grids(codes, settings, generator, latents)
        self.maybe_free_model_hooks()
        output = LLaDAUniPipelineOutput(images=images, codes=codes, thoughts=thoughts)
        return output if return_dict else output.to_tuple()

    @torch.no_grad()
    def chat(self, messages: list[dict[str, Any]] | list[list[dict[str, Any]]], **kwargs: Any) -> str | list[str]:
        r"""
        Answers a conversation, which may hold pictures.

        Args:
            messages (`list[dict]`): Turns `{"role": "user", "content": "..."}`; with pictures the content is a list of
                `{"type": "image", "image": picture}` and `{"type": "text", "text": "..."}`. A list of such lists is a
                batch.
            **kwargs: Of the model's `generate`: `max_new_tokens`, `do_sample`, `streamer`, `generator`, ...

        Returns:
            `str`: the answer; `list[str]` for a batch.

        Raises:
            ValueError, TypeError: if `messages` are no conversation, or a setting is refused by `generate`.
        """
        require_components(self, ["model", "processor"], "chat")
        if not isinstance(messages, (list, tuple)) or not messages:
            raise ValueError(f"`messages` must be a list of at least one message, got {messages!r}.")
        is_batch = isinstance(messages[0], (list, tuple))
        for conversation in messages if is_batch else [messages]:
            for message in conversation:
                if not isinstance(message, dict) or "role" not in message or "content" not in message:
                    raise ValueError(f"`messages` must hold dicts with 'role' and 'content', got {message!r}.")
        inputs = self.processor.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
        )
        self._bring_in("model")
        ids = self.model.generate(**inputs.to(self._execution_device), **kwargs)
        answers = self.processor.post_process_image_text_to_text(
            ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
        self.maybe_free_model_hooks()
        return answers if is_batch else answers[0]

    @torch.no_grad()
    def interleave(
        self,
        prompt: str,
        image: Any = None,
        max_images: int = 4,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float = 2.0,
        image_guidance_scale: float = 0.0,
        guidance_rescale: float = 0.7,
        num_steps_per_block: int = 8,
        decoder: str | None = None,
        decoder_guidance_scale: float | None = None,
        upscale: int = 2,
        generator: torch.Generator | None = None,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        generation_kwargs: dict[str, Any] | None = None,
    ) -> list[str | PIL.Image.Image]:
        r"""
        Lets the model write and draw in turn: a story with its pictures, instructions with a picture per step.

        Args:
            prompt (`str`): What to tell.
            image (picture or list, *optional*): Pictures that stand before the prompt.
            max_images (`int`, defaults to 4): Pictures to draw at most.
            height, width (`int`, *optional*): Size in pixels of every picture, both or none. By default the model
                chooses.
            num_steps_per_block (`int`, defaults to 8): Steps of a block of image codes.
            generation_kwargs (`dict`, *optional*): More settings of [`BlockDiffusionGenerationConfig`]:
                `max_new_tokens` (of each stretch of text), `num_steps_per_block` (of text), `threshold`, ...

            The other arguments are those of the call.

        Returns:
            `list[str | PIL.Image.Image]`: text and pictures in the order they were made; empty text is left out.

        Raises:
            ValueError, TypeError: as the call does.
        """
        if not isinstance(prompt, str):
            raise TypeError(f"`prompt` must be a string, got {type(prompt).__name__}.")
        check_prompt(prompt)
        check_integer("max_images", max_images, minimum=1)
        settings = self._check_decoding(
            CodeDecodingSettings(
                decoder,
                num_inference_steps,
                decoder_guidance_scale,
                upscale,
                "pil",
                callback_on_step_end,
                callback_on_step_end_tensor_inputs,
            )
        )
        self._check_generation(
            guidance_scale, image_guidance_scale, guidance_rescale, num_steps_per_block, generation_kwargs
        )
        if isinstance(generator, list):
            raise TypeError("`generator` must be one torch.Generator: how many pictures come is not known before.")
        check_generator(generator, 1)
        if (height is None) != (width is None):
            raise ValueError("`height` and `width` must be given together, or neither.")
        grid = None if height is None else self._grid(height, width, upscale)
        if grid is not None:
            self._check_grid(grid, settings)
        pictures = None
        if image is not None:
            pictures = pictures_per_prompt(image, 1, False, self.processor.image_processor)[0]

        inputs = self.processor(images=pictures, text=prompt, task="interleaved", return_tensors="pt")
        self._bring_in("model")
        ids = self.model.generate_interleaved(
            **inputs.to(self._execution_device),
            max_images=max_images,
            grid=grid,
            guidance_scale=guidance_scale,
            image_guidance_scale=image_guidance_scale,
            guidance_rescale=guidance_rescale,
            num_image_steps_per_block=num_steps_per_block,
            generator=generator,
            show_progress_bar=self._shows_progress,
            **(generation_kwargs or {}),
        )
        parts = self.processor.post_process(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0]
        grids = [part for part in parts if isinstance(part, torch.Tensor)]
        for codes in grids:
            self._check_grid(codes.shape, settings)
        images = iter(self._decode_grids(grids, settings, generator, None))
        self.maybe_free_model_hooks()
        return [part if isinstance(part, str) else next(images) for part in parts if not isinstance(part, str) or part]

    @property
    def _shows_progress(self) -> bool:
        return not getattr(self, "_progress_bar_config", {}).get("disable", False)

    def _bring_in(self, name: str) -> None:
        """
        Puts a component on the execution device under `enable_model_cpu_offload`, whose hook waits for `forward`;
        the language model is entered by its `generate` methods.
        """
        hook = getattr(getattr(self, name), "_hf_hook", None)
        if isinstance(hook, CpuOffload):
            hook.pre_forward(getattr(self, name))

    # Checks

    def _check_generation(
        self,
        guidance_scale: float | None,
        image_guidance_scale: float,
        guidance_rescale: float,
        num_steps_per_block: int,
        generation_kwargs: dict[str, Any] | None,
    ) -> None:
        require_components(self, ["model", "processor"], "generate image codes")
        if guidance_scale is not None:
            check_finite("guidance_scale", guidance_scale, minimum=0.0)
        check_finite("image_guidance_scale", image_guidance_scale, minimum=0.0)
        check_finite("guidance_rescale", guidance_rescale, minimum=0.0, maximum=1.0)
        check_integer("num_steps_per_block", num_steps_per_block, minimum=1)
        check_settings("generation_kwargs", generation_kwargs, BlockDiffusionGenerationConfig)

    def _check_task(
        self,
        image: Any,
        mask_image: Any,
        thinking: bool,
        image_guidance_scale: float,
        thinking_kwargs: dict[str, Any] | None,
    ) -> None:
        check_flag("thinking", thinking)
        check_settings("thinking_kwargs", thinking_kwargs, BlockDiffusionGenerationConfig)
        if thinking_kwargs and not thinking:
            raise ValueError("`thinking_kwargs` are given, but `thinking` is False.")
        if image is not None and thinking:
            raise ValueError("`thinking` is for text-to-image; it cannot be combined with `image`.")
        if image is None and mask_image is not None:
            raise ValueError("`mask_image` needs the `image` it belongs to.")
        if image is None and image_guidance_scale:
            raise ValueError("`image_guidance_scale` needs an `image` to be guided by.")

    def _grid(self, height: int | None, width: int | None, upscale: int) -> tuple[int, int]:
        """The grid (H, W) of codes of a picture of so many pixels."""
        side = self.processor.image_processor.patch_size * upscale
        grid = []
        for name, value in (("height", height), ("width", width)):
            grid.append(check_side(name, DEFAULT_SIDE if value is None else value, multiple=side) // side)
        return grid[0], grid[1]
