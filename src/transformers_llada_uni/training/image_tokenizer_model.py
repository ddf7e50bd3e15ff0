"""The image tokenizer beside a text tower: the module that its training trains."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel


# Where SigLIP starts (arXiv 2303.15343, section 3.2).
INITIAL_SCALE, INITIAL_BIAS = 10.0, -10.0


@dataclass
class ImageTokenizerOutput:
    """
    Args:
        image_embeds, text_embeds: `(batch, width)`, of length one.
        features: `(patches, embed_dim)`, of length one: what is quantised.
        codes: `(patches,)`.
        commitment_loss, codebook_loss, reconstruction_loss: Scalars.
    """

    image_embeds: torch.Tensor
    text_embeds: torch.Tensor
    features: torch.Tensor
    codes: torch.LongTensor
    commitment_loss: torch.Tensor
    codebook_loss: torch.Tensor
    reconstruction_loss: torch.Tensor


class ImageTokenizerWithText(nn.Module):
    r"""
    Features h of a picture's patches and their codes e, both of length one as the released quantiser has them; codes
    pass to the loss as h + (e - h), whose gradient is that of h (straight-through). Their mean over the picture is
    compared with its caption; each code, through two linear layers, with the pixels of its patch.

    Args:
        visual: The vision tower (`model.visual`). vqmodel: The quantiser (`model.vqmodel`).
        text_model ([`~transformers.PreTrainedModel`]): A text encoder; its `pooler_output` is taken, or else the mean
            of its last hidden states.
    """

    def __init__(self, visual: nn.Module, vqmodel: nn.Module, text_model: PreTrainedModel):
        super().__init__()
        self.visual, self.vqmodel, self.text_model = visual, vqmodel, text_model
        num_codes, embed_dim = vqmodel.quantize.embedding.weight.shape
        width = text_model.config.get_text_config().hidden_size
        channels, num_pixels = vqmodel.post_quant_conv.out_channels, visual.patch_embed.proj.weight[0].numel()
        self.image_projection = nn.Linear(channels, width)
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
    ) -> ImageTokenizerOutput:
        hidden_states = self.visual(pixel_values, grid_thw=image_grid_thw).last_hidden_state
        # A 1 x 1 convolution sees each patch alone: the patches of all pictures are one row of them.
        as_row = hidden_states.T[None, :, None]  # [1, channels, 1, patches]
        encoded = self.vqmodel.encode(as_row)
        codes = encoded.image_tokens
        features = F.normalize(self.vqmodel.quant_conv(as_row)[0, :, 0].T, dim=-1)
        chosen = F.normalize(self.vqmodel.quantize.embedding.weight, dim=-1)[codes]
        quantized = self.vqmodel.post_quant_conv(encoded.quantized_last_hidden_state)[0, :, 0].T
        lengths = image_grid_thw.prod(dim=-1).tolist()
        pooled = torch.stack([patches.mean(dim=0) for patches in quantized.split(lengths)])

        text = self.text_model(input_ids=input_ids, attention_mask=attention_mask)
        text_embeds = getattr(text, "pooler_output", None)
        if text_embeds is None:
            mask = attention_mask[..., None].to(text.last_hidden_state.dtype)
            text_embeds = (text.last_hidden_state * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)
        return ImageTokenizerOutput(
            image_embeds=F.normalize(self.image_projection(pooled), dim=-1),
            text_embeds=F.normalize(text_embeds, dim=-1),
            features=features,
            codes=codes,
            commitment_loss=(features - chosen.detach()).square().sum(dim=-1).mean(),
            codebook_loss=(features.detach() - chosen).square().sum(dim=-1).mean(),
            reconstruction_loss=F.mse_loss(self.pixel_projection(quantized), pixel_values),
        )

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
        Sets codes that are used less than `threshold` times the mean to features of this batch, drawn at random.

        Returns:
            How many codes that were.
        """
        is_dead = self.code_counts < threshold * self.code_counts.mean()
        num_dead = int(is_dead.sum())
        if num_dead:
            drawn = torch.randint(len(features), (num_dead,), generator=generator).to(features.device)
            replacements = features.detach()[drawn].float()
            if dist.is_available() and dist.is_initialized():
                dist.broadcast(replacements, src=0)
            weight = self.vqmodel.quantize.embedding.weight
            weight[is_dead] = replacements.to(weight.dtype)
            mean = self.code_counts.mean()
            self.code_counts[is_dead] = mean
            self.code_sums[is_dead] = replacements * mean
        return num_dead
