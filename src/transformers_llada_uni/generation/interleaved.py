"""Interleaved generation: text until the model opens an image, the image's codes, text again."""

from typing import Any

import torch
from tqdm.auto import tqdm
from transformers.utils import logging

from ..input_checks import check_generator, check_grid, check_integer, refuse_settings
from .block_diffusion import BlockDiffusionGenerationMixin, guidance_scale_of, runs_as_it_is
from .configuration import BlockDiffusionGenerationConfig, as_list
from .guidance_ramp import check_ramp


logger = logging.get_logger(__name__)


class InterleavedGenerationMixin(BlockDiffusionGenerationMixin):
    """Adds `generate_interleaved` to a model whose configuration names the tokens that frame an image."""

    @torch.no_grad()
    @runs_as_it_is
    def generate_interleaved(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        negative_input_ids: torch.Tensor | None = None,
        negative_attention_mask: torch.Tensor | None = None,
        uncondition_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_grid_thw: torch.Tensor | None = None,
        max_images: int = 4,
        grid: tuple[int, int] | None = None,
        num_image_steps_per_block: int = 8,
        generation_config: BlockDiffusionGenerationConfig | None = None,
        generator: torch.Generator | None = None,
        show_progress_bar: bool = False,
        **kwargs: Any,
    ) -> torch.Tensor:
        r"""
        Text and images in turn.

        1. Generate text until `<boi>` or an end token.
        2. Read the header the model wrote before `<boi>`.
        3. Generate exactly the codes of that grid, with guidance, and close the image.
        4. Repeat from 1, until an end token or `max_images` images.

        The first image is guided away from `negative_input_ids`; later ones, as in the release, away from everything
        up to the last image followed by `<uncondition>` (without text) and, with `image_guidance_scale`, away from
        `negative_input_ids` followed by the current text (without image).

        Args:
            input_ids (`torch.LongTensor` of shape `(1, length)`): One prompt, with its `attention_mask`.
            negative_input_ids (`torch.LongTensor` of shape `(1, length)`, *optional*): The prompt with `<uncondition>`
                in place of the text. Without it there is no guidance.
            uncondition_ids (`torch.LongTensor` of shape `(1, n)`, *optional*): The tokens of `<uncondition>`; the
                processor returns them with the task "interleaved".
            max_images (`int`, defaults to 4): Images to draw at most.
            grid (`tuple[int, int]`, *optional*): Height and width in codes of every image. Default: what the model
                writes in its headers.
            num_image_steps_per_block (`int`, defaults to 8): Steps of a block of image codes;
                `num_steps_per_block` is that of text.
            kwargs: Any field of [`BlockDiffusionGenerationConfig`], such as `guidance_scale`; `max_new_tokens` counts
                for each stretch of text.

        Returns:
            `torch.LongTensor` of shape `(1, length + new)`.

        Raises:
            ValueError, TypeError: for an argument that is out of range or does not fit the others, before any work.
        """
        refuse_settings("generate_interleaved", kwargs, {"max_length": "max_new_tokens"})
        config = self.settle_generation_config(generation_config, kwargs)
        if kwargs.get("return_dict_in_generate"):
            raise ValueError("`generate_interleaved` gives ids alone: it takes no `return_dict_in_generate`.")
        for name in ("max_time", "stop_strings"):
            if getattr(config, name) is not None:
                raise ValueError(f"`generate_interleaved` ends where the model does: it takes no `{name}`.")
        for name in ("image_start_token_id", "image_end_token_id", "begin_of_image_token_id", "grid_token_ids"):
            if getattr(self.config, name) is None:
                raise ValueError(
                    f"Interleaved generation needs `{name}`, which the model's configuration does not know."
                )
        if len(self._split_rows("input_ids", input_ids, attention_mask)) != 1 or config.num_return_sequences != 1:
            raise ValueError(
                f"Interleaved generation takes one prompt and gives one answer, but `input_ids` has "
                f"{input_ids.shape[0]} rows and `num_return_sequences` is {config.num_return_sequences}."
            )
        check_integer("max_images", max_images, minimum=1)
        check_integer("num_image_steps_per_block", num_image_steps_per_block, minimum=1)
        is_guided = guidance_scale_of(config, negative_input_ids) != 1.0 or config.image_guidance_scale != 0
        check_ramp(kwargs, is_guided)
        for name, ids, mask in (
            ("negative_input_ids", negative_input_ids, negative_attention_mask),
            ("uncondition_ids", uncondition_ids, None),
        ):
            if ids is None and is_guided:
                raise ValueError(f"Guidance (`guidance_scale`, `image_guidance_scale`) needs `{name}`.")
            if ids is not None and len(self._split_rows(name, ids, mask)) != 1:
                raise ValueError(f"`{name}` must have one row, as `input_ids` has, but it has {ids.shape[0]}.")
        check_generator(generator, 1)
        check_integer("max_new_tokens", config.max_new_tokens, minimum=1)
        num_new_tokens = 1  # text until `<boi>`
        if grid is not None:
            num_new_tokens = check_grid(grid) + len(self._image_header(grid)) + 1
        prompts = self._split_rows("input_ids", input_ids, attention_mask)
        self._check_length("max_new_tokens" if grid is None else "grid", prompts, num_new_tokens)
        input_ids = self.place_images({"input_ids": input_ids}, pixel_values, image_grid_thw)["input_ids"]

        sequence = self._split_rows("input_ids", input_ids, attention_mask)[0]
        negative = None
        if negative_input_ids is not None:
            negative = self._split_rows("negative_input_ids", negative_input_ids, negative_attention_mask)[0]
        model_config, text_config = self.config, self.config.get_text_config()
        end_ids = as_list(config.eos_token_id)
        limit = text_config.max_position_embeddings
        settings: dict[str, Any] = {
            "generation_config": config,
            "generator": generator,
            "return_dict_in_generate": False,
            "output_trajectory": False,
        }
        text_start, last_image_end = len(sequence), None

        with tqdm(total=max_images, unit="image", disable=not show_progress_bar) as progress:
            for _ in range(max_images):
                # 1. Generate text until `<boi>` or an end token.
                room = min(config.max_new_tokens, limit - len(sequence))
                if room <= 0:
                    break
                stops = [*end_ids, model_config.begin_of_image_token_id]
                sequence = self.generate(sequence[None], max_new_tokens=room, eos_token_id=stops, **settings)[0]
                if int(sequence[-1]) != model_config.begin_of_image_token_id:
                    break

                # 2. Read the header the model wrote before `<boi>`.
                image_grid, text_end = self._read_header(sequence, grid)
                if image_grid is None or len(sequence) + image_grid[0] * image_grid[1] + 1 > limit:
                    reason = (
                        "wrote no valid header" if image_grid is None else "has no room left for the image it opened"
                    )
                    logger.warning("Interleaved generation ends early: the model %s.", reason)
                    sequence = sequence[:text_end]
                    break
                header = self._image_header(image_grid).to(sequence.device)
                text = sequence[text_start:text_end]
                sequence = torch.cat([sequence[:text_end], header])

                # 3. Generate exactly the codes of that grid, with guidance, and close the image.
                negatives: dict[str, Any] = {}
                if is_guided and negative is not None and uncondition_ids is not None:
                    no_text = negative
                    if last_image_end is not None:
                        no_text = torch.cat([sequence[:last_image_end], uncondition_ids[0].to(sequence.device)])
                    negatives["negative_input_ids"] = torch.cat([no_text, header])[None]
                    negatives["negative_image_input_ids"] = torch.cat([negative, text, header])[None]
                codes = self.generate_image_codes(
                    sequence[None],
                    image_grid,
                    image_guidance_scale=0.0 if last_image_end is None else config.image_guidance_scale,
                    num_steps_per_block=num_image_steps_per_block,
                    **negatives,
                    **settings,
                )[0]
                end = codes.new_tensor([model_config.image_end_token_id])
                sequence = torch.cat([sequence, codes + text_config.image_token_offset, end])
                text_start = last_image_end = len(sequence)
                progress.update()
            progress.update(max_images - progress.n)  # fewer were wanted
        return sequence[None]

    def _image_header(self, grid: tuple[int, int]) -> torch.Tensor:
        """`<|image|> <|reserved_token_H|> <|reserved_token_W|> <boi>`."""
        largest = len(self.config.grid_token_ids) - 1
        if not all(isinstance(side, int) and 1 <= side <= largest for side in grid):
            raise ValueError(f"`grid` must have sides between 1 and {largest} codes, got {grid!r}.")
        numbers = [self.config.grid_token_ids[side] for side in grid]
        return torch.tensor([self.config.image_start_token_id, *numbers, self.config.begin_of_image_token_id])

    def _read_header(self, sequence: torch.Tensor, grid: tuple[int, int] | None) -> tuple[tuple[int, int] | None, int]:
        """The grid of the image that a final `<boi>` opens, and where the text before its header ends."""
        start, *numbers = sequence[-4:-1].tolist()
        is_header = start == self.config.image_start_token_id
        sizes = {token: size for size, token in enumerate(self.config.grid_token_ids) if size > 0}
        if is_header and all(number in sizes for number in numbers):
            height, width = (sizes[number] for number in numbers)
            return grid or (height, width), len(sequence) - 4
        return grid, len(sequence) - 1


__all__ = ["InterleavedGenerationMixin"]
