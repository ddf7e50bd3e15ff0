"""A decoder small enough to learn within a test, and images it can learn: what its trainers' tests share."""

import torch
from datasets import Dataset
from diffusers import FlowMatchEulerDiscreteScheduler, ZImageTransformer2DModel

from diffusers_llada_uni import LLaDAUniPipeline, LLaDAUniSemanticEmbedder


CODES = 2
RUN = {
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
    "lr_scheduler_type": "cosine",
    "logging_steps": 25,
    "save_strategy": "no",
}
# What a code looks like in the latents: 4 x 4 of one colour of 4 channels. An image shows all of its codes like this
# or all negated: a decoder that averages the two has learnt nothing.
LOOKS = torch.randn(8, 1, 1, 4, generator=torch.Generator().manual_seed(0))[:CODES].expand(CODES, 4, 4, 4).contiguous()


def make_components(seed: int = 0) -> tuple[ZImageTransformer2DModel, LLaDAUniSemanticEmbedder]:
    torch.manual_seed(seed)
    transformer = ZImageTransformer2DModel(
        all_patch_size=(2,),
        all_f_patch_size=(1,),
        in_channels=4,
        dim=48,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=3,
        n_kv_heads=3,
        cap_feat_dim=32,
        axes_dims=[4, 6, 6],
        axes_lens=[256, 32, 32],
        siglip_feat_dim=None,
    )
    return transformer, LLaDAUniSemanticEmbedder(codebook_size=CODES, embedding_dim=32)


def latents_of(codes: torch.LongTensor) -> torch.Tensor:
    """The clean latents `(batch, 4, 4H, 4W)` of codes `(batch, H, W)`, before the sign."""
    batch_size, height, width = codes.shape
    return LOOKS[codes].permute(0, 3, 1, 4, 2, 5).reshape(batch_size, 4, 4 * height, 4 * width)


def dataset_of_images(num_rows: int, seed: int = 1, grid: tuple[int, int] = (1, 1)) -> Dataset:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, CODES, (num_rows, *grid), generator=generator)
    signs = torch.randint(0, 2, (num_rows, 1, 1, 1), generator=generator) * 2 - 1
    latents = signs * latents_of(codes)
    latents = latents + 0.1 * torch.randn(latents.shape, generator=generator)
    return Dataset.from_dict(
        {
            "codes": codes.flatten(1).tolist(),
            "grid": [list(grid)] * num_rows,
            "latents": latents.flatten(1).tolist(),
        }
    )


def make_pipeline(transformer, semantic_embedder, transformer_turbo=None) -> LLaDAUniPipeline:
    pipe = LLaDAUniPipeline(
        model=None,
        processor=None,
        semantic_embedder=semantic_embedder,
        vae=None,
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
        transformer_turbo=transformer if transformer_turbo is None else transformer_turbo,
        scheduler_turbo=FlowMatchEulerDiscreteScheduler(shift=1.0, stochastic_sampling=True),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def image_error(pipe: LLaDAUniPipeline, decoder: str, num_inference_steps: int | None = None, **settings) -> float:
    """Mean square distance of decoded latents from the nearer of the two images that their codes stand for."""
    codes = torch.randint(0, CODES, (64, 1, 1), generator=torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(0)
    latents = pipe.decode_codes(
        codes, decoder, num_inference_steps, generator=generator, output_type="latent", **settings
    )
    clean = latents_of(codes)
    distances = [(latents - sign * clean).square().mean(dim=(1, 2, 3)) for sign in (1, -1)]
    return torch.minimum(*distances).mean().item()
