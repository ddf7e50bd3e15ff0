"""The pipeline: prompts and images -> language model -> image codes -> decoder -> images."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import PIL.Image
import torch

from transformers_llada_uni.generation.sampling import Generators
from transformers_llada_uni.input_checks import check_generator, check_integer, refuse_settings

from .code_decoding import Images
from .code_generation import (
    DEFAULT_GUIDANCE_SCALE,
    CodeGenerationSettings,
    check_generation_kwargs,
    sequences_of,
)
from .image_inputs import images_per_prompt, masks_per_prompt
from .pipeline_base import Callback, LLaDAUniPipelineBase
from .pipeline_output import LLaDAUniPipelineOutput
from .prompt_inputs import check_negative_prompt, check_prompt, check_task


class LLaDAUniPipeline(LLaDAUniPipelineBase):
    r"""
    Text-to-image (also with thinking), editing, infilling, interleaved generation and chat with LLaDA2.0-Uni.

    Every component may be absent, that is `None`: `DiffusionPipeline.from_pretrained(path, model=None)` loads what
    decodes codes only. A call that needs an absent one says so.

    Args:
        model ([`LLaDAUniForConditionalGeneration`], *optional*): Reads and writes text and image codes.
        processor ([`LLaDAUniProcessor`], *optional*): Words and images to the model's inputs.
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
        generator: Generators = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        generation_kwargs: dict[str, Any] | None = None,
        thinking_kwargs: dict[str, Any] | None = None,
        negative_prompt: str | list[str] | None = None,
    ) -> LLaDAUniPipelineOutput:
        r"""
        Makes images from prompts; edits or fills in images where `image` is given.

        1. Check the arguments.
        2. Read the images and masks; write the prompts.
        3. With thinking: let the model write its thoughts.
        4. Generate the image codes.
        5. Decode them.

        Args:
            prompt (`str` or `list[str]`): What to draw, or how to change `image`. The codes of a list are generated
                in one batch for each size of images, 65,536 codes at most (64 images of 1024 x 1024); what is more
                comes after it.
            image (image or list, *optional*): The source to edit; of a list, the others are references. With a list
                of prompts an image for all, or a list with an image (or list of images) for each.
            mask_image (image or list, *optional*): White where `image` (the first, of several) is to be made anew;
                of the same size. The codes under it are generated, all others stay. For outpainting, paste the image
                on a larger canvas and mask the rest.
            height, width (`int`, *optional*): Of the output, in pixels: multiples of 16 * `upscale`, 1024 by default.
                Editing takes the size of the source (after its preprocessing) by default, as the model was trained
                to; infilling always does.
            num_inference_steps (`int`, *optional*): Of the decoder: 8 for turbo, 50 for normal by default; see
                [`decode_codes`].
            guidance_scale (`float`, *optional*): Guidance of the language model by the text, 1 is none; 2.0 by
                default, for editing what the checkpoint was made for: 4.0 if it does not say.
            image_guidance_scale (`float`, defaults to 0.0): Guidance by the source image, for editing.
            guidance_rescale (`float`, defaults to 0.7): Share of rescaled logits in guidance, 0 to 1.
            num_steps_per_block (`int`, defaults to 8): Steps the language model takes for a block of codes.
            thinking (`bool`, defaults to `False`): Let the model write down its thoughts first (text-to-image only).
            num_images_per_prompt (`int`, defaults to 1): Images per prompt. One takes the most probable codes; of
                several the codes are sampled, so that the images differ in more than their details, unless
                `generation_kwargs={"do_sample": False}` says otherwise.
            decoder (`str`, *optional*): `"turbo"` or `"normal"`; turbo when it is loaded, by default.
            decoder_guidance_scale (`float`, *optional*): Guidance of the "normal" decoder, 1.0 by default.
            upscale (`int`, defaults to 2): 1 or 2: a code becomes 16 or 32 pixels down and across.
            generator (`torch.Generator` or list of one per image, *optional*): Source of all randomness. One prompt
                with other seeds gives the same codes and other details, unless its codes are sampled
                (`generation_kwargs={"do_sample": True}`).
            latents (`torch.Tensor` of shape `(images, 16, height // 8, width // 8)`, *optional*): Initial noise.
            output_type (`str`, defaults to `"pil"`): `"pil"`, `"np"`, `"pt"` or `"latent"`.
            return_dict (`bool`, defaults to `True`): Return [`LLaDAUniPipelineOutput`], else a tuple of its fields.
            callback_on_step_end (`Callable`, *optional*), callback_on_step_end_tensor_inputs: See [`decode_codes`].
            generation_kwargs (`dict`, *optional*): More settings of [`BlockDiffusionGenerationConfig`] for the image
                codes (`threshold`, `do_sample`, `temperature`, `cache_implementation`, ...).
            thinking_kwargs (`dict`, *optional*): The same for the thoughts; `max_new_tokens` is 1024 by default.
            negative_prompt (`str` or `list[str]`, *optional*): What guidance leads away from: one for all prompts or
                one for each. The model was trained to be led away from no words at all, which is the default, and the
                empty string.

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
        code_decoder = self.code_decoder
        decoding = code_decoder.settle(decoder, num_inference_steps, decoder_guidance_scale, upscale, output_type)
        self._check_callback(callback_on_step_end, callback_on_step_end_tensor_inputs)
        coder = self.code_generator
        if guidance_scale is None:
            guidance_scale = DEFAULT_GUIDANCE_SCALE if image is None else self.config["editing_guidance_scale"]
        generation_kwargs = {} if generation_kwargs is None else generation_kwargs
        generation = CodeGenerationSettings(
            guidance_scale, image_guidance_scale, guidance_rescale, num_steps_per_block, generation_kwargs
        )
        thinking_kwargs = {} if thinking_kwargs is None else thinking_kwargs
        check_generation_kwargs("thinking_kwargs", thinking_kwargs)
        for name, settings in (("generation_kwargs", generation_kwargs), ("thinking_kwargs", thinking_kwargs)):
            refuse_settings(name, settings, {"num_return_sequences": "num_images_per_prompt"})
        check_task(image, mask_image, (height, width), thinking, image_guidance_scale, thinking_kwargs)
        negatives = check_negative_prompt(negative_prompt, len(prompts), guidance_scale)
        check_generator(generator, num_images, "images")
        grid = None if image is not None and height is None else coder.grid_of(height, width, upscale)

        # 2. Read the images and masks; write the prompts. Sampled codes need a row of their own for each image.
        if num_images_per_prompt > 1:
            generation.generation_kwargs = {"do_sample": True, **generation_kwargs}
        own = coder.model.generation_config.do_sample
        samples = [settings.get("do_sample", own) for settings in (generation.generation_kwargs, thinking_kwargs)]
        images_per_row = 1 if samples[0] or (thinking and samples[1]) else num_images_per_prompt
        rows = [row for row in range(len(prompts)) for _ in range(num_images_per_prompt // images_per_row)]
        texts = [prompts[row] for row in rows]
        negative_texts = None if negatives is None else [negatives[row] for row in rows]
        if image is None:
            assert grid is not None
            groups = coder.write_prompts(texts, grid, thinking, upscale, negative_texts)
        else:
            image_processor, is_batch = coder.processor.image_processor, isinstance(prompt, (list, tuple))
            sources, masks = images_per_prompt(image, len(prompts), is_batch, image_processor), None
            if mask_image is not None:
                masks = masks_per_prompt(mask_image, sources, image_processor)
                masks = [masks[row] for row in rows]
            sources = [sources[row] for row in rows]
            groups = coder.write_edit_prompts(texts, sources, masks, grid, upscale, negative_texts)
        if latents is not None and len({group.grid for group in groups}) > 1:
            raise ValueError("`latents` cannot be given for images of different sizes.")
        for group in groups:
            code_decoder.check_grid(group.grid, decoding)
            code_decoder.check_latents(latents, num_images, group.grid, decoding)

        codes: dict[int, torch.Tensor] = {}
        thoughts: list[str] = []
        coder.bring_in_model()
        with self._bar("image codes", sum(group.grid[0] * group.grid[1] for group in groups)) as bar:
            for group in groups:
                group_generator = generator
                if isinstance(generator, list):  # of the images that share a row's codes, the first one's
                    group_generator = [generator[row * images_per_row] for row in group.rows]
                # 3. With thinking: let the model write its thoughts.
                if thinking:
                    thoughts += coder.think(group, thinking_kwargs, group_generator, self._shows_progress)
                # 4. Generate the image codes.
                update = partial(self._update, bar, bar.n)
                generated = coder.generate(group, generation, group_generator, update)
                codes |= dict(zip(group.rows, generated, strict=True))

        # 5. Decode them.
        coder.let_go_of_model()
        codes_of_images = [codes[row] for row in range(len(rows)) for _ in range(images_per_row)]
        thoughts = [thought for thought in thoughts for _ in range(images_per_row)]
        images = self._decode(
            codes_of_images, decoding, generator, latents, callback_on_step_end, callback_on_step_end_tensor_inputs
        )
        self.maybe_free_model_hooks()
        output = LLaDAUniPipelineOutput(images=images, codes=codes_of_images, thoughts=thoughts if thinking else None)
        return output if return_dict else output.to_tuple()  # type: ignore[return-value]  # as upstream types it

    @torch.no_grad()
    def decode_codes(
        self,
        codes: torch.Tensor,
        decoder: str | None = None,
        num_inference_steps: int | None = None,
        decoder_guidance_scale: float | None = None,
        upscale: int = 2,
        generator: Generators = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> Images:
        r"""
        Turns grids of image codes into images.

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
                each step; may return tensors under the same names to replace them, and set `pipe._guidance_scale` or
                `pipe._interrupt`.
            callback_on_step_end_tensor_inputs (`Sequence[str]`): Which tensors the callback gets; of `latents`
                (float32) and `image_features`.

        Returns:
            A list of images, an array `(batch, height, width, 3)` or tensor `(batch, 3, height, width)` in 0..1, or
            latents `(batch, 16, h, w)`.

        Raises:
            ValueError: if an argument is out of range or a component is not loaded; nothing has been computed then.
            TypeError: if an argument is of the wrong type.
        """
        code_decoder = self.code_decoder
        settings = code_decoder.settle(decoder, num_inference_steps, decoder_guidance_scale, upscale, output_type)
        self._check_callback(callback_on_step_end, callback_on_step_end_tensor_inputs)
        code_decoder.check_codes(codes)
        check_generator(generator, codes.shape[0], "images")
        code_decoder.check_grid(codes.shape[1:], settings)
        code_decoder.check_latents(latents, codes.shape[0], codes.shape[1:], settings)
        callback = callback_on_step_end, callback_on_step_end_tensor_inputs
        images = self._decode(list(codes), settings, generator, latents, *callback)
        self.maybe_free_model_hooks()
        return images

    @torch.no_grad()
    def chat(self, messages: list[dict[str, Any]] | list[list[dict[str, Any]]], **kwargs: Any) -> str | list[str]:
        r"""
        Answers a conversation, which may hold images.

        Args:
            messages (`list[dict]`): Turns `{"role": "user", "content": "..."}`; with images the content is a list of
                `{"type": "image", "image": image}` and `{"type": "text", "text": "..."}`. A list of such lists is a
                batch.
            **kwargs: Of the model's `generate`: `max_new_tokens`, `do_sample`, `streamer`, `generator`, ...

        Returns:
            `str`: the answer; `list[str]` for a batch, or several answers by `num_return_sequences`.

        Raises:
            ValueError, TypeError: if `messages` are no conversation, or a setting is refused by `generate`.
        """
        coder = self.code_generator
        if not isinstance(messages, (list, tuple)) or not messages:
            raise ValueError(f"`messages` must be a list of at least one message, got {messages!r}.")
        is_batch = isinstance(messages[0], (list, tuple))
        for conversation in messages if is_batch else [messages]:
            for message in conversation:
                if not isinstance(message, dict) or "role" not in message or "content" not in message:
                    raise ValueError(f"`messages` must hold dicts with 'role' and 'content', got {message!r}.")
        inputs = coder.processor.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
        )
        coder.bring_in_model()
        ids = sequences_of(coder.model.generate(**inputs.to(coder.device), **kwargs))
        answers = coder.processor.post_process_image_text_to_text(
            ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
        coder.let_go_of_model()
        self.maybe_free_model_hooks()
        return answers if is_batch or len(answers) > 1 else answers[0]

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
        Lets the model write and draw in turn: a story with its images, instructions with an image per step.
        Arguments that are not listed are those of the call.

        Args:
            prompt (`str`): What to tell.
            image (image or list, *optional*): Images that stand before the prompt.
            max_images (`int`, defaults to 4): Images to draw at most.
            height, width (`int`, *optional*): Size in pixels of every image, both or none. By default the model
                chooses.
            num_steps_per_block (`int`, defaults to 8): Steps of a block of image codes.
            generation_kwargs (`dict`, *optional*): More settings of [`BlockDiffusionGenerationConfig`]:
                `max_new_tokens` (of each stretch of text), `num_steps_per_block` (of text), `threshold`, ...

        Returns:
            `list[str | PIL.Image.Image]`: text and images in the order they were made; empty text is left out.

        Raises:
            ValueError, TypeError: as the call does.
        """
        if not isinstance(prompt, str):
            raise TypeError(f"`prompt` must be a string, got {type(prompt).__name__}.")
        check_prompt(prompt)
        check_integer("max_images", max_images, minimum=1)
        code_decoder = self.code_decoder
        decoding = code_decoder.settle(decoder, num_inference_steps, decoder_guidance_scale, upscale)
        self._check_callback(callback_on_step_end, callback_on_step_end_tensor_inputs)
        coder = self.code_generator
        generation_kwargs = {} if generation_kwargs is None else generation_kwargs
        generation = CodeGenerationSettings(
            guidance_scale, image_guidance_scale, guidance_rescale, num_steps_per_block, generation_kwargs
        )
        if isinstance(generator, list):
            raise TypeError("`generator` must be one torch.Generator: how many images come is not known before.")
        check_generator(generator, 1, "images")
        if (height is None) != (width is None):
            raise ValueError("`height` and `width` must be given together, or neither.")
        grid = None if height is None else coder.grid_of(height, width, upscale)
        if grid is not None:
            code_decoder.check_grid(grid, decoding)
        sources = None
        if image is not None:
            sources = images_per_prompt(image, 1, False, coder.processor.image_processor)[0]

        inputs = coder.processor(images=sources, text=prompt, task="interleaved")
        coder.bring_in_model()
        ids = coder.model.generate_interleaved(
            **inputs.to(coder.device),
            max_images=max_images,
            grid=grid,
            num_image_steps_per_block=num_steps_per_block,
            generator=generator,
            show_progress_bar=self._shows_progress,
            **{**generation.guidance, **generation_kwargs},
        )
        coder.let_go_of_model()
        parts = coder.processor.post_process(ids[:, inputs["input_ids"].shape[1] :])[0]
        parts = [part for part in parts if not isinstance(part, str) or part.strip()]
        codes = [part for part in parts if not isinstance(part, str)]
        for grid_codes in codes:
            code_decoder.check_grid(grid_codes.shape, decoding)
        callback = callback_on_step_end, callback_on_step_end_tensor_inputs
        images = iter(self._decode(codes, decoding, generator, None, *callback))
        self.maybe_free_model_hooks()
        return [part if isinstance(part, str) else next(images) for part in parts]
