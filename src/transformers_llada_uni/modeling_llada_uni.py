"""LLaDA2.0-Uni: eyes (vision tower and codebook of transformers' GLM-Image) in front of the LLaDA2 backbone."""

import torch
from torch import nn
from transformers import PreTrainedModel  # noqa: F401  diffusers reads here how a component is loaded
from transformers.cache_utils import Cache
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep
from transformers.models.glm_image.modeling_glm_image import GlmImageVisionModel, GlmImageVQVAE
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults

from .configuration_llada_uni import LLaDAUniConfig
from .generation.interleaved import InterleavedGenerationMixin
from .input_checks import check_ids, check_labels, check_pictures
from .modeling_llada2_moe import LLaDA2MoeModel, LLaDA2MoePreTrainedModel
from .weight_hooks import weights_in_place


class LLaDAUniPreTrainedModel(LLaDA2MoePreTrainedModel):
    config: LLaDAUniConfig
    input_modalities = ("image", "text")
    _no_split_modules = ["LLaDA2MoeDecoderLayer", "GlmImageVisionBlock", "GlmImageVQVAEVectorQuantizer"]
    _can_record_outputs = {}  # the sub-models record their own


class LLaDAUniModel(LLaDAUniPreTrainedModel):
    """The model without its head: ids and pictures to hidden states."""

    def __init__(self, config: LLaDAUniConfig):
        super().__init__(config)
        self.visual = GlmImageVisionModel._from_config(config.vision_config)
        self.vqmodel = GlmImageVQVAE._from_config(config.vq_config)
        self.language_model = LLaDA2MoeModel._from_config(config.text_config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.language_model.set_input_embeddings(value)

    def get_decoder(self) -> LLaDA2MoeModel:
        return self.language_model

    @property
    def _patch_width(self) -> int:
        return self.config.vision_config.in_channels * self.config.vision_config.patch_size**2

    @torch.no_grad()
    def get_image_codes(self, pixel_values: torch.Tensor, image_grid_thw: torch.LongTensor) -> list[torch.LongTensor]:
        r"""
        Args:
            pixel_values: `(patches, channels * patch_size * patch_size)`, the patches of all pictures one after the
                other, each in raster order.
            image_grid_thw: `(pictures, 3)`: 1, height and width in patches.

        Returns:
            For each picture its codes, `(height, width)`.

        Raises:
            ValueError, TypeError: if patches and grids do not fit together.
        """
        lengths = check_pictures(pixel_values, image_grid_thw, self._patch_width)
        # Upstream reads the weights of these two without calling them.
        with weights_in_place(self.visual.embeddings.position_embedding, self.vqmodel.quantize.embedding):
            features = self.visual(pixel_values, grid_thw=image_grid_thw).last_hidden_state
            codes = []
            for picture, (_, height, width) in zip(features.split(lengths), image_grid_thw.tolist(), strict=True):
                picture = picture.T.reshape(1, -1, height, width)
                codes.append(self.vqmodel.encode(picture).image_tokens.view(height, width))
        return codes

    def check_pictures(
        self,
        input_ids: dict[str, torch.LongTensor],
        pixel_values: torch.Tensor | None,
        image_grid_thw: torch.LongTensor | None,
    ) -> None:
        r"""
        Args:
            input_ids: By name, ids that all hold places open for the same pictures.

        Raises:
            ValueError, TypeError: if pictures and ids do not fit together; nothing is computed before.
        """
        num_codes = 0
        if pixel_values is not None:
            if self.config.text_config.image_token_offset is None or self.config.image_token_id is None:
                raise ValueError(
                    "`pixel_values` were given, but the configuration lacks `image_token_offset` or `image_token_id`: "
                    "this checkpoint reads no pictures."
                )
            num_codes = sum(check_pictures(pixel_values, image_grid_thw, self._patch_width))
        elif image_grid_thw is not None:
            raise ValueError("`image_grid_thw` was given without `pixel_values`.")
        for name, ids in input_ids.items():
            check_ids(name, ids)
            num_places = 0 if self.config.image_token_id is None else int((ids == self.config.image_token_id).sum())
            if num_places != num_codes:
                raise ValueError(
                    f"`{name}` holds {num_places} places for image codes, but `pixel_values` has {num_codes} patches. "
                    "Let the processor make both, and do not cut its `input_ids`."
                )

    def encode_images(
        self, pixel_values: torch.Tensor | None, image_grid_thw: torch.LongTensor | None
    ) -> torch.LongTensor | None:
        """The tokens of all pictures one after the other, `(patches,)`; `None` without pictures."""
        if pixel_values is None:
            return None
        codes = torch.cat([grid.flatten() for grid in self.get_image_codes(pixel_values, image_grid_thw)])
        return codes + self.config.text_config.image_token_offset

    def place_image_codes(self, input_ids: torch.LongTensor, codes: torch.LongTensor | None) -> torch.LongTensor:
        """Puts the tokens of pictures where `input_ids` holds their places open (`config.image_token_id`)."""
        if codes is None:
            return input_ids
        return input_ids.masked_scatter(input_ids == self.config.image_token_id, codes.to(input_ids))

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_grid_thw: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MoeModelOutputWithPast:
        r"""
        See [`LLaDA2MoeModel.forward`] and, for `pixel_values` and `image_grid_thw`, [`LLaDAUniModel.get_image_codes`].
        """
        if input_ids is not None:
            self.check_pictures({"input_ids": input_ids}, pixel_values, image_grid_thw)
            input_ids = self.place_image_codes(input_ids, self.encode_images(pixel_values, image_grid_thw))
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


class LLaDAUniForConditionalGeneration(LLaDAUniPreTrainedModel, InterleavedGenerationMixin):
    """The whole language model: reads text and pictures, generates text and image codes."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.word_embeddings.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: LLaDAUniConfig):
        super().__init__(config)
        self.model = LLaDAUniModel(config)
        text_config = config.text_config
        self.lm_head = nn.Linear(text_config.hidden_size, text_config.vocab_size, bias=False)
        self.loss_type = "ForMaskedLM"
        self.post_init()

    def get_decoder(self) -> LLaDA2MoeModel:
        return self.model.language_model

    def get_image_codes(self, pixel_values: torch.Tensor, image_grid_thw: torch.LongTensor) -> list[torch.LongTensor]:
        """See [`LLaDAUniModel.get_image_codes`]."""
        return self.model.get_image_codes(pixel_values, image_grid_thw)

    def _check_pictures(
        self,
        input_ids: dict[str, torch.LongTensor],
        pixel_values: torch.Tensor | None,
        image_grid_thw: torch.LongTensor | None,
    ) -> None:
        self.model.check_pictures(input_ids, pixel_values, image_grid_thw)

    def _encode_images(
        self, pixel_values: torch.Tensor | None, image_grid_thw: torch.LongTensor | None
    ) -> torch.LongTensor | None:
        return self.model.encode_images(pixel_values, image_grid_thw)

    def _place_image_codes(self, input_ids: torch.LongTensor, codes: torch.LongTensor | None) -> torch.LongTensor:
        return self.model.place_image_codes(input_ids, codes)

    @can_return_tuple
    @merge_with_config_defaults
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_grid_thw: torch.LongTensor | None = None,
        labels: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MoeCausalLMOutputWithPast:
        r"""
        See [`LLaDA2MoeForBlockDiffusion.forward`] and, for `pixel_values` and `image_grid_thw`,
        [`LLaDAUniModel.get_image_codes`].
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
        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            vocab_size = self.config.text_config.vocab_size
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=vocab_size, **kwargs)
        return MoeCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
        )


__all__ = ["LLaDAUniForConditionalGeneration", "LLaDAUniModel", "LLaDAUniPreTrainedModel"]
