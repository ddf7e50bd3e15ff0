"""LLaDA2.0-Uni: eyes (vision tower and codebook of transformers' GLM-Image) in front of the LLaDA2 backbone."""

import torch
from torch import nn
from transformers import PreTrainedModel  # noqa: F401  diffusers reads here how a component is loaded
from transformers.cache_utils import Cache
from transformers.modeling_outputs import (
    BaseModelOutputWithPooling,
    MoeCausalLMOutputWithPast,
    MoeModelOutputWithPast,
)
from transformers.models.glm_image.modeling_glm_image import GlmImageVisionModel, GlmImageVQVAE
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.import_utils import torch_compilable_check

from .configuration_llada_uni import LLaDAUniConfig
from .generation.interleaved import InterleavedGenerationMixin
from .input_checks import check_ids, check_images, check_labels
from .modeling_llada2_moe import LLaDA2MoeModel, LLaDA2MoePreTrainedModel
from .weight_hooks import weights_in_place


class LLaDAUniPreTrainedModel(LLaDA2MoePreTrainedModel):
    config: LLaDAUniConfig  # type: ignore[assignment]  # of another model, with the backbone's beneath it
    input_modalities = ["image", "text"]
    _no_split_modules = ["LLaDA2MoeDecoderLayer", "GlmImageVisionBlock", "GlmImageVQVAEVectorQuantizer"]
    _can_record_outputs = {}  # the sub-models record their own


class LLaDAUniModel(LLaDAUniPreTrainedModel):
    """The model without its head: ids and images to hidden states."""

    def __init__(self, config: LLaDAUniConfig):
        super().__init__(config)
        self.visual = GlmImageVisionModel._from_config(config.vision_config)
        self.vqmodel = GlmImageVQVAE._from_config(config.vq_config)
        self.language_model = LLaDA2MoeModel._from_config(config.text_config)
        self.post_init()

    @property
    def _patch_width(self) -> int:
        config = self.config.vision_config
        return config.in_channels * config.patch_size**2  # type: ignore[operator]  # GLM-Image's patches are square

    @can_return_tuple
    def get_image_features(
        self, pixel_values: torch.Tensor, image_grid_thw: torch.Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> tuple | BaseModelOutputWithPooling:
        r"""
        What the vision tower makes of images, before it is quantized; named and shaped as in transformers' GLM-Image.

        Args:
            pixel_values: `(patches, channels * patch_size * patch_size)`, the patches of all images one after the
                other, each in raster order.
            image_grid_thw: `(images, 3)`: 1, height and width in patches.

        Returns:
            The vision tower's output, `last_hidden_state` `(patches, hidden_size)`; its `pooler_output` is a list with
            `(hidden_size, height, width)` for each image.

        Raises:
            ValueError, TypeError: if patches and grids do not fit together.
        """
        lengths = check_images(pixel_values, image_grid_thw, self._patch_width)
        with weights_in_place(self.visual.embeddings.position_embedding):  # upstream reads it without a call
            outputs = self.visual(pixel_values, grid_thw=image_grid_thw, return_dict=True, **kwargs)
        outputs.pooler_output = [
            features.T.reshape(-1, height, width)
            for features, (_, height, width) in zip(
                outputs.last_hidden_state.split(lengths), image_grid_thw.tolist(), strict=True
            )
        ]
        return outputs

    @torch.no_grad()
    def get_image_codes(self, pixel_values: torch.Tensor, image_grid_thw: torch.Tensor) -> list[torch.Tensor]:
        r"""
        For each image its codes, `(height, width)`; see [`LLaDAUniModel.get_image_features`] for the arguments.
        """
        features = self.get_image_features(pixel_values, image_grid_thw, return_dict=True).pooler_output
        with weights_in_place(self.vqmodel.quantize.embedding):  # upstream reads it without a call
            return [self.vqmodel.encode(of[None]).image_tokens.view(of.shape[1:]) for of in features]

    def place_images(
        self,
        input_ids: dict[str, torch.Tensor],
        pixel_values: torch.Tensor | None,
        image_grid_thw: torch.Tensor | None,
    ) -> dict[str, torch.Tensor]:
        r"""
        Puts the tokens of images where ids hold their places open (`config.image_token_id`).

        Args:
            input_ids: By name, ids that all hold places open for the same images.
            pixel_values, image_grid_thw: See [`LLaDAUniModel.get_image_features`]; `None` without images.

        Returns:
            `input_ids` with the tokens in their places.

        Raises:
            ValueError, TypeError: if images and ids do not fit together; nothing is computed before.
        """
        offset, place = self.config.text_config.image_token_offset, self.config.image_token_id
        num_codes = 0
        if pixel_values is None:
            if image_grid_thw is not None:
                raise ValueError("`image_grid_thw` was given without `pixel_values`.")
        elif offset is None or place is None:
            raise ValueError(
                "`pixel_values` were given, but the configuration lacks `image_token_offset` or `image_token_id`: "
                "this checkpoint reads no images."
            )
        else:
            num_codes = sum(check_images(pixel_values, image_grid_thw, self._patch_width))
        for name, ids in input_ids.items():
            self._check_places(name, ids, num_codes)
        if pixel_values is None or image_grid_thw is None or offset is None or place is None:
            return input_ids
        codes = torch.cat([grid.flatten() for grid in self.get_image_codes(pixel_values, image_grid_thw)]) + offset
        return {name: ids.masked_scatter(ids.eq(place), codes.to(ids)) for name, ids in input_ids.items()}

    def _check_places(self, name: str, ids: torch.Tensor, num_codes: int) -> None:
        check_ids(name, ids)
        if self.config.image_token_id is not None:
            num_places = ids.eq(self.config.image_token_id).sum()
            torch_compilable_check(
                num_places == num_codes,
                lambda: (
                    f"`{name}` holds {int(num_places)} places for image codes, but `pixel_values` has {num_codes} "
                    "patches. Let the processor make both, and do not cut its `input_ids`."
                ),
            )

    @can_return_tuple
    def forward(  # type: ignore[misc]  # TransformersKwargs too names `position_ids`
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_grid_thw: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MoeModelOutputWithPast:
        r"""
        See [`LLaDA2MoeModel.forward`] and, for `pixel_values` and `image_grid_thw`,
        [`LLaDAUniModel.get_image_features`].
        """
        if input_ids is not None:
            input_ids = self.place_images({"input_ids": input_ids}, pixel_values, image_grid_thw)["input_ids"]
        elif pixel_values is not None:
            raise ValueError("`pixel_values` need `input_ids` that hold their places open, got `inputs_embeds`.")
        return self.language_model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )


class LLaDAUniForConditionalGeneration(  # type: ignore[misc]  # the mixin serves both configurations
    LLaDAUniPreTrainedModel, InterleavedGenerationMixin
):
    """The whole language model: reads text and images, generates text and image codes."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.word_embeddings.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _fsdp_plan = {"lm_head": "keep_full_weight"}
    # For diffusers' `enable_group_offload` by blocks: what is called by itself, and not in the forward pass of a whole
    _group_offload_block_modules = (
        *("model", "language_model", "lm_head"),
        *("visual", "vqmodel", "quantize", "quant_conv", "post_quant_conv"),
    )

    def __init__(self, config: LLaDAUniConfig):
        super().__init__(config)
        self.model = LLaDAUniModel(config)
        text_config = config.text_config
        self.lm_head = nn.Linear(text_config.hidden_size, text_config.vocab_size, bias=False)
        self.loss_type = "ForMaskedLM"
        self.post_init()

    def get_image_codes(self, pixel_values: torch.Tensor, image_grid_thw: torch.Tensor) -> list[torch.Tensor]:
        """See [`LLaDAUniModel.get_image_codes`]."""
        return self.model.get_image_codes(pixel_values, image_grid_thw)

    def get_image_features(
        self, pixel_values: torch.Tensor, image_grid_thw: torch.Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> tuple | BaseModelOutputWithPooling:
        """See [`LLaDAUniModel.get_image_features`]."""
        return self.model.get_image_features(pixel_values, image_grid_thw, **kwargs)

    def place_images(
        self,
        input_ids: dict[str, torch.Tensor],
        pixel_values: torch.Tensor | None,
        image_grid_thw: torch.Tensor | None,
    ) -> dict[str, torch.Tensor]:
        return self.model.place_images(input_ids, pixel_values, image_grid_thw)

    @can_return_tuple
    @merge_with_config_defaults
    def forward(  # type: ignore[misc]  # TransformersKwargs too names `position_ids`
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_grid_thw: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MoeCausalLMOutputWithPast:
        r"""
        See [`LLaDA2MoeForBlockDiffusion.forward`] and, for `pixel_values` and `image_grid_thw`,
        [`LLaDAUniModel.get_image_features`].
        """
        check_labels(labels, input_ids if inputs_embeds is None else inputs_embeds, logits_to_keep)
        outputs: MoeModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            pixel_values=pixel_values,
            image_grid_thw=image_grid_thw,
            **kwargs,
        )
        return self._predict(outputs, labels, logits_to_keep, **kwargs)
