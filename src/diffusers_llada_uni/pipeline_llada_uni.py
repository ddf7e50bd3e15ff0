"""The pipeline: prompts and images -> language model -> image codes -> decoder -> images."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import PIL.Image
import torch

from transformers_llada_uni.generation.best_of import (
    Reward,
    best_of,
    candidate_generators,
    check_can_judge,
    check_candidates,
    check_candidates_differ,
)
from transformers_llada_uni.generation.configuration import refuse_settings_of_text
from transformers_llada_uni.generation.sampling import Generators
from transformers_llada_uni.input_checks import check_choice, check_generator, check_integer, refuse_settings

from .code_decoding import OUTPUT_TYPES, UPSCALES, Images
from .code_generation import DEFAULT_GUIDANCE_SCALE, CodeGenerationSettings, check_generation_kwargs, sequences_of
from .image_inputs import codes_per_prompt, images_per_prompt, masks_per_prompt
from .pipeline_base import Callback, LLaDAUniPipelineBase, frees_model_hooks
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
        decoder_tile_size (`int`, *optional*): Codes, down and across, that the decoder draws at once: larger images
            are drawn in tiles, each as if it were alone, for decoders that know one size only. Default:
            any image at once. Saved in `model_index.json`.
    """

    @torch.no_grad()
    @frees_model_hooks
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
        image_codes: torch.Tensor | list | None = None,
        num_candidates: int = 1,
        reward: Reward | None = None,
    ) -> LLaDAUniPipelineOutput:
        r"""
        Makes images from prompts; edits or fills in images where `image` or `image_codes` is given.

        1. Check the arguments.
        2. Read the images and masks; write the prompts.
        3. With thinking: let the model write its thoughts.
        4. Generate the image codes.
        5. Of several candidates keep the best.
        6. Decode them.

        Args:
            prompt (`str` or `list[str]`): What to draw, or how to change `image`. The codes of a list are generated
                in one batch for each size of images, 65,536 codes at most (64 images of 1024 x 1024); what is more
                comes after it.
            image (image or list, *optional*): The source to edit; of a list, the others are references. With a list
                of prompts an image for all, or a list with an image (or list of images) for each.
            mask_image (image or list, *optional*): White where `image` (the first, of several) is to be made anew;
                of the same size; of `image_codes` a pixel is a code. The codes under it are generated, all others
                stay. For outpainting, paste the image on a larger canvas and mask the rest.
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
            upscale (`int`, defaults to 2): 1 to 4: a code becomes 16 * `upscale` pixels down and across. The decoder
                was trained at 2. At 4 it takes four times the memory, most of it for pixels; with
                `pipe.vae.enable_tiling()` less.
            generator (`torch.Generator` or list of one per image, *optional*): Source of all randomness. One prompt
                with other seeds gives the same codes and other details, unless its codes are sampled
                (`generation_kwargs={"do_sample": True}`).
            latents (`torch.Tensor` of shape `(images, 16, height // 8, width // 8)`, *optional*): Initial noise.
            output_type (`str`, defaults to `"pil"`): `"pil"`, `"np"`, `"pt"` or `"latent"`; `"codes"` decodes nothing,
                and needs no decoder: [`decode_codes`] can, later or elsewhere.
            return_dict (`bool`, defaults to `True`): Return [`LLaDAUniPipelineOutput`], else a tuple of its fields.
            callback_on_step_end (`Callable`, *optional*), callback_on_step_end_tensor_inputs: See [`decode_codes`].
            generation_kwargs (`dict`, *optional*): More settings of [`BlockDiffusionGenerationConfig`] for the image
                codes (`threshold`, `do_sample`, `temperature`, `cache_implementation`, ...).
            thinking_kwargs (`dict`, *optional*): The same for the thoughts; `max_new_tokens` is 1024 by default.
            negative_prompt (`str` or `list[str]`, *optional*): What guidance leads away from: one for all prompts or
                one for each. The model was trained to be led away from no words at all, which is the default, and the
                empty string.
            image_codes (`torch.LongTensor` of shape `(H, W)` or list, *optional*): In place of `image`: codes of the
                source, such as an earlier call's, or [`encode_images`]'. Lists as those of images. What was generated
                is so changed without a loss by pixels between. A pixel of `mask_image` is a code then.
            num_candidates (`int`, defaults to 1): Sample so many for each image, as codes, and decode the best only.
                A candidate costs the language model's work once more, its judgement a short pass. It gains where
                candidates differ: a model that is sure of its codes needs a `temperature` above 1.
            reward (`Callable`, *optional*): What finds the best of them: called as `reward(prompts=...,
                image_codes=..., completions=..., completion_ids=...)` with lists of all candidates', it gives a number
                for each, as rewards of [`LLaDAUniGRPOTrainer`] do; it may call [`decode_codes`]. By default the model
                judges by how many of the prompt's words it would say of its codes, see [`prompt_recall`]. That is no
                judgement of an edit, whose prompt is an instruction: edits need a reward.

        Returns:
            [`LLaDAUniPipelineOutput`], or the tuple `(images, codes)`, with thinking `(images, codes, thoughts)`, and
            with candidates their `scores` behind these.

        Raises:
            ValueError: if an argument is out of range or does not fit the others, or a component is not loaded;
                nothing has been computed then.
            TypeError: if an argument is of the wrong type.
        """
        # 1. Check the arguments.
        prompts = check_prompt(prompt)
        num_images = len(prompts) * check_integer("num_images_per_prompt", num_images_per_prompt, minimum=1)
        check_candidates(num_candidates, reward)
        check_choice("output_type", output_type, (*OUTPUT_TYPES, "codes"))
        check_choice("upscale", upscale, UPSCALES)
        code_decoder = None if output_type == "codes" else self.code_decoder
        if code_decoder is not None:
            decoding = code_decoder.settle(decoder, num_inference_steps, decoder_guidance_scale, upscale, output_type)
        elif latents is not None:
            raise ValueError("`latents` are decoded, but `output_type` is 'codes'.")
        tensor_inputs = self._check_callback(callback_on_step_end, callback_on_step_end_tensor_inputs)
        coder = self.code_generator
        if image is not None and image_codes is not None:
            raise ValueError("`image` and `image_codes` are two ways to give the same: give one of them.")
        source = image if image_codes is None else image_codes
        if num_candidates > 1 and reward is None and source is not None and mask_image is None:
            raise ValueError(
                "`num_candidates` needs a `reward` for edits: the model judges what an image shows, not what is new."
            )
        if guidance_scale is None:
            guidance_scale = DEFAULT_GUIDANCE_SCALE if source is None else self.config["editing_guidance_scale"]
        generation_kwargs = {} if generation_kwargs is None else generation_kwargs
        generation = CodeGenerationSettings(
            guidance_scale, image_guidance_scale, guidance_rescale, num_steps_per_block, generation_kwargs
        )
        thinking_kwargs = {} if thinking_kwargs is None else thinking_kwargs
        check_generation_kwargs("thinking_kwargs", thinking_kwargs)
        for name, settings in (("generation_kwargs", generation_kwargs), ("thinking_kwargs", thinking_kwargs)):
            refuse_settings(name, settings, {"num_return_sequences": "num_images_per_prompt"})
        refuse_settings_of_text("generation_kwargs", generation_kwargs, size="height")
        check_task(
            source, mask_image, (height, width), thinking, generation.guidance["image_guidance_scale"], thinking_kwargs
        )
        negatives = check_negative_prompt(negative_prompt, len(prompts), generation.guidance["guidance_scale"])
        check_generator(generator, num_images, "images")
        grid = None if source is not None and height is None else coder.grid_of(height, width, upscale)

        # 2. Read the images and masks; write the prompts. Sampled codes need a row for each image, and candidate.
        if max(num_images_per_prompt, num_candidates) > 1:
            generation.generation_kwargs = {"do_sample": True, **generation_kwargs}
        own, settings_of_parts = coder.own_settings, [generation.generation_kwargs]
        settings_of_parts += [thinking_kwargs] if thinking else []
        is_sampled = any(settings.get("do_sample", own.do_sample) for settings in settings_of_parts)
        if num_candidates > 1:
            check_candidates_differ(settings_of_parts, own)
            if reward is None:
                check_can_judge(coder.model)
        images_per_row = 1 if is_sampled else num_images_per_prompt
        rows_per_prompt = num_images_per_prompt // images_per_row * num_candidates
        rows = [row for row in range(len(prompts)) for _ in range(rows_per_prompt)]
        texts = [prompts[row] for row in rows]
        negative_texts = None if negatives is None else [negatives[row] for row in rows]
        if source is None:
            assert grid is not None
            groups = coder.write_prompts(texts, grid, thinking, upscale, negative_texts)
        else:
            image_processor, is_batch = coder.processor.image_processor, isinstance(prompt, (list, tuple))
            sources: list[list[Any]]
            if image_codes is None:
                sources = images_per_prompt(image, len(prompts), is_batch, image_processor)
            else:
                sources = codes_per_prompt(image_codes, len(prompts), is_batch, coder.processor)
            masks = None
            if mask_image is not None:
                masks = masks_per_prompt(mask_image, sources, image_processor)
                masks = [masks[row] for row in rows]
            sources = [sources[row] for row in rows]
            groups = coder.write_edit_prompts(texts, sources, masks, grid, upscale, negative_texts)
        if latents is not None and len({group.grid for group in groups}) > 1:
            raise ValueError("`latents` cannot be given for images of different sizes.")
        if code_decoder is not None:
            for group in groups:
                code_decoder.check_grid(group.grid, decoding)
                code_decoder.check_latents(latents, num_images, group.grid, decoding)

        generators = generator
        if isinstance(generator, list):  # of the images that share a row's codes, the first one's
            generators = candidate_generators(generator[::images_per_row], num_candidates)
        codes: dict[int, torch.Tensor] = {}
        thoughts: list[str] = []
        coder.bring_in_model()
        with self._bar("image codes", sum(group.grid[0] * group.grid[1] for group in groups)) as bar:
            for group in groups:
                group_generator = generators
                if isinstance(generators, list):
                    group_generator = [generators[row] for row in group.rows]
                # 3. With thinking: let the model write its thoughts.
                if thinking:
                    thoughts += coder.think(group, thinking_kwargs, group_generator, self._shows_progress)
                # 4. Generate the image codes.
                update = partial(self._update, bar, bar.n)
                generated = coder.generate(group, generation, group_generator, update)
                codes |= dict(zip(group.rows, generated, strict=True))

        # 5. Of several candidates keep the best.
        kept, scores = list(range(len(rows))), None
        if num_candidates > 1:
            scores = coder.judge(texts, [codes[row] for row in kept], reward)
            kept = best_of(scores, num_candidates)
            scores = [scores[row] for row in kept]

        # 6. Decode them.
        coder.let_go_of_model()
        codes_of_images = [codes[row] for row in kept for _ in range(images_per_row)]
        thoughts = [thoughts[row] for row in kept for _ in range(images_per_row)] if thinking else []
        images = []
        if code_decoder is not None:
            callback = callback_on_step_end, tensor_inputs
            images = self._decode(codes_of_images, decoding, generator, latents, *callback)
        output = LLaDAUniPipelineOutput(
            images=images, codes=codes_of_images, thoughts=thoughts if thinking else None, scores=scores
        )
        return output if return_dict else output.to_tuple()  # type: ignore[return-value]  # as upstream types it

    @torch.no_grad()
    @frees_model_hooks
    def encode_images(self, image: Any, resize_mode: str = "editing") -> list[torch.Tensor]:
        r"""
        Turns images into grids of image codes: what the model sees of them, and what [`decode_codes`] and the call's
        `image_codes` take.

        Args:
            image (image or list): Anything [`LLaDAUniImageProcessor.fetch_images`] reads.
            resize_mode (`str`, defaults to `"editing"`): How images are scaled and cropped: to the size of those that
                are made, or for `"understanding"` to that of those that are talked about, one by one.

        Returns:
            `list[torch.LongTensor]`: of each image its codes `(H, W)`.

        Raises:
            ValueError, TypeError: for what is no image; if a component is not loaded.
        """
        coder = self.code_generator
        processor = coder.processor.image_processor
        (images,) = images_per_prompt(image, 1, False, processor)
        inputs = [processor([one], resize_mode=resize_mode, return_tensors="pt") for one in images]
        coder.bring_in_model()
        codes = []
        for of_image in inputs:
            of_image = of_image.to(coder.device)
            codes += coder.model.get_image_codes(of_image["pixel_values"], of_image["image_grid_thw"])
        coder.let_go_of_model()
        return codes

    @torch.no_grad()
    @frees_model_hooks
    def decode_codes(
        self,
        codes: torch.Tensor | list[torch.Tensor],
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
            codes (`torch.LongTensor` of shape `(batch, H, W)`): Image codes, 0..codebook_size-1; or a list of such
                `(H, W)`, which may be of several sizes.
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
                (float32) and `image_features`, those of tiles where images are drawn in tiles.

        Returns:
            A list of images, an array `(batch, height, width, 3)` or tensor `(batch, 3, height, width)` in 0..1, or
            latents `(batch, 16, h, w)`; of codes of several sizes a list.

        Raises:
            ValueError: if an argument is out of range or a component is not loaded; nothing has been computed then.
            TypeError: if an argument is of the wrong type.
        """
        code_decoder = self.code_decoder
        settings = code_decoder.settle(decoder, num_inference_steps, decoder_guidance_scale, upscale, output_type)
        tensor_inputs = self._check_callback(callback_on_step_end, callback_on_step_end_tensor_inputs)
        code_decoder.check_codes(codes)
        check_generator(generator, len(codes), "images")
        sizes = {tuple(grid_codes.shape) for grid_codes in codes}
        if latents is not None and len(sizes) > 1:
            raise ValueError("`latents` cannot be given for images of different sizes.")
        for size in sizes:
            code_decoder.check_grid(size, settings)
            code_decoder.check_latents(latents, len(codes), size, settings)
        callback = callback_on_step_end, tensor_inputs
        images = self._decode(list(codes), settings, generator, latents, *callback)
        return images

    @torch.no_grad()
    @frees_model_hooks
    def chat(
        self,
        messages: list[dict[str, Any]] | list[list[dict[str, Any]]],
        num_candidates: int = 1,
        reward: Reward | None = None,
        **kwargs: Any,
    ) -> str | list[str]:
        r"""
        Answers a conversation, which may hold images.

        Args:
            messages (`list[dict]`): Turns `{"role": "user", "content": "..."}`; with images the content is a list of
                `{"type": "image", "image": image}` and `{"type": "text", "text": "..."}`. A list of such lists is a
                batch.
            num_candidates (`int`, defaults to 1): Sample so many answers to each, and return the best.
            reward (`Callable`, *optional*): What finds the best of them: called as `reward(prompts=...,
                completions=..., completion_ids=...)` with lists of all candidates' (conversations, texts and ids) it
                gives a number for each, as rewards of [`LLaDAUniGRPOTrainer`] do. By default the one whose tokens the
                model finds most probable, in the mean, see [`answer_log_probs`].
            **kwargs: Of the model's `generate`: `max_new_tokens`, `do_sample`, `streamer`, `generator`, ...

        Returns:
            `str`: the answer; `list[str]` for a batch, or several answers by `num_return_sequences`.

        Raises:
            ValueError, TypeError: if `messages` are no conversation, or a setting is refused by `generate`.
        """
        check_candidates(num_candidates, reward)
        coder = self.code_generator
        if num_candidates > 1:
            for name in ("num_return_sequences", "streamer"):
                if kwargs.get(name) is not None:
                    raise TypeError(f"`num_candidates` are judged when all are there: it cannot be had with `{name}`.")
            kwargs = {"do_sample": True, **kwargs, "num_return_sequences": num_candidates}
            check_candidates_differ([kwargs], coder.own_settings)
            if reward is None:
                check_can_judge(coder.model)
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
        length = inputs["input_ids"].shape[1]
        answers = coder.processor.post_process_image_text_to_text(ids[:, length:], skip_special_tokens=True)
        if num_candidates > 1:
            asked = [chat for chat in (messages if is_batch else [messages]) for _ in range(num_candidates)]
            mask = inputs["attention_mask"].bool().repeat_interleave(num_candidates, dim=0)
            prompts = [row[:length][is_token] for row, is_token in zip(ids, mask, strict=True)]
            scores = coder.judge_answers(asked, prompts, ids[:, length:], answers, reward)
            answers = [answers[row] for row in best_of(scores, num_candidates)]
        coder.let_go_of_model()
        return answers if is_batch or len(answers) > 1 else answers[0]

    @torch.no_grad()
    @frees_model_hooks
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
        tensor_inputs = self._check_callback(callback_on_step_end, callback_on_step_end_tensor_inputs)
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
        callback = callback_on_step_end, tensor_inputs
        images = iter(self._decode(codes, decoding, generator, None, *callback))
        return [part if isinstance(part, str) else next(images) for part in parts]
