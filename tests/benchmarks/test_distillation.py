"""`benchmarks/distillation_methods.py`: the formulas of the published ways to distil, and what they leave behind."""

import sys
from pathlib import Path

import pytest
import torch

from diffusers_llada_uni.training import LLaDAUniDistillationConfig
from tests.diffusers_llada_uni.training.decoder_common import RUN, dataset_of_images, make_components
from transformers_llada_uni.training.objective.noise import step_generators


sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import distillation_methods as methods


def make_trainer(trainer_class, output_dir, **settings):
    settings = {"num_teacher_steps": 5, "per_device_train_batch_size": 6, **settings}
    args = LLaDAUniDistillationConfig(str(output_dir), **{**RUN, **settings})
    return trainer_class(*make_components(), args=args, train_dataset=dataset_of_images(24))


def batch_of(trainer, num_rows=6):
    return trainer.data_collator([trainer.train_dataset[i] for i in range(num_rows)])


def test_the_exact_consistency_function_is_its_own_target():
    """Latents of deviation s: velocities are linear, and where a point ends is known."""
    deviation = 0.5
    variance = torch.tensor(deviation**2, dtype=torch.float64)

    def velocity(x, sigma):
        return x * ((1 - sigma) * variance - sigma) / ((1 - sigma) ** 2 * variance + sigma**2)

    def jump(points, sigmas, codes):
        scale = deviation / ((1 - sigmas) ** 2 * variance + sigmas**2).sqrt()
        return [x * (s - 1) / sigma for x, s, sigma in zip(points, scale, sigmas, strict=True)]

    sigmas = torch.linspace(0.1, 1, 10, dtype=torch.float64)
    points = list(torch.randn(10, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    velocities = [velocity(x, sigma) for x, sigma in zip(points, sigmas, strict=True)]
    codes = [None] * 10
    targets = methods.consistency_target(jump, points, sigmas, velocities, codes)
    for target, exact in list(zip(targets, jump(points, sigmas, codes), strict=True))[:-1]:
        torch.testing.assert_close(target, exact, rtol=0, atol=0.01)  # of second order in the difference
    torch.testing.assert_close(targets[-1], jump(points, sigmas, codes)[-1], rtol=0, atol=0.1)  # one-sided at noise
    # One that never changes must be the velocity
    wrong = methods.consistency_target(lambda p, s, c: velocities * 2, points, sigmas, velocities, codes)
    assert all(torch.equal(a, b) for a, b in zip(wrong, velocities, strict=True))


def test_two_heads_equal_the_formula_and_leave_the_transformer_as_it_is(tmp_path):
    trainer = make_trainer(methods.TwoHeadsTrainer, tmp_path, max_steps=2, learning_rate=1e-3)
    trainer.model.eval()
    inputs = batch_of(trainer)
    loss = trainer.compute_loss(trainer.model, inputs)
    trainer.callback_handler.call_event("on_evaluate", trainer.args, trainer.state, trainer.control)
    sigmas, noise = methods.draw(inputs["latents"], step_generators(trainer, 6))
    codes, shown = inputs["codes"], torch.ones(6, dtype=torch.bool)
    plain = trainer.teacher  # the student begins as the teacher, and its second head as the first
    with torch.no_grad():
        points = [(1 - s) * x + s * e for s, x, e in zip(sigmas, inputs["latents"], noise, strict=True)]
        velocities = trainer.teacher_velocity(points, 1 - sigmas, codes)
        found = plain(points, 1 - sigmas, codes, shown)
        total = torch.zeros(6)
        for row, (x, u, sigma) in enumerate(zip(points, velocities, sigmas, strict=True)):
            above, below = min(sigma + methods.DIFFERENCE, 1), max(sigma - methods.DIFFERENCE, 0)
            sides = torch.tensor([above, below])
            moved = [x - (side - sigma) * u for side in sides]
            values = plain(moved, 1 - sides, [codes[row]] * 2, shown[:2])
            target = u - sigma * (values[0] - values[1]) / (above - below)
            total[row] = (found[row] - target).clamp(-1, 1).square().mean() + (found[row] - u).square().mean()
    torch.testing.assert_close(loss, total.mean(), rtol=1e-2, atol=1e-4)
    trainer.train()
    assert not torch.equal(
        trainer.model.flow_head.linear.weight, make_components()[0].all_final_layer["2-1"].linear.weight
    )
    assert trainer.trained_model().transformer.state_dict().keys() == make_components()[0].state_dict().keys()


def test_the_twin_flow_learns_what_the_student_draws(tmp_path):
    trainer = make_trainer(methods.TwinFlowTrainer, tmp_path, max_steps=2, learning_rate=1e-3)
    model, inputs = trainer.model, batch_of(trainer)
    codes, generators = inputs["codes"], step_generators(trainer, 6)
    shown, time = torch.ones(6, dtype=torch.bool), torch.full((6,), 0.5)
    with torch.no_grad():
        ordinary = model(inputs["latents"], time, codes, shown)
        for a, b in zip(ordinary, model(inputs["latents"], time, codes, shown, is_twin=True), strict=True):
            assert torch.equal(a, b)  # it begins as the other
        # The twin is the velocity of the student's images, and the jump goes where the teacher says more than it
        jumps = [torch.zeros(4, 4, 4) for _ in range(6)]
        trainer.teacher_velocity = lambda points, time, codes: [torch.full((4, 4, 4), 3.0) for _ in points]
        model.forward, forward = lambda *_, is_twin: [torch.full((4, 4, 4), 1.0) for _ in range(6)], model.forward
        moved = trainer.rectification(model, jumps, inputs["latents"], codes, generators)
        assert moved.tolist() == pytest.approx([4.0] * 6)  # (0 - (0 + 3 - 1))^2
        model.forward = forward
    del trainer.teacher_velocity
    trainer.train()
    assert model.twin.abs().max() > 0
    assert trainer.trained_model().transformer.state_dict().keys() == make_components()[0].state_dict().keys()
