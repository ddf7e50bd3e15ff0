"""Few-step distillation: the formula, the twin, and that one step does what many did."""

import pytest
import torch
from datasets import Dataset
from diffusers import FlowMatchEulerDiscreteScheduler

from diffusers_llada_uni import LLaDAUniPipeline
from diffusers_llada_uni.decoders import SCHEDULER_SETTINGS
from diffusers_llada_uni.training import (
    LLaDAUniDistillationConfig,
    LLaDAUniDistillationTrainer,
)
from diffusers_llada_uni.training.distillation_objective import DIFFERENCE, OWN_SHARE, draw_noise
from diffusers_llada_uni.training.distillation_trainer import Jumps
from diffusers_llada_uni.training.flow_matching import noised
from diffusers_llada_uni.training.twin_decoder import TwinDecoder
from tests.common import assert_resumed_equals_uninterrupted
from tests.diffusers_llada_uni.training.decoder_common import (
    RUN,
    dataset_of_images,
    make_components,
    make_pipeline,
)
from transformers_llada_uni.training.objective.noise import step_generators


def make_trainer(output_dir, components=None, **settings):
    settings = {"per_device_train_batch_size": 6, **settings}
    return LLaDAUniDistillationTrainer(
        *(make_components() if components is None else components),
        args=LLaDAUniDistillationConfig(str(output_dir), **{**RUN, **settings}),
        train_dataset=dataset_of_images(512, seed=5),
    )


def batch_of(trainer, num_rows=12):
    return trainer.data_collator([trainer.train_dataset[i] for i in range(num_rows)])


@pytest.mark.parametrize("guidance_scale", [0.0, 1.0])
def test_the_teacher_leads_as_the_pipeline_does(tmp_path, guidance_scale):
    trainer = make_trainer(tmp_path, teacher_guidance_scale=guidance_scale)
    inputs = batch_of(trainer, 3)
    points = [torch.randn(4, 4, 4, generator=torch.Generator().manual_seed(row)) for row in range(3)]
    pipe = make_pipeline(*make_components())
    ends = pipe.decode_codes(
        torch.stack(inputs["codes"]), "normal", 2, guidance_scale, latents=torch.stack(points), output_type="latent"
    )
    # With two points on the schedule there is one step: all the way
    velocities = trainer.teacher_velocity(points, torch.ones(3), inputs["codes"])
    torch.testing.assert_close(torch.stack(points) + torch.stack(velocities), ends, atol=1e-5, rtol=1e-4)


def test_loss_equals_the_formula(tmp_path):
    trainer = make_trainer(tmp_path, seed=1)
    trainer.model.eval()
    with torch.no_grad():
        trainer.model.twin.normal_(generator=torch.Generator().manual_seed(0))
    inputs = batch_of(trainer)
    codes, latents = inputs["codes"], inputs["latents"]
    loss = trainer.compute_loss(trainer.model, inputs)
    trainer.callback_handler.call_event("on_evaluate", trainer.args, trainer.state, trainer.control)
    shown = torch.ones(1, dtype=torch.bool)
    total, kinds = 0, []

    def velocity(point, sigma, code, is_twin=False):
        return trainer.model([point], 1 - sigma.reshape(1), [code], shown, is_twin)[0]

    def teacher(point, sigma, code):
        return trainer.teacher_velocity([point], sigma.reshape(1), [code])[0]

    def drawn(x, generator):
        sigma = torch.rand((), generator=generator).clamp_min(1e-3)
        return sigma, torch.randn(x.shape, generator=generator)

    for code, x, generator in zip(codes, latents, step_generators(trainer, len(codes)), strict=True):
        sigma, e = drawn(x, generator)
        is_own = torch.rand((), generator=generator) < OWN_SHARE
        kinds.append(bool(is_own))
        if is_own:
            sigma = 1 - torch.randint(4, (), generator=generator) / 4
        point = (1 - sigma) * x + sigma * e
        v = velocity(point, sigma, code)
        if not is_own:
            u = teacher(point, sigma, code)
            above, below = (sigma + DIFFERENCE).clamp_max(1), (sigma - DIFFERENCE).clamp_min(0)
            sides = [velocity(point - (side - sigma) * u, side, code) for side in (above, below)]
            target = u - sigma * (sides[0] - sides[1]) / (above - below)
            total += (v - target).clamp(-1, 1).square().mean()
            continue
        y = point + sigma * v
        for _ in range(2):
            sigma, e = drawn(x, generator)
            total += (velocity((1 - sigma) * y + sigma * e, sigma, code, True) - (y - e)).square().mean()
        sigma, e = drawn(x, generator)
        point = (1 - sigma) * y + sigma * e
        total += (teacher(point, sigma, code) - velocity(point, sigma, code, True)).square().mean()
    assert 0 < sum(kinds) < len(kinds)
    torch.testing.assert_close(loss, total / len(codes), rtol=1e-4, atol=1e-5)


def test_each_part_moves_only_what_it_is_for(tmp_path):
    """The twin learns where the student jumps and does not move it; the student's losses do not move the twin."""
    trainer = make_trainer(tmp_path)
    inputs = batch_of(trainer, 6)
    codes = inputs["codes"]
    generators = step_generators(trainer, 6)
    sigmas = torch.full((6,), 0.5)
    jumps = [torch.zeros(4, 4, 4, requires_grad=True) for _ in range(6)]
    trainer.teacher_velocity = lambda points, sigmas, codes: [torch.full((4, 4, 4), 3.0) for _ in points]
    flows = []

    def forward(points, time, codes, is_conditional, is_twin, in_full_precision):
        assert is_twin
        flows.append([torch.ones(4, 4, 4, requires_grad=True) for _ in points])
        return flows[-1]

    trainer.twin_loss(forward, Jumps(codes, inputs["latents"], sigmas, jumps), generators).backward()
    learnt, asked = flows
    assert len(learnt) == 12 and len(asked) == 6
    assert all(flow.grad is not None for flow in learnt) and all(flow.grad is None for flow in asked)
    # (0 - (0 + 3 - 1))^2: the jump goes where the teacher says more than the twin
    for jump in jumps:
        torch.testing.assert_close(jump.grad, torch.full((4, 4, 4), -2 * 2 / 64))


def test_the_twin_begins_as_the_student_and_stays_out_of_what_is_saved(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=2, learning_rate=1e-3)
    model, inputs = trainer.model, batch_of(trainer, 3)
    call = (inputs["latents"], torch.full((3,), 0.5), inputs["codes"], torch.ones(3, dtype=torch.bool))
    for a, b in zip(model(*call), model(*call, is_twin=True), strict=True):
        assert torch.equal(a, b)
    trainer.train()
    assert model.twin.abs().max() > 0
    assert not torch.equal(model(*call)[0], model(*call, is_twin=True)[0])
    assert trainer.trained_model().transformer.state_dict().keys() == make_components()[0].state_dict().keys()


@pytest.mark.parametrize("is_twin", [False, True])
def test_every_pass_has_a_gradient_for_every_weight(is_twin):
    """As several processes need."""
    transformer, semantic_embedder = make_components()
    model = TwinDecoder(transformer, semantic_embedder.requires_grad_(False))
    inputs = ([torch.randn(4, 4, 4)], torch.tensor([0.5]), [torch.zeros(1, 1, dtype=torch.long)], torch.tensor([True]))
    model(*inputs, is_twin)[0].sum().backward()
    unused = {"transformer.x_pad_token", "transformer.cap_pad_token"}  # where lengths are no multiples of 32
    assert {n for n, weight in model.named_parameters() if weight.requires_grad and weight.grad is None} <= unused
    assert bool(model.twin.grad.abs().max() > 0) == is_twin


def test_the_derivative_is_computed_in_full_precision(tmp_path):
    """Also where accelerate puts an autocast around the model."""
    trainer = make_trainer(tmp_path, bf16=True, max_steps=1, seed=1)
    passes = []
    layer = trainer.model.transformer.layers[0].attention.to_q
    layer.register_forward_hook(lambda layer, inputs, output: passes.append((torch.is_grad_enabled(), output.dtype)))
    trainer.train()
    # The student's passes with a gradient; those for the derivative and for the twin's velocity without
    assert {dtype for has_gradient, dtype in passes if has_gradient} == {torch.bfloat16}
    assert torch.float32 in {dtype for has_gradient, dtype in passes if not has_gradient}


@pytest.mark.parametrize("batch_size", [1, 2])
def test_batches_may_be_small(tmp_path, batch_size):
    trainer = make_trainer(
        tmp_path, per_device_train_batch_size=batch_size, max_steps=6, logging_steps=1, learning_rate=1e-3
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 6 and all(0 < loss < 100 for loss in losses)


def test_one_step_ends_where_many_did(trained_decoder, tmp_path):
    """Nearer by a quarter to the teacher's images of the same noise than the teacher comes in one step."""
    _, folder = trained_decoder
    transformer, semantic_embedder = (
        type(part).from_pretrained(folder / name)
        for part, name in zip(make_components(), ("transformer", "semantic_embedder"), strict=True)
    )
    trainer = make_trainer(
        tmp_path,
        (transformer, semantic_embedder),
        max_steps=40,
        per_device_train_batch_size=8,
        learning_rate=2e-3,
    )
    trainer.train()
    trainer.save_model()
    student = type(transformer).from_pretrained(tmp_path / "transformer_turbo")
    passes = []
    student.register_forward_pre_hook(lambda *_: passes.append(1))

    def ends(pipe, *settings):
        codes = torch.arange(32).view(32, 1, 1) % 2
        noise = torch.randn(32, 4, 4, 4, generator=torch.Generator().manual_seed(7))
        return pipe.decode_codes(codes, *settings, latents=noise, output_type="latent")

    pipe, undistilled = (make_pipeline(transformer, semantic_embedder, turbo) for turbo in (student, None))
    wanted = ends(pipe, "normal", 16)
    distance = (ends(pipe, "turbo", 1) - wanted).square().mean()
    assert len(passes) == 1
    assert distance < 0.75 * (ends(undistilled, "turbo", 1) - wanted).square().mean()


def test_a_student_of_guidance_says_in_one_pass_what_the_teacher_says_in_two(trained_decoder, tmp_path):
    """Most of the way from the unguided teacher to the guided one, sampled as the teacher is."""
    _, folder = trained_decoder
    transformer, semantic_embedder = (
        type(part).from_pretrained(folder / name)
        for part, name in zip(make_components(), ("transformer", "semantic_embedder"), strict=True)
    )
    settings = {"objective": "guidance", "scheduler_shift": 2.0, "teacher_guidance_scale": 2.0}
    trainer = make_trainer(tmp_path, (transformer, semantic_embedder), **settings)
    inputs = batch_of(trainer, 32)
    trainer.model.eval()
    sigmas, noise = draw_noise(inputs["latents"], step_generators(trainer, 32))
    trainer.callback_handler.call_event("on_evaluate", trainer.args, trainer.state, trainer.control)
    points = noised(inputs["latents"], noise, sigmas)
    alone = trainer.model(points, 1 - sigmas, inputs["codes"], torch.ones(32, dtype=torch.bool))
    guided = trainer.teacher_velocity(points, sigmas, inputs["codes"])
    errors = [(v - u).square().mean() for v, u in zip(alone, guided, strict=True)]
    torch.testing.assert_close(trainer.loss(trainer.model, inputs), torch.stack(errors).mean(), rtol=1e-4, atol=1e-6)
    assert torch.stack(errors).mean() > 1e-3

    trained = {"max_steps": 50, "per_device_train_batch_size": 16, "learning_rate": 2e-3}
    trainer = make_trainer(tmp_path, (transformer, semantic_embedder), **settings, **trained)
    trainer.train()
    trainer.save_model()
    student = trainer.components()["transformer_turbo"]
    assert student is not transformer
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path / "scheduler_turbo")
    assert (scheduler.config["shift"], scheduler.config["stochastic_sampling"]) == (2.0, False)
    with torch.no_grad():
        trainer.model.eval()
        taught = trainer.model(points, 1 - sigmas, inputs["codes"], torch.ones(32, dtype=torch.bool))
    left = torch.stack([(v - u).square().mean() for v, u in zip(taught, guided, strict=True)])
    assert left.mean() < 0.5 * torch.stack(errors).mean()


def test_the_result_is_a_part_of_a_pipeline(converted_dir, tmp_path):
    pipe = LLaDAUniPipeline.from_pretrained(converted_dir)
    old = {name: tensor.clone() for name, tensor in pipe.transformer.state_dict().items()}
    latents = [0.0] * (pipe.transformer.config["in_channels"] * 64)
    trainer = LLaDAUniDistillationTrainer(
        pipe.transformer,
        pipe.semantic_embedder,
        args=LLaDAUniDistillationConfig(str(tmp_path), max_steps=1, **RUN),
        train_dataset=Dataset.from_dict({"codes": [[1, 2, 3, 4]], "grid": [[2, 2]], "latents": [latents]}),
    )
    trainer.train()
    trainer.save_model()
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == [
        "scheduler_turbo",
        "transformer_turbo",
    ]
    assert all(torch.equal(old[name], tensor) for name, tensor in pipe.transformer.state_dict().items())
    turbo = {
        "transformer_turbo": type(pipe.transformer).from_pretrained(tmp_path / "transformer_turbo"),
        "scheduler_turbo": type(pipe.scheduler).from_pretrained(tmp_path / "scheduler_turbo"),
    }
    assert {name: turbo["scheduler_turbo"].config[name] for name in SCHEDULER_SETTINGS["turbo"]} == (
        SCHEDULER_SETTINGS["turbo"]
    )
    pipe.register_modules(**turbo)
    assert pipe.decode_codes(torch.tensor([[[1, 2], [3, 4]]]), "turbo", 2)[0].size == (64, 64)


def test_resumed_run_equals_the_uninterrupted_one(tmp_path):
    settings = {"learning_rate": 1e-3, "ema_decay": 0.9, "lr_scheduler_type": "constant"}
    whole, resumed = assert_resumed_equals_uninterrupted(make_trainer, tmp_path, **settings)
    averages = resumed.trained_model().state_dict()
    for name, tensor in whole.trained_model().state_dict().items():
        assert torch.equal(tensor, averages[name]), name
    # What is saved is the average, not the last weights
    last = whole.model.transformer.all_x_embedder["2-1"].weight
    assert not torch.equal(whole.components()["transformer_turbo"].all_x_embedder["2-1"].weight, last)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"teacher_guidance_scale": -1.0}, "teacher_guidance_scale"),
        ({"num_student_steps": 0}, "num_student_steps"),
        ({"objective": "consistency"}, "objective"),
        ({"scheduler_shift": 0.0}, "scheduler_shift"),
        ({"ema_decay": 2.0}, "ema_decay"),
    ],
)
def test_bad_settings_are_refused(settings, name, tmp_path):
    with pytest.raises(ValueError, match=f"`{name}`"):
        LLaDAUniDistillationConfig(str(tmp_path), **settings)


def test_data_without_latents_are_refused(tmp_path):
    args = LLaDAUniDistillationConfig(str(tmp_path), **RUN)
    codes = dataset_of_images(2).remove_columns("latents")
    with pytest.raises(ValueError, match="`train_dataset` must have a column `image`"):
        LLaDAUniDistillationTrainer(*make_components(), args=args, train_dataset=codes)
    images = Dataset.from_dict({"image": ["a.png"]})
    with pytest.raises(ValueError, match="`train_dataset` holds images.*`prepare_decoder_dataset`"):
        LLaDAUniDistillationTrainer(*make_components(), args=args, train_dataset=images)


def test_components_that_do_not_fit_are_refused(tmp_path):
    (transformer, semantic_embedder), data = make_components(), dataset_of_images(2)
    args = LLaDAUniDistillationConfig(str(tmp_path), **RUN)
    with pytest.raises(TypeError, match="`teacher` must be a ZImageTransformer2DModel"):
        LLaDAUniDistillationTrainer(semantic_embedder, semantic_embedder, args=args, train_dataset=data)
    with pytest.raises(TypeError, match="`student` must be a ZImageTransformer2DModel"):
        LLaDAUniDistillationTrainer(transformer, semantic_embedder, 1, args=args, train_dataset=data)
    with pytest.raises(ValueError, match="`student` is the `teacher`"):
        LLaDAUniDistillationTrainer(transformer, semantic_embedder, transformer, args=args, train_dataset=data)
    args.ddp_static_graph = True
    with pytest.raises(ValueError, match="`ddp_static_graph`"):
        LLaDAUniDistillationTrainer(transformer, semantic_embedder, args=args, train_dataset=data)
