"""The image tokenizer beside a text tower: the module that its training trains."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.models.glm_image.modeling_glm_image import GlmImageVisionModel, GlmImageVQVAE


# Of the cosines between a feature and the codes, in the loss of images that share codes.
SHARING_TEMPERATURE = 0.05
# Of the mean cosines between the features of an image and those of a group.
GROUP_TEMPERATURE = 0.1
# Where SigLIP starts (arXiv 2303.15343, section 3.2).
INITIAL_SCALE, INITIAL_BIAS = 10.0, -10.0


@dataclass
class ImageTokenizerOutput:
    """
    Args:
        image_embeds, text_embeds: `(batch, width)`, of length one.
        features: `(patches, embed_dim)`, of length one: what is quantised.
        codes: `(patches,)`.
        commitment_loss, codebook_loss, reconstruction_loss, sharing_loss, group_loss: Scalars.
        sharing_agreement: The share of patches whose own code is the one that they share with others.
    """

    image_embeds: torch.Tensor
    text_embeds: torch.Tensor
    features: torch.Tensor
    codes: torch.LongTensor
    commitment_loss: torch.Tensor
    codebook_loss: torch.Tensor
    reconstruction_loss: torch.Tensor
    sharing_loss: torch.Tensor
    group_loss: torch.Tensor
    sharing_agreement: torch.Tensor


def image_tokenizer_of(model: Any) -> Any:
    """What of a model holds `visual` and `vqmodel`. Raises TypeError if nothing does."""
    holder = getattr(model, "model", model)
    if not hasattr(holder, "visual") or not hasattr(holder, "vqmodel"):
        raise TypeError(f"`model` must hold an image tokenizer, got a {type(model).__name__}.")
    return holder


def image_tokenizer_to_train(model: Any) -> Any:
    """As [`image_tokenizer_of`]. Raises ValueError if its weights are too coarse to be trained in place."""
    holder = image_tokenizer_of(model)
    dtypes = {parameter.dtype for part in (holder.visual, holder.vqmodel) for parameter in part.parameters()}
    if dtypes != {torch.float32}:
        raise ValueError(
            f"`model` must be loaded with `dtype='float32'`, its image tokenizer is in {sorted(map(str, dtypes))}; "
            "`bf16=True` is mixed precision."
        )
    return holder


class Towers(nn.Module):
    """Models of transformers in a module that is none."""

    def activation_checkpointing_enable(self, **settings: Any) -> None:
        """As transformers' Trainer calls it: for all of them that have layers to recompute."""
        for model in self.children():
            can_recompute = any(hasattr(module, "gradient_checkpointing") for module in model.modules())
            if isinstance(model, PreTrainedModel) and can_recompute:
                model.activation_checkpointing_enable(**settings)


def features_of(vqmodel: GlmImageVQVAE, hidden_states: torch.Tensor) -> torch.Tensor:
    """Of the vision tower's `(patches, channels)` what is compared with codes: `(patches, embed_dim)`, of length 1."""
    # A 1 x 1 convolution sees each patch alone: the patches of all images are one row of them.
    as_row = hidden_states.T[None, :, None]  # [1, channels, 1, patches]
    return F.normalize(vqmodel.quant_conv(as_row)[0, :, 0].T, dim=-1)


class ImageTokenizerWithText(Towers):
    r"""
    Features h of an image's patches and their codes e, both of length one as the released quantiser has them; codes
    pass to the loss as h + (e - h), whose gradient is that of h (straight-through). Their mean over the image is
    compared with its caption; each code, through two linear layers, with the pixels of its patch.

    Images may share codes: of `style_ids` the first `num_style_codes` of an image, with a column for each its own, of
    `content_ids` all others.
    What shares a code is the normed mean of its features, so that a code cannot hold what tells such images apart.
    Then an image is put together of what others have, which a language model learns sooner and does for pairs never
    seen.
    The cross-entropy of the shared code, by the cosines of an image's own feature with all codes, teaches an image
    to find its codes when it is alone. That of its group, by the mean cosine of its features with those of all groups
    of the batch (prototypical networks, arXiv 1703.05175), keeps styles and contents apart from each other.

    Args:
        visual: The vision tower (`model.visual`).
        vqmodel: The quantiser (`model.vqmodel`).
        text_model ([`~transformers.PreTrainedModel`]): A text encoder; its `pooler_output` is taken, or else the mean
            of its last hidden states.
        num_style_codes (`int`, defaults to 0): How many of an image's codes belong to its style.
        reconstruction_layers (`int`, defaults to 0): Layers in which the codes of an image see each other before they
            tell pixels. What is shared lies in other patches than what it looks like.
    """

    code_counts: torch.Tensor
    code_sums: torch.Tensor

    def __init__(
        self,
        visual: GlmImageVisionModel,
        vqmodel: GlmImageVQVAE,
        text_model: PreTrainedModel,
        num_style_codes: int = 0,
        reconstruction_layers: int = 0,
    ):
        super().__init__()
        self.num_style_codes = num_style_codes
        self.visual, self.vqmodel, self.text_model = visual, vqmodel, text_model
        num_codes, embed_dim = vqmodel.quantize.embedding.weight.shape
        width = text_model.config.get_text_config().hidden_size
        channels, num_pixels = vqmodel.post_quant_conv.out_channels, visual.patch_embed.proj.weight[0].numel()
        self.image_projection = nn.Linear(channels, width)
        self.pixel_context = None
        if reconstruction_layers:
            num_heads = visual.config.num_heads
            image_size, patch_size = visual.config.image_size, visual.config.patch_size
            assert isinstance(image_size, int) and isinstance(patch_size, int)  # of this vision tower
            side = image_size // patch_size
            layer = nn.TransformerEncoderLayer(
                channels, num_heads, 2 * channels, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
            )
            self.pixel_context = nn.TransformerEncoder(layer, reconstruction_layers, enable_nested_tensor=False)
            positions = 0.02 * torch.randn(side**2, channels)
            self.pixel_positions = nn.Parameter(positions.T.reshape(1, channels, side, side).contiguous())
        self.pixel_projection = nn.Sequential(
            nn.Linear(channels, channels), nn.GELU(), nn.Linear(channels, num_pixels)
        )
        self.logit_scale = nn.Parameter(torch.tensor(INITIAL_SCALE).log())
        self.logit_bias = nn.Parameter(torch.tensor(INITIAL_BIAS))
        # Moving averages: how often a code is used, and the sum of the features that chose it
        self.register_buffer("code_counts", torch.ones(num_codes))
        self.register_buffer("code_sums", F.normalize(vqmodel.quantize.embedding.weight.detach().float(), dim=-1))

    def forward(
        self,
        pixel_values: torch.Tensor,
        image_grid_thw: torch.LongTensor,
        input_ids: torch.LongTensor,
        attention_mask: torch.LongTensor,
        content_ids: torch.LongTensor | None = None,
        style_ids: torch.LongTensor | None = None,
    ) -> ImageTokenizerOutput:
        hidden_states = self.visual(pixel_values, grid_thw=image_grid_thw).last_hidden_state
        text = self.text_model(input_ids=input_ids, attention_mask=attention_mask)
        text_embeds = getattr(text, "pooler_output", None)
        if text_embeds is None:
            mask = attention_mask[..., None].to(text.last_hidden_state.dtype)
            text_embeds = (text.last_hidden_state * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)
        # Which code is nearest is a matter of small differences: mixed precision is for the two towers alone.
        with torch.autocast(hidden_states.device.type, enabled=False):
            return self._quantize(
                hidden_states.float(), text_embeds.float(), pixel_values, image_grid_thw, content_ids, style_ids
            )

    def _quantize(
        self,
        hidden_states: torch.Tensor,
        text_embeds: torch.Tensor,
        pixel_values: torch.Tensor,
        image_grid_thw: torch.LongTensor,
        content_ids: torch.LongTensor | None,
        style_ids: torch.LongTensor | None,
    ) -> ImageTokenizerOutput:
        features = features_of(self.vqmodel, hidden_states)
        shared, group_loss = features, features.new_zeros(())
        if content_ids is not None and style_ids is not None:
            shared, group_loss = self._share(features, content_ids, style_ids)
        quantized, _, codes = self.vqmodel.quantize(shared.T[None, :, None])
        codebook = F.normalize(self.vqmodel.quantize.embedding.weight, dim=-1)
        chosen = codebook[codes]
        sharing_loss, agreement = features.new_zeros(()), features.new_ones(())
        if content_ids is not None:
            similarity = features @ codebook.detach().T
            sharing_loss = F.cross_entropy(similarity / SHARING_TEMPERATURE, codes)
            agreement = (similarity.argmax(dim=-1) == codes).float().mean()
        quantized = self.vqmodel.post_quant_conv(quantized)[0, :, 0].T
        lengths = image_grid_thw.prod(dim=-1).tolist()
        pooled = torch.stack([patches.mean(dim=0) for patches in quantized.split(lengths)])
        return ImageTokenizerOutput(
            image_embeds=F.normalize(self.image_projection(pooled), dim=-1),
            text_embeds=F.normalize(text_embeds, dim=-1),
            features=features,
            codes=codes,
            commitment_loss=(features - chosen.detach()).square().sum(dim=-1).mean(),
            codebook_loss=(features.detach() - chosen).square().sum(dim=-1).mean(),
            reconstruction_loss=F.mse_loss(self._pixels(quantized, image_grid_thw), pixel_values),
            sharing_loss=sharing_loss,
            group_loss=group_loss,
            sharing_agreement=agreement,
        )

    def _share(
        self, features: torch.Tensor, content_ids: torch.LongTensor, style_ids: torch.LongTensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        `features` `(patches, embed_dim)`, each the mean of those that share its code; the loss of groups. `style_ids`
        are `(images, 1)`, one style for all style codes, or `(images, num_style_codes)`.
        """
        by_image, split = features.unflatten(0, (len(content_ids), -1)), self.num_style_codes
        styles = zip(by_image[:, :split].chunk(style_ids.shape[1], dim=1), style_ids.unbind(dim=1), strict=True)
        shared, group_loss = [], features.new_zeros(())
        for part, ids in (*styles, (by_image[:, split:], content_ids)):
            means, groups = _means_of_groups(part, ids)
            shared.append(means[groups])
            similarity = part.flatten(1) @ means.flatten(1).T / part.shape[1]
            group_loss = group_loss + F.cross_entropy(similarity / GROUP_TEMPERATURE, groups)
        return torch.cat(shared, dim=1).flatten(0, 1), group_loss

    def _pixels(self, quantized: torch.Tensor, image_grid_thw: torch.LongTensor) -> torch.Tensor:
        """What the codes `(patches, channels)` tell of the pixels of their patches."""
        if self.pixel_context is not None:
            _, *grid = image_grid_thw[0].tolist()  # one size, or the images do not make a batch
            positions = F.interpolate(self.pixel_positions, grid, mode="bilinear").flatten(2).mT
            by_image = quantized.unflatten(0, (len(image_grid_thw), -1)) + positions
            quantized = self.pixel_context(by_image).flatten(0, 1)
        return self.pixel_projection(quantized)

    @torch.no_grad()
    def update_codebook(
        self, features: torch.Tensor, codes: torch.LongTensor, decay: float, moves_codes: bool
    ) -> torch.Tensor:
        """
        Counts how often each code was used, in all processes, and with `moves_codes` sets the codes to the moving
        averages of the features that chose them: N <- d N + (1 - d) n, m <- d m + (1 - d) sum h, e = m / N.

        Returns:
            `(codes,)`, the counts of this batch.
        """
        counts = torch.zeros_like(self.code_counts).index_add(0, codes, torch.ones_like(codes, dtype=torch.float32))
        sums = torch.zeros_like(self.code_sums).index_add(0, codes, features.detach().float())
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(counts)
            dist.all_reduce(sums)
        self.code_counts.lerp_(counts, 1 - decay)
        self.code_sums.lerp_(sums, 1 - decay)
        if moves_codes:
            weight = self.vqmodel.quantize.embedding.weight
            means = self.code_sums / self.code_counts.clamp(min=1e-5)[:, None]
            # Only the direction of a code counts; at its full length rounding does least harm.
            weight.copy_(F.normalize(means, dim=-1).to(weight.dtype))
        return counts

    @torch.no_grad()
    def revive_dead_codes(self, features: torch.Tensor, threshold: float, generator: torch.Generator) -> int:
        """
        Sets codes that are used less than `threshold` times the mean to features of this batch, drawn at random by
        their squared distance to the nearest code, as k-means++ does (Arthur and Vassilvitskii 2007): where codes are
        dense another would only split what belongs together.

        Returns:
            How many codes that were.
        """
        is_dead = self.code_counts < threshold * self.code_counts.mean()
        num_dead = int(is_dead.sum())
        if num_dead:
            features = features.detach().float()
            codebook = F.normalize(self.vqmodel.quantize.embedding.weight.float(), dim=-1)
            distances = (1 - (features @ codebook.T).amax(dim=-1)).clamp(min=1e-9).cpu()
            drawn = torch.multinomial(distances, num_dead, replacement=True, generator=generator).to(features.device)
            replacements = features[drawn]
            if dist.is_available() and dist.is_initialized():
                dist.broadcast(replacements, src=0)
            weight = self.vqmodel.quantize.embedding.weight
            weight[is_dead] = replacements.to(weight.dtype)
            mean = self.code_counts.mean()
            self.code_counts[is_dead] = mean
            self.code_sums[is_dead] = replacements * mean
        return num_dead


def _means_of_groups(features: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of `features` `(batch, ...)` with equal `ids` the mean, of length one, and the number of each row's mean."""
    names, groups = ids.unique(return_inverse=True)
    sums = features.new_zeros(len(names), *features.shape[1:]).index_add(0, groups, features)
    return F.normalize(sums, dim=-1), groups
