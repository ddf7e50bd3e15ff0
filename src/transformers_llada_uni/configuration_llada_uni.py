"""Configuration of LLaDA2.0-Uni: backbone, vision tower, codebook, and the tokens that frame an image."""

from typing import TYPE_CHECKING, Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.models.glm_image.configuration_glm_image import GlmImageVisionConfig, GlmImageVQVAEConfig

from .configuration_llada2_moe import CheckedFileConfig, LLaDA2MoeConfig, raises_builtin_errors
from .input_checks import check_token_id


@raises_builtin_errors
@strict
class LLaDAUniConfig(CheckedFileConfig):
    r"""
    Configuration of [`LLaDAUniForConditionalGeneration`].

    In a sequence an image of H x W codes reads `<|image|> <|reserved_token_H|> <|reserved_token_W|> <boi>`, H*W codes
    in raster order, `<|/image|>`. The ids of these tokens differ between tokenizers; conversion looks them up.

    Args:
        text_config ([`LLaDA2MoeConfig`] or `dict`, *optional*): The backbone.
        vision_config (`GlmImageVisionConfig` or `dict`, *optional*): The vision tower of transformers.
        vq_config (`GlmImageVQVAEConfig` or `dict`, *optional*): The codebook of transformers.
        image_token_id (`int`): Placeholder of a code that the model fills in from `pixel_values`
            (`<|reserved_token_0|>`: no header ever names the number 0).
        image_start_token_id (`int`): `<|image|>`.
        image_end_token_id (`int`): `<|/image|>`.
        begin_of_image_token_id (`int`): `<boi>`.
        grid_token_ids (`list[int]`): The id of `<|reserved_token_n|>` stands at index n.

    Raises:
        ValueError: if the backbone's image codes and the codebook differ in number, or an id is no text token.
            TypeError: for a value of the wrong type.
    """

    model_type = "llada_uni"
    sub_configs_defaults: ClassVar[dict[str, Any]] = {
        "text_config": LLaDA2MoeConfig,
        "vision_config": GlmImageVisionConfig,
        "vq_config": GlmImageVQVAEConfig,
    }
    keys_to_ignore_at_inference = ["past_key_values"]

    if TYPE_CHECKING:  # given as dicts or configurations, and kept as configurations
        text_config: LLaDA2MoeConfig | Any = None
        vision_config: GlmImageVisionConfig | Any = None
        vq_config: GlmImageVQVAEConfig | Any = None
    else:
        text_config: dict | PreTrainedConfig | None = None
        vision_config: dict | PreTrainedConfig | None = None
        vq_config: dict | PreTrainedConfig | None = None
    image_token_id: int | None = None
    image_start_token_id: int | None = None
    image_end_token_id: int | None = None
    begin_of_image_token_id: int | None = None
    grid_token_ids: list[int] | None = None
    tie_word_embeddings: bool = False

    def validate_architecture(self) -> None:
        """Called by `@strict` after initialisation."""
        for name, config_class in self.sub_configs.items():
            if not isinstance(getattr(self, name), config_class):
                raise TypeError(
                    f"`{name}` must be a {config_class.__name__}, got {type(getattr(self, name)).__name__}."
                )
        offset = self.text_config.image_token_offset
        num_codes = self.text_config.vocab_size - (offset or 0)
        if offset is not None and num_codes != self.vq_config.num_embeddings:
            raise ValueError(
                f"`vq_config.num_embeddings` is {self.vq_config.num_embeddings}, but the backbone's vocabulary has "
                f"{num_codes} image codes (`text_config.vocab_size` - `text_config.image_token_offset`)."
            )
        if self.vq_config.latent_channels != self.vision_config.hidden_size:
            raise ValueError(
                f"`vq_config.latent_channels` ({self.vq_config.latent_channels}) must equal "
                f"`vision_config.hidden_size` ({self.vision_config.hidden_size})."
            )
        self._check_image_tokens(offset or self.text_config.vocab_size)

    def _check_image_tokens(self, num_text_ids: int) -> None:
        framing_names = ("image_start_token_id", "image_end_token_id", "begin_of_image_token_id")
        for name in ("image_token_id", *framing_names, "grid_token_ids"):
            check_token_id(name, getattr(self, name), num_text_ids)
        framing = {getattr(self, name) for name in framing_names} - {None}
        if self.image_token_id in framing:
            raise ValueError(f"`image_token_id` ({self.image_token_id}) is one of the tokens that frame an image.")
        sizes = self.grid_token_ids or []
        if len(set(sizes)) != len(sizes) or set(sizes) & framing:
            raise ValueError("`grid_token_ids` must differ from each other and from the tokens that frame an image.")
