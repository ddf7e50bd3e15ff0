"""The pipeline: prompts and pictures -> language model -> image codes -> decoder -> pictures."""

from collections.abc import Sequence
from typing import Any

import PIL.Image
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, ZImageTransformer2DModel

# DiffusionPipeline.from_pretrained finds the components' classes only in modules that are imported already.
from transformers_llada_uni.modeling_llada_uni import LLaDAUniForConditionalGeneration
from transformers_llada_uni.processing_llada_uni import LLaDAUniProcessor

from .code_decoding import Callback, CodeDecodingMixin, CodeDecodingSettings, Generator
from .code_generation import DEFAULT_GUIDANCE_SCALE, CodeGenerationMixin, CodeGenerationSettings
from .input_checks import check_finite, check_generator, check_integer, check_prompt, require_components
from .picture_inputs import masks_per_prompt, pictures_per_prompt
from .pipeline_output import LLaDAUniPipelineOutput
from .semantic_embedder import LLaDAUniSemanticEmbedder


class LLaDAUniPipeline(CodeGenerationMixin, CodeDecodingMixin, DiffusionPipeline):
    r"""
    Text-to-image (also with thinking), editing, infilling, interleaved generation and chat with LLaDA2.0-Uni.

    Every component may be absent, that is `None`: `DiffusionPipeline.from_pretrained(path, model=None)` loads what
    decodes codes only. A call that needs an absent one says so.

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
        editing_guidance_scale (`float`, defaults to 4.0): The `guidance_scale` of edits, where none is given; what is
            best is a matter of the model. Saved in `model_index.json`.
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
        model: LLaDAUniForConditionalGeneration | None,
        processor: LLaDAUniProcessor | None,
        semantic_embedder: LLaDAUniSemanticEmbedder | None,
        vae: AutoencoderKL | None,
        transformer: ZImageTransformer2DModel | None,
        scheduler: FlowMatchEulerDiscreteScheduler | None,
        transformer_turbo: ZImageTransformer2DModel | None,
        scheduler_turbo: FlowMatchEulerDiscreteScheduler | None,
        editing_guidance_scale: float = 4.0,
    ) -> None:
        super().__init__()
        check_finite("editing_guidance_scale", editing_guidance_scale, minimum=0.0)
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
        self.register_to_config(editing_guidance_scale=editing_guidance_scale)

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
            prompt (`str` or `list[str]`): What to draw, or how to change `image`. The codes of a list are generated
                in one batch for each size of pictures, 65,536 codes at most (64 pictures of 1024 x 1024); what is
                more comes after it.
            image (picture or list, *optional*): The source to edit; of a list, the others are references. With a list
                of prompts a picture for all, or a list with a picture (or list of pictures) for each.
            mask_image (picture or list, *optional*): White where `image` (the first, of several) is to be made anew;
                of the same size. The codes under it are generated, all others stay. For outpainting, paste the picture
                on a larger canvas and mask the rest.
            height, width (`int`, *optional*): Of the output, in pixels: multiples of 16 * `upscale`, 1024 by default.
                Editing takes the size of the source (after its preprocessing) by default, as the model was trained
                to; infilling always does.
            num_inference_steps (`int`, *optional*): Of the decoder: 8 for turbo, 50 for normal by default; see
                [`decode_codes`].
            guidance_scale (`float`, *optional*): Guidance of the language model by the text, 1 is none; 2.0 by
                default, for editing what the checkpoint was made for: 4.0 if it does not say.
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
        decoding = self._check_decoding(
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
        if guidance_scale is None:
            guidance_scale = DEFAULT_GUIDANCE_SCALE if image is None else self.config.editing_guidance_scale
        generation = CodeGenerationSettings(
            guidance_scale, image_guidance_scale, guidance_rescale, num_steps_per_block, generation_kwargs or {}
        )
        self._check_generation(generation)
        self._check_task(image, mask_image, (height, width), thinking, image_guidance_scale, thinking_kwargs)
        check_generator(generator, num_images)
        grid = None if image is not None and height is None else self._grid(height, width, upscale)

        # 2. Read the pictures and masks; write the prompts. Sampled codes need a row of their own for each image.
        thinking_kwargs = thinking_kwargs or {}
        is_sampled = generation.generation_kwargs.get("do_sample") or thinking_kwargs.get("do_sample")
        images_per_row = 1 if is_sampled else num_images_per_prompt
        rows = [row for row in range(len(prompts)) for _ in range(num_images_per_prompt // images_per_row)]
        texts = [prompts[row] for row in rows]
        if image is None:
            groups = self._write_prompts(texts, grid, thinking, upscale)
        else:
            image_processor, is_batch = self.processor.image_processor, isinstance(prompt, (list, tuple))
            pictures, masks = pictures_per_prompt(image, len(prompts), is_batch, image_processor), None
            if mask_image is not None:
                masks = masks_per_prompt(mask_image, pictures, image_processor)
                masks = [masks[row] for row in rows]
            groups = self._write_edit_prompts(texts, [pictures[row] for row in rows], masks, grid, upscale)
        if latents is not None and len({group.grid for group in groups}) > 1:
            raise ValueError("`latents` cannot be given for pictures of different sizes.")
        for group in groups:
            self._check_grid(group.grid, decoding)
            self._check_latents(latents, num_images, group.grid, decoding)

        codes: list[torch.LongTensor | None] = [None] * len(rows)
        thoughts: list[str] = []
        self._bring_in_model()
        for group in groups:
            group_generator = self._of_rows(generator, group.rows, images_per_row)
            # 3. With thinking: let the model write its thoughts.
            if thinking:
                group_thoughts, group.inputs = self._think(group, group_generator, thinking_kwargs)
                thoughts += group_thoughts
            # 4. Generate the image codes.
            for row, row_codes in zip(
                group.rows, self._generate_codes(group, generation, group_generator), strict=True
            ):
                codes[row] = row_codes

        # 5. Decode them.
        self._let_go_of_model()
        codes = [row_codes for row_codes in codes for _ in range(images_per_row)]
        thoughts = [thought for thought in thoughts for _ in range(images_per_row)]
        images = self._decode_grids(codes, decoding, generator, latents)
        self.maybe_free_model_hooks()
        output = LLaDAUniPipelineOutput(images=images, codes=codes, thoughts=thoughts if thinking else None)
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
        self._bring_in_model()
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
        decoding = self._check_decoding(
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
            CodeGenerationSettings(
                guidance_scale, image_guidance_scale, guidance_rescale, num_steps_per_block, generation_kwargs
            )
        )
        if isinstance(generator, list):
            raise TypeError("`generator` must be one torch.Generator: how many pictures come is not known before.")
        check_generator(generator, 1)
        if (height is None) != (width is None):
            raise ValueError("`height` and `width` must be given together, or neither.")
        grid = None if height is None else self._grid(height, width, upscale)
        if grid is not None:
            self._check_grid(grid, decoding)
        pictures = None
        if image is not None:
            pictures = pictures_per_prompt(image, 1, False, self.processor.image_processor)[0]

        inputs = self.processor(images=pictures, text=prompt, task="interleaved")
        self._bring_in_model()
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
        self._let_go_of_model()
        parts = self.processor.post_process(ids[:, inputs["input_ids"].shape[1] :])[0]
        parts = [part for part in parts if not isinstance(part, str) or part.strip()]
        grids = [part for part in parts if not isinstance(part, str)]
        for codes in grids:
            self._check_grid(codes.shape, decoding)
        images = iter(self._decode_grids(grids, decoding, generator, None))
        self.maybe_free_model_hooks()
        return [part if isinstance(part, str) else next(images) for part in parts]
