"""What the steps of a decoding do to a decoder: nothing that others would see, and rows as they fit."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImageTransformer2DModel
from diffusers.models.normalization import RMSNorm

from diffusers_llada_uni import LLaDAUniPipeline, LLaDAUniSemanticEmbedder, code_decoding, stepped_decoder
from diffusers_llada_uni.fused_norms import with_fused_norms
from diffusers_llada_uni.module_sharing import is_replaced, shallow_copy


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_transformer(seed: int = 0) -> ZImageTransformer2DModel:
    torch.manual_seed(seed)
    sizes = {"dim": 48, "n_layers": 3, "n_refiner_layers": 2, "n_heads": 3, "n_kv_heads": 3, "cap_feat_dim": 32}
    transformer = ZImageTransformer2DModel(**sizes, axes_dims=[4, 6, 6], axes_lens=[512, 32, 32]).eval()
    with torch.no_grad():
        for module in transformer.modules():
            if isinstance(module, RMSNorm):
                module.weight.uniform_(0.5, 1.5)
    return transformer


def make_pipeline(transformer: ZImageTransformer2DModel, vae: AutoencoderKL | None = None) -> LLaDAUniPipeline:
    torch.manual_seed(1)
    pipe = LLaDAUniPipeline(
        model=None,
        processor=None,
        semantic_embedder=LLaDAUniSemanticEmbedder(64, embedding_dim=32).eval(),
        vae=vae,
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
        transformer_turbo=transformer,
        scheduler_turbo=FlowMatchEulerDiscreteScheduler(shift=1.0, stochastic_sampling=True),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def transformer():
    return make_transformer()


def codes_of(seed: int, batch_size: int = 1) -> torch.LongTensor:
    return torch.randint(0, 64, (batch_size, 2, 3), generator=seeded(seed))


def decode(pipe, seed, **kwargs):
    arguments = {"num_inference_steps": 4, "output_type": "latent", **kwargs}
    return pipe.decode_codes(codes_of(seed), generator=seeded(seed), **arguments)


@pytest.mark.parametrize("decoder", ["turbo", "normal"])
def test_threads_with_one_decoder(transformer, decoder):
    pipelines = [make_pipeline(transformer) for _ in range(4)]  # each with a scheduler of its own
    expected = [decode(pipelines[0], seed, decoder=decoder) for seed in range(8)]

    def draw(thread):
        return [decode(pipelines[thread], (thread + turn) % 8, decoder=decoder) for turn in range(8)]

    with ThreadPoolExecutor(4) as threads:
        for thread, drawn in enumerate(threads.map(draw, range(4))):
            for turn, latents in enumerate(drawn):
                assert torch.equal(latents, expected[(thread + turn) % 8])


def test_pipelines_that_share_a_decoder_in_the_midst_of_a_decoding(transformer):
    ours, theirs = make_pipeline(transformer), make_pipeline(transformer)
    expected, before = decode(theirs, 1), dict(vars(transformer.layers[0]))
    drawn = []

    def callback(pipe, step, timestep, tensors):
        drawn.append(decode(theirs, 1))

    undisturbed = decode(ours, 0)
    assert torch.equal(decode(ours, 0, callback_on_step_end=callback), undisturbed)
    assert len(drawn) == 4 and all(torch.equal(latents, expected) for latents in drawn)
    assert vars(transformer.layers[0]) == before


def record_rows(monkeypatch, transformer):
    rows, embed = [], transformer.t_embedder.forward

    def recorded(time):
        rows.append(len(time))
        return embed(time)

    monkeypatch.setattr(transformer.t_embedder, "forward", recorded)
    return rows


@pytest.mark.parametrize("decoder, parts", [("turbo", [2, 2, 1]), ("normal", [2] * 5)])
def test_rows_are_taken_as_they_fit(transformer, monkeypatch, decoder, parts):
    pipe, rows = make_pipeline(transformer), record_rows(monkeypatch, transformer)
    refined, refine = [], transformer.context_refiner[0].forward
    monkeypatch.setattr(transformer.context_refiner[0], "forward", lambda *args: refined.append(0) or refine(*args))
    shapes = []

    def run():
        rows.clear(), refined.clear()
        return pipe.decode_codes(
            codes_of(0, batch_size=5),
            decoder=decoder,
            num_inference_steps=4,
            generator=seeded(0),  # one for all: the noise of a step is drawn for the whole batch
            output_type="latent",
            callback_on_step_end=lambda pipe, step, timestep, tensors: shapes.append(tensors["latents"].shape[0]),
        )

    whole = run()
    assert rows == [sum(parts)] * pipe.num_timesteps and len(refined) == 1
    monkeypatch.setattr(stepped_decoder, "MAX_TOKENS", 2 * 2 * 24)  # a row has 24 features and as many patches
    split = run()
    assert rows == parts * pipe.num_timesteps and len(refined) == len(parts)
    torch.testing.assert_close(split, whole, atol=1e-5, rtol=0)
    monkeypatch.setattr(stepped_decoder, "MAX_TOKENS", 1)  # one row is the least
    torch.testing.assert_close(run(), whole, atol=1e-5, rtol=0)
    assert set(rows) == {1} and set(shapes) == {5}


def test_images_leave_the_vae_as_they_fit(transformer, monkeypatch):
    torch.manual_seed(0)
    vae = AutoencoderKL(
        latent_channels=16, block_out_channels=(8, 8), norm_num_groups=4, down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, shift_factor=0.1,
    ).eval()  # fmt: skip
    pipe, decoded, vae_decode = make_pipeline(transformer, vae), [], vae.decode

    def recorded(latents, **kwargs):
        decoded.append(len(latents))
        return vae_decode(latents, **kwargs)

    monkeypatch.setattr(vae, "decode", recorded)

    def run():
        return pipe.decode_codes(
            codes_of(0, batch_size=5), num_inference_steps=1, generator=seeded(0), output_type="pt"
        )

    whole = run()
    monkeypatch.setattr(code_decoding, "MAX_PIXELS", 2 * whole[0, 0].numel())
    torch.testing.assert_close(run(), whole)
    monkeypatch.setattr(code_decoding, "MAX_PIXELS", 1)
    torch.testing.assert_close(run(), whole)
    assert decoded == [5, 2, 2, 1, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("offload", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_condition_is_computed_once_under_accelerate(transformer, monkeypatch, offload):
    pipe = make_pipeline(transformer)
    reference = decode(pipe, 0)
    refined, refine = [], transformer.context_refiner[0].feed_forward._forward_silu_gating
    monkeypatch.setattr(
        transformer.context_refiner[0].feed_forward,
        "_forward_silu_gating",
        lambda *args: refined.append(0) or refine(*args),
    )
    pipe.register_modules(transformer=None, scheduler=None)  # the decoder is there twice
    if offload == "enable_sequential_cpu_offload":
        monkeypatch.setattr("accelerate.cpu_offload", cpu_offload_to_the_cpu)
    getattr(pipe, offload)(device="cpu")
    assert torch.equal(decode(pipe, 0), reference) and len(refined) == 1
    assert torch.equal(decode(pipe, 0), reference) and len(refined) == 2


def cpu_offload_to_the_cpu(model, device, **kwargs):
    """diffusers says "cpu:0", which accelerate takes for another device."""
    from accelerate.big_modeling import cpu_offload

    return cpu_offload(model, torch.device("cpu"), **kwargs)


def test_shallow_copy():
    module = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    module.compile(backend="eager")
    other = torch.nn.Linear(2, 2)
    copied = shallow_copy(module, **{"1": other})
    assert copied[0] is module[0] and copied[1] is other and module[1] is not other
    assert type(copied) is torch.nn.Sequential and copied._compiled_call_impl is None
    assert module._compiled_call_impl is not None
    inputs = torch.randn(3, 2, generator=seeded(0))
    assert torch.equal(copied(inputs), other(module[0](inputs)))


def test_copies_of_copies_under_accelerate():
    module, calls = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)), []

    class Recorded(ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            calls.append(module)
            return args, kwargs

        def post_forward(self, module, output):
            return 2 * output

    add_hook_to_module(module, Recorded())
    copied = shallow_copy(shallow_copy(module), **{"1": torch.nn.Identity()})
    inputs = torch.randn(3, 2, generator=seeded(0))
    assert torch.equal(copied(inputs), 2 * module[0](inputs)) and calls == [module]
    assert not is_replaced(module) and not is_replaced(copied)
    remove_hook_from_module(module)  # leaves a `forward` that is the class's
    assert not is_replaced(module) and torch.equal(shallow_copy(module)(inputs), module(inputs))
    module.forward = lambda inputs: inputs
    assert is_replaced(module)


def test_fused_norms(transformer):
    velocities = {}
    arguments = ([torch.randn(16, 1, 4, 6, generator=seeded(0))], torch.tensor([0.5]), [torch.ones(6, 32)])
    with torch.no_grad():
        exact = transformer(*arguments, return_dict=False)[0][0]
        assert with_fused_norms(transformer) is transformer  # for half precision only
        half = copy.deepcopy(transformer).to(torch.bfloat16)
        arguments = ([arguments[0][0].bfloat16()], arguments[1], [arguments[2][0].bfloat16()])
        before = dict(half.named_modules())
        fused = with_fused_norms(half)
        for name, model in {"half": half, "fused": fused}.items():
            velocities[name] = model(*arguments, return_dict=False)[0][0].float()
    assert not any(type(module) is RMSNorm for name, module in fused.named_modules() if not name.endswith(".norm"))
    assert dict(half.named_modules()) == before and any(type(module) is RMSNorm for module in half.modules())
    assert {id(p) for p in fused.parameters()} == {id(p) for p in half.parameters()}
    errors = {name: (velocity - exact).norm() / exact.norm() for name, velocity in velocities.items()}
    assert 0 < errors["fused"] < 1.1 * errors["half"] < 0.05
    assert not torch.equal(velocities["fused"], velocities["half"])


def test_fused_norms_leave_alone_what_others_have_changed(transformer):
    half = transformer.to(torch.bfloat16)
    half.layers[0].compile(backend="eager")
    replaced = half.layers[1].attention_norm1
    replaced.forward = lambda hidden_states: hidden_states
    fused = with_fused_norms(half)
    assert fused.layers[0] is half.layers[0]
    assert fused.layers[1].attention_norm1 is replaced and fused.layers[1].ffn_norm1 is not half.layers[1].ffn_norm1
