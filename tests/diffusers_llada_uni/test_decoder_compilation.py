"""A compiled decoder: the same images, compiled once for all sizes; and its float8, as far as a CPU goes."""

import pytest
import torch
from diffusers import ZImageTransformer2DModel
from transformers.utils import is_torch_greater_or_equal

from diffusers_llada_uni.decoder_compilation import RealRotaryAttnProcessor, quantize_decoder
from tests.diffusers_llada_uni.test_stepped_decoder import make_pipeline, make_transformer, seeded


@pytest.fixture
def transformer():
    return make_transformer()


class CountingBackend:
    def __init__(self):
        self.num_graphs = 0

    def __call__(self, graph, inputs):
        self.num_graphs += 1
        return graph.forward


def decode(pipe, grid, batch_size=1, **kwargs):
    codes = torch.randint(0, 64, (batch_size, *grid), generator=seeded(0))
    arguments = {"num_inference_steps": 3, "output_type": "latent", **kwargs}
    return pipe.decode_codes(codes, generator=seeded(0), **arguments)


def test_compiled_once_for_all_sizes(transformer, monkeypatch):
    torch._dynamo.reset()
    pipe, backend = make_pipeline(transformer), CountingBackend()
    grids = [(3, 5), (4, 4), (5, 6), (2, 9), (3, 3), (6, 6), (2, 4), (7, 3), (4, 3), (2, 11)]
    expected = [decode(pipe, grid) for grid in grids]
    pipe.compile_decoders(backend=backend)
    assert backend.num_graphs == 0
    refined, refine = [], transformer.context_refiner[0].forward
    monkeypatch.setattr(transformer.context_refiner[0], "forward", lambda *args: refined.append(0) or refine(*args))
    for grid, latents in zip(grids, expected, strict=True):
        torch.testing.assert_close(decode(pipe, grid), latents)
    assert backend.num_graphs == 1
    assert len(refined) == len(grids)  # the condition is computed once an image, as without


def test_compiled_for_several_rows(transformer):
    torch._dynamo.reset()
    pipe, backend = make_pipeline(transformer), CountingBackend()
    calls = [((3, 5), 2, "turbo"), ((4, 4), 5, "turbo"), ((4, 5), 1, "normal"), ((3, 7), 3, "normal")]
    expected = [decode(pipe, grid, rows, decoder=decoder) for grid, rows, decoder in calls]
    pipe.compile_decoders(backend=backend)
    for (grid, rows, decoder), latents in zip(calls, expected, strict=True):
        torch.testing.assert_close(decode(pipe, grid, rows, decoder=decoder), latents)
    assert backend.num_graphs == 1


def test_every_decoder_is_compiled(transformer):
    pipe, turbo = make_pipeline(transformer), make_transformer(1)
    pipe.register_modules(transformer_turbo=turbo)
    pipe.compile_decoders(backend="eager")
    for decoder in (transformer, turbo):
        compiled = [name for name, module in decoder.named_modules() if module._compiled_call_impl is not None]
        assert compiled == [f"layers.{i}" for i in range(3)]


def test_rotation_in_real_numbers(transformer):
    attention = transformer.layers[0].attention
    hidden_states = torch.randn(2, 5, 48, generator=seeded(0))
    angles = torch.randn(2, 5, 8, generator=seeded(1))
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[0, 3:] = False
    arguments = {"attention_mask": mask, "freqs_cis": torch.polar(torch.ones_like(angles), angles)}
    with torch.no_grad():
        expected = attention(hidden_states, **arguments)
        attention.processor._attention_backend = "_native_math"
        attention.set_processor(RealRotaryAttnProcessor())
        torch.testing.assert_close(attention(hidden_states, **arguments), expected)
        unturned = attention(hidden_states, attention_mask=mask)
    assert not torch.allclose(unturned, expected, atol=1e-3)


def test_the_attention_backend_is_kept(transformer):
    pipe = make_pipeline(transformer)
    transformer.layers[1].attention.processor._attention_backend = "_native_math"
    pipe.compile_decoders(backend="eager")
    backends = [block.attention.processor._attention_backend for block in transformer.layers]
    assert backends == [None, "_native_math", None]


@pytest.fixture
def no_hardware_check(monkeypatch):
    pytest.importorskip("torchao")
    monkeypatch.setattr("torchao.quantization.quant_api._check_hardware_support", lambda granularity: None)


@pytest.mark.skipif(not is_torch_greater_or_equal("2.13"), reason="multiplies float8 by one scale only on a CPU")
def test_float8(transformer, no_hardware_check, tmp_path):
    pipe = make_pipeline(transformer.to(torch.bfloat16))
    pipe.semantic_embedder.to(torch.bfloat16)
    exact = decode(pipe, (3, 5))
    pipe.compile_decoders(float8=True, backend="eager")
    pipe.compile_decoders(float8=True, backend="eager")  # again changes nothing
    quantized = {name for name, weight in transformer.named_parameters() if weight.data.__class__ is not torch.Tensor}
    products = ["attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0"]
    products += [f"feed_forward.w{i}" for i in (1, 2, 3)]
    assert quantized == {f"layers.{i}.{product}.weight" for i in range(3) for product in products}
    latents = decode(pipe, (3, 5))
    assert 0 < (latents - exact).norm() < 0.05 * exact.norm()

    transformer.save_pretrained(tmp_path)
    loaded = ZImageTransformer2DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert type(loaded.layers[0].attention.to_q.weight) is type(transformer.layers[0].attention.to_q.weight)
    pipe.register_modules(transformer_turbo=loaded)
    torch.testing.assert_close(decode(pipe, (3, 5)), latents)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_float8_needs_bfloat16(transformer, dtype):
    pytest.importorskip("torchao")
    pipe = make_pipeline(transformer.to(dtype))
    with pytest.raises(ValueError, match=f"`float8` needs a decoder in torch.bfloat16.*{dtype}"):
        pipe.compile_decoders(float8=True)
    assert all(module._compiled_call_impl is None for module in transformer.modules())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there may be the hardware")
def test_float8_needs_the_hardware(transformer):
    pytest.importorskip("torchao")
    with pytest.raises(ValueError, match="`float8` is not for this machine: .*compute capability"):
        quantize_decoder(transformer.to(torch.bfloat16))


def test_bad_input(transformer):
    pipe = make_pipeline(transformer)
    with pytest.raises(TypeError, match="`float8` must be True or False, got 'e4m3'"):
        pipe.compile_decoders(float8="e4m3")
    pipe.register_modules(transformer=None, transformer_turbo=None)
    with pytest.raises(ValueError, match="No decoder is loaded"):
        pipe.compile_decoders()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("float8", [None, False, True])
def test_on_a_gpu(transformer, float8):
    if float8 and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("multiplies no float8")
    torch._dynamo.reset()
    pipe = make_pipeline(transformer)
    expected = decode(pipe, (4, 5), batch_size=2)
    pipe.to("cuda", torch.bfloat16)
    if float8 is not None:
        pipe.compile_decoders(float8=float8)
    latents = decode(pipe, (4, 5), batch_size=2).cpu()
    assert (latents - expected).norm() < 0.1 * expected.norm()
