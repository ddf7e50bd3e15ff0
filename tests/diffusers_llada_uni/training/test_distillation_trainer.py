"""Few-step distillation: the trajectory, the formula, and that few steps do what many did."""

import pytest
import torch
from datasets import Dataset

from diffusers_llada_uni import LLaDAUniPipeline
from diffusers_llada_uni.code_decoding import decoder_sigmas
from diffusers_llada_uni.training import (
    LLaDAUniDistillationConfig,
    LLaDAUniDistillationTrainer,
)
from tests.common import assert_resumed_equals_uninterrupted
from tests.diffusers_llada_uni.training.decoder_common import (
    RUN,
    dataset_of_images,
    image_error,
    make_components,
    make_pipeline,
)
from transformers_llada_uni.training.objective.noise import step_generators


def make_trainer(output_dir, components=None, **settings):
    transformer, semantic_embedder = make_components() if components is None else components
    settings = {"num_teacher_steps": 5, "per_device_train_batch_size": 4, **settings}
    return LLaDAUniDistillationTrainer(
        transformer,
        semantic_embedder,
        args=LLaDAUniDistillationConfig(str(output_dir), **{**RUN, **settings}),
        train_dataset=dataset_of_images(512, seed=5).remove_columns("latents"),
    )


def sample(trainer, num_rows=3):
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(num_rows)])
    generator = torch.Generator().manual_seed(0)
    return batch["codes"], [torch.randn(4, 4, 4, generator=generator) for _ in range(num_rows)]


@pytest.mark.parametrize("guidance_scale", [0.0, 1.0])
def test_trajectory_is_that_of_the_pipeline(tmp_path, guidance_scale):
    trainer = make_trainer(tmp_path, teacher_guidance_scale=guidance_scale)
    codes, noise = sample(trainer)
    points = trainer.trajectory(noise, codes)
    pipe = make_pipeline(*make_components())
    seen = []

    def keep(pipe, step, timestep, tensors):
        seen.append(tensors["latents"])
        return tensors

    pipe.decode_codes(
        torch.stack(codes),
        "normal",
        5,
        guidance_scale,
        latents=torch.stack(noise),
        output_type="latent",
        callback_on_step_end=keep,
    )
    assert len(points) == len(seen) + 1 == 5
    for own, theirs in zip(points[1:], seen, strict=True):
        torch.testing.assert_close(torch.stack(own), theirs, atol=1e-5, rtol=1e-4)


def test_points_between_steps_lie_on_the_line(tmp_path):
    trainer = make_trainer(tmp_path)
    codes, noise = sample(trainer, 1)
    points = trainer.trajectory(noise, codes)
    sigmas = trainer.teacher_sigmas
    assert sigmas[0] == 1 and sigmas[-1] == 0
    for step, sigma in enumerate(sigmas[:-1]):
        torch.testing.assert_close(trainer.point_at(points, 0, sigma), points[step][0])
    middle = (sigmas[1] + sigmas[2]) / 2
    torch.testing.assert_close(trainer.point_at(points, 0, middle), (points[1][0] + points[2][0]) / 2)


def test_loss_equals_the_formula(tmp_path):
    trainer = make_trainer(tmp_path, pairs_per_trajectory=3)
    trainer.model.eval()
    inputs = trainer.data_collator([trainer.train_dataset[i] for i in range(2)])
    calls = []
    with torch.no_grad():
        loss = trainer.compute_loss(lambda *call: calls.append(call) or trainer.model(*call), inputs)
        (noisy, time, codes, is_conditional), *rest = calls
        velocities = trainer.model(noisy, time, codes, is_conditional)
    assert not rest and len(noisy) == 6 and bool(is_conditional.all())
    allowed = {round(1 - sigma, 6) for steps in range(4, 9) for sigma in decoder_sigmas("turbo", steps)}
    assert {round(value, 6) for value in time.tolist()} <= allowed
    trainer.callback_handler.call_event("on_evaluate", trainer.args, trainer.state, trainer.control)
    noise = [torch.randn(4, 4, 4, generator=generator) for generator in step_generators(trainer, 2)]
    points = trainer.trajectory(noise, inputs["codes"])
    errors = []
    for pair in range(6):
        row, sigma = pair // 3, 1 - time[pair]
        torch.testing.assert_close(noisy[pair], trainer.point_at(points, row, sigma.item()), atol=1e-5, rtol=1e-4)
        errors.append((velocities[pair] - (points[-1][row] - noisy[pair]) / sigma).square().mean())
    torch.testing.assert_close(loss, torch.stack(errors).mean(), atol=1e-5, rtol=1e-4)


def test_few_steps_do_what_many_did(trained_decoder, tmp_path):
    """Images as good as the teacher's for a fifth of its passes or fewer, and at one step nearly the same ones."""
    _, folder = trained_decoder
    components = [
        type(part).from_pretrained(folder / name)
        for part, name in zip(make_components(), ("transformer", "semantic_embedder"), strict=True)
    ]
    transformer, semantic_embedder = components
    trainer = make_trainer(
        tmp_path / "student",
        components,
        max_steps=60,
        num_teacher_steps=6,
        per_device_train_batch_size=8,
        learning_rate=1e-3,
    )
    held_out = dataset_of_images(32, seed=6)
    before = trainer.evaluate(held_out)["eval_loss"]
    trainer.train()
    assert trainer.evaluate(held_out)["eval_loss"] < 0.6 * before
    trainer.save_model()
    student = type(transformer).from_pretrained(tmp_path / "student" / "transformer_turbo")
    pipe = make_pipeline(transformer, semantic_embedder, student)
    passes = {"normal": 0, "turbo": 0}

    def count(name, factor):
        return lambda *_: passes.__setitem__(name, passes[name] + factor)

    transformer.register_forward_pre_hook(count("normal", 2))  # guidance makes two rows of one
    student.register_forward_pre_hook(count("turbo", 1))
    teacher_error = image_error(pipe, "normal", 24)
    assert passes["normal"] == 46
    for num_inference_steps in (4, 6, 8):
        passes["turbo"] = 0
        error = image_error(pipe, "turbo", num_inference_steps)
        assert passes["turbo"] == num_inference_steps < passes["normal"] / 5
        assert error < teacher_error

    def end(pipe, *settings):
        codes = torch.arange(64).view(64, 1, 1) % 2
        noise = torch.randn(64, 4, 4, 4, generator=torch.Generator().manual_seed(7))
        return pipe.decode_codes(codes, *settings, latents=noise, output_type="latent")

    wanted = end(pipe, "normal", 24)
    undistilled = end(make_pipeline(transformer, semantic_embedder), "turbo", 1)
    assert (end(pipe, "turbo", 1) - wanted).square().mean() < 0.6 * (undistilled - wanted).square().mean()


def test_the_result_is_a_part_of_a_pipeline(converted_dir, tmp_path):
    pipe = LLaDAUniPipeline.from_pretrained(converted_dir)
    old = {name: tensor.clone() for name, tensor in pipe.transformer.state_dict().items()}
    codes = Dataset.from_dict({"codes": [[1, 2, 3, 4]], "grid": [[2, 2]]})
    trainer = LLaDAUniDistillationTrainer(
        pipe.transformer,
        pipe.semantic_embedder,
        pipe.scheduler,
        args=LLaDAUniDistillationConfig(str(tmp_path), max_steps=1, num_teacher_steps=3, **RUN),
        train_dataset=codes,
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
        ({"num_teacher_steps": 1}, "num_teacher_steps"),
        ({"teacher_guidance_scale": -1.0}, "teacher_guidance_scale"),
        ({"min_student_steps": 0}, "min_student_steps"),
        ({"min_student_steps": 6, "max_student_steps": 4}, "max_student_steps"),
        ({"pairs_per_trajectory": 0}, "pairs_per_trajectory"),
    ],
)
def test_bad_settings_are_refused(settings, name, tmp_path):
    with pytest.raises(ValueError, match=f"`{name}`"):
        LLaDAUniDistillationConfig(str(tmp_path), **settings)


def test_bad_arguments_are_refused(tmp_path):
    args = LLaDAUniDistillationConfig(str(tmp_path), **RUN)
    with pytest.raises(ValueError, match="`train_dataset` must have a column `codes` and a column `grid`"):
        LLaDAUniDistillationTrainer(*make_components(), args=args, train_dataset=Dataset.from_dict({"text": ["a"]}))
    with pytest.raises(TypeError, match="`scheduler` must be a FlowMatchEulerDiscreteScheduler"):
        LLaDAUniDistillationTrainer(*make_components(), 1, args=args, train_dataset=dataset_of_images(2))
