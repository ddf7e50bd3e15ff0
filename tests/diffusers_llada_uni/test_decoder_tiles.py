"""Images that are drawn in tiles: each as if it were alone, and nothing changes where one tile holds all."""

import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, FlowMatchEulerDiscreteScheduler

from diffusers_llada_uni import LLaDAUniPipeline
from diffusers_llada_uni.decoder_tiles import DecoderTiles
from tests.diffusers_llada_uni.training.decoder_common import CODES, make_components


SIDE = 4  # latents of a code, at the `upscale` of 2


@pytest.fixture(scope="module")
def components():
    transformer, semantic_embedder = make_components()
    transformer.register_to_config(axes_lens=[100, 16, 16])
    for parameter in transformer.parameters():  # pads are zero, and norms one, at first
        torch.nn.init.normal_(parameter, std=0.3)
    return {
        "model": None,
        "processor": None,
        "semantic_embedder": semantic_embedder,
        "vae": AutoencoderKL(latent_channels=4, block_out_channels=[8], norm_num_groups=4),
        "transformer": transformer.eval(),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=6.0),
        "transformer_turbo": None,
        "scheduler_turbo": None,
    }


def pipe_of(components, tile_size):
    pipe = LLaDAUniPipeline(**components, decoder_tile_size=tile_size)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def inputs(height, width, batch_size=2):
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(CODES, (batch_size, height, width), generator=generator)
    return codes, torch.randn(batch_size, 4, SIDE * height, SIDE * width, generator=generator)


def decoded(pipe, codes, latents, **settings):
    settings = {"num_inference_steps": 4, "output_type": "latent", **settings}
    return pipe.decode_codes(codes, latents=latents, **settings)


@pytest.mark.parametrize("grid", [(2, 2), (4, 2), (3, 5), (5, 7), (1, 9)])
@pytest.mark.parametrize("scale", [1, 3])
def test_what_is_split_is_joined(grid, scale):
    tiles = DecoderTiles.of(grid, 2)
    whole = torch.randn(3, 4, scale * grid[0], scale * grid[1])
    parts = tiles.split(whole, scale)
    assert parts.shape == (3 * len(tiles), 4, scale * min(2, grid[0]), scale * 2)
    torch.testing.assert_close(tiles.join(parts, grid, scale), whole)


def test_tiles_at_the_edge_overlap_and_their_mean_counts():
    tiles = DecoderTiles.of((3, 4), 2)
    assert (tiles.rows, tiles.columns) == ((0, 1), (0, 2))
    parts = torch.stack([torch.full((2, 2), float(number)) for number in range(4)])
    joined = tiles.join(parts, (3, 4))
    assert joined.tolist() == [[[0, 0, 1, 1], [1, 1, 2, 2], [2, 2, 3, 3]]]


@pytest.mark.parametrize("guidance", [0.0, 1.0])
def test_each_tile_is_drawn_as_if_it_were_alone(components, guidance):
    codes, latents = inputs(4, 6)
    together = decoded(pipe_of(components, 2), codes, latents, decoder_guidance_scale=guidance)
    alone = pipe_of(components, None)
    for row in range(0, 4, 2):
        for column in range(0, 6, 2):
            part = latents[..., SIDE * row : SIDE * (row + 2), SIDE * column : SIDE * (column + 2)]
            expected = decoded(
                alone, codes[:, row : row + 2, column : column + 2], part, decoder_guidance_scale=guidance
            )
            found = together[..., SIDE * row : SIDE * (row + 2), SIDE * column : SIDE * (column + 2)]
            torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)
    assert not torch.allclose(together, decoded(alone, codes, latents, decoder_guidance_scale=guidance), atol=1e-2)


def test_one_tile_is_the_whole_image(components):
    codes, latents = inputs(3, 2)
    expected = decoded(pipe_of(components, None), codes, latents)
    assert torch.equal(decoded(pipe_of(components, 3), codes, latents), expected)


def test_tiles_may_make_what_the_decoder_has_no_positions_for(components):
    codes, latents = inputs(5, 10, batch_size=1)
    with pytest.raises(ValueError, match="A grid of 5 x 10 codes"):
        decoded(pipe_of(components, None), codes, latents)
    images = decoded(pipe_of(components, 4), codes, latents, output_type="pil")
    assert [image.size for image in images] == [(10 * SIDE, 5 * SIDE)]
    with pytest.raises(ValueError, match="A grid of 5 x 9 codes"):
        decoded(pipe_of(components, 9), codes, latents)


def test_the_checkpoint_says_so(components, tmp_path):
    pipe_of(components, 2).save_pretrained(tmp_path)
    assert DiffusionPipeline.from_pretrained(tmp_path, model=None, processor=None).config["decoder_tile_size"] == 2
    pipe = DiffusionPipeline.from_pretrained(tmp_path, model=None, processor=None, decoder_tile_size=3)
    assert pipe.code_decoder.tile_size == 3


@pytest.mark.parametrize("size, error", [(0, ValueError), (-1, ValueError), (1.5, TypeError), (True, TypeError)])
def test_bad_tile_sizes(components, size, error):
    with pytest.raises(error, match="`decoder_tile_size`"):
        LLaDAUniPipeline(**components, decoder_tile_size=size)
