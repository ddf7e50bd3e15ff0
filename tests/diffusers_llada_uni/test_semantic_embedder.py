import pytest
import torch
from safetensors.torch import load_file

from diffusers_llada_uni import LLaDAUniSemanticEmbedder


@pytest.fixture
def released(official_tiny):
    return torch.load(official_tiny / "image_tokenizer" / "sigvq_embedding.pt", weights_only=True)


@pytest.fixture
def embedder(released):
    model = LLaDAUniSemanticEmbedder(codebook_size=256, embedding_dim=64)
    model.load_state_dict(released)
    return model.requires_grad_(False)


def test_released_features(official_tiny, embedder):
    expected = load_file(official_tiny / "expected" / "decoder.safetensors")
    codes = expected["token_ids"].view(1, *expected["grid"].tolist())
    torch.testing.assert_close(embedder(codes).sample[0], expected["features"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("upscale", [1, 2, 3])
def test_upscaling_repeats_codes(embedder, upscale):
    codes = torch.randint(256, (2, 3, 5), generator=torch.Generator().manual_seed(0))
    repeated = codes.repeat_interleave(upscale, 1).repeat_interleave(upscale, 2)
    features = embedder(codes, upscale=upscale).sample
    assert features.shape == (2, upscale**2 * 15, 64)
    torch.testing.assert_close(features, embedder(repeated, upscale=1, return_dict=False)[0])


def test_each_row_has_its_own_features(embedder):
    codes = torch.arange(24).view(2, 3, 4)
    features = embedder(codes).sample
    torch.testing.assert_close(features[1:], embedder(codes[1:]).sample)
    assert not torch.allclose(features[0], features[1])


def test_widths():
    model = LLaDAUniSemanticEmbedder(codebook_size=10, embedding_dim=4, hidden_dim=6, out_dim=8)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert shapes == {
        "prior_token_embedding.weight": (10, 4),
        "prior_projector.net.0.proj.weight": (6, 4),
        "prior_projector.net.0.proj.bias": (6,),
        "prior_projector.net.2.weight": (8, 6),
        "prior_projector.net.2.bias": (8,),
    }
    assert model(torch.zeros(1, 2, 2, dtype=torch.long)).sample.shape == (1, 16, 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_and_load(embedder, released, tmp_path, dtype):
    embedder.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.bin"))
    loaded = LLaDAUniSemanticEmbedder.from_pretrained(tmp_path, dtype=dtype)
    assert loaded.dtype == dtype and loaded.config.codebook_size == 256
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, released[name].to(dtype))
    assert loaded(torch.zeros(1, 2, 2, dtype=torch.long)).sample.dtype == dtype


@pytest.mark.parametrize(
    "codes, upscale, words",
    [
        (torch.zeros(2, 2, dtype=torch.long), 2, r"`codes`.*\(batch, H, W\).*\(2, 2\)"),
        (torch.zeros(1, 2, 2), 2, "`codes`.*float32"),
        (torch.zeros(1, 2, 2, dtype=torch.bool), 2, "`codes`.*bool"),
        (torch.zeros(1, 2, 2, dtype=torch.long), 0, "`upscale`.*at least 1.*0"),
    ],
)
def test_bad_input(embedder, codes, upscale, words):
    with pytest.raises(ValueError, match=words):
        embedder(codes, upscale=upscale)


def test_trains(embedder):
    embedder.requires_grad_(True)
    embedder(torch.zeros(1, 2, 2, dtype=torch.long)).sample.square().mean().backward()
    assert all(parameter.grad is not None for parameter in embedder.parameters())
