"""What the trainers of the pipeline's parts share: recomputed activations, and results that stand at every moment."""

import pytest
import torch
from datasets import Dataset, DatasetDict
from safetensors.torch import load_file

from diffusers_llada_uni.training import (
    LLaDAUniAutoencoderConfig,
    LLaDAUniDecoderConfig,
    LLaDAUniDecoderTrainer,
    LLaDAUniDistillationConfig,
)
from diffusers_llada_uni.training.component_trainer import AVERAGE_FILE
from tests.diffusers_llada_uni.training import (
    test_autoencoder_trainer,
    test_decoder_trainer,
    test_distillation_trainer,
)
from tests.diffusers_llada_uni.training.decoder_common import RUN, dataset_of_images, make_components


TRAINERS = {
    "autoencoder": test_autoencoder_trainer.make_trainer,
    "decoder": test_decoder_trainer.make_trainer,
    "distillation": test_distillation_trainer.make_trainer,
}


@pytest.mark.parametrize("setting", ["activation_checkpointing", "gradient_checkpointing"])
@pytest.mark.parametrize("stage", TRAINERS)
def test_recomputed_activations_give_the_same_weights(tmp_path, stage, setting, monkeypatch):
    calls = []
    recompute = torch.utils.checkpoint.checkpoint
    monkeypatch.setattr(
        "diffusers_llada_uni.training.component_trainer.recomputed",
        lambda *args, **kwargs: calls.append(kwargs) or recompute(*args, **kwargs),
    )
    states = []
    for settings in ({}, {setting: True}):
        trainer = TRAINERS[stage](tmp_path, max_steps=2, per_device_train_batch_size=2, **settings)
        trainer.train()
        states.append(trainer.model.state_dict())
        assert bool(calls) == bool(settings)
    assert calls[0] == {"use_reentrant": False}
    for name, tensor in states[0].items():
        torch.testing.assert_close(tensor, states[1][name], rtol=0, atol=1e-6, msg=name)


def test_what_models_of_diffusers_cannot_do_is_refused(tmp_path):
    trainer = test_decoder_trainer.make_trainer(
        tmp_path, max_steps=1, activation_checkpointing=True, activation_checkpointing_kwargs={"every_n_layers": 2}
    )
    with pytest.raises(ValueError, match="`activation_checkpointing_kwargs`.*`every_n_layers`"):
        trainer.train()


# Saving


def test_the_old_result_stands_until_all_of_the_new_one_is_written(tmp_path, monkeypatch):
    transformer, semantic_embedder = components = make_components()
    trainer = test_decoder_trainer.make_trainer(tmp_path, components)
    trainer.save_model()
    old = {path: path.read_bytes() for path in tmp_path.rglob("*.safetensors")}
    assert len(old) == 2
    for module in components:
        torch.nn.utils.vector_to_parameters(torch.ones(10**6), module.parameters())
    with monkeypatch.context() as patch:
        patch.setattr(semantic_embedder, "save_pretrained", lambda folder: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            trainer.save_model()
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.safetensors")} == old
    assert sorted(path.name for path in tmp_path.iterdir()) == ["semantic_embedder", "transformer"]
    trainer.save_model()
    assert all(path.read_bytes() != content for path, content in old.items())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["semantic_embedder", "transformer"]


# Bad input


@pytest.mark.parametrize("config_class", [LLaDAUniAutoencoderConfig, LLaDAUniDistillationConfig])
def test_settings_of_another_trainer_are_refused(tmp_path, config_class):
    with pytest.raises(TypeError, match="`args` must be a LLaDAUniDecoderConfig"):
        LLaDAUniDecoderTrainer(*make_components(), config_class(str(tmp_path), **RUN), dataset_of_images(2))


@pytest.mark.parametrize(
    ("dataset", "error", "words"),
    [
        (None, TypeError, ["`train_dataset`", "NoneType"]),
        (DatasetDict(train=dataset_of_images(2)), TypeError, ["`train_dataset`", "DatasetDict", "['train']"]),
        ([{"codes": [1]}], TypeError, ["`train_dataset`", "list"]),
        (dataset_of_images(2).select([]), ValueError, ["`train_dataset`", "no rows"]),
        (Dataset.from_dict({"text": ["a"]}), ValueError, ["`image`", "['text']"]),
    ],
    ids=["none", "several splits", "list", "empty", "other columns"],
)
def test_bad_data_are_refused(tmp_path, dataset, error, words):
    args = LLaDAUniDecoderConfig(str(tmp_path), **RUN)
    encoders = {"model": 1, "processing_class": type("P", (), {"image_processor": 1}), "vae": 1}
    with pytest.raises(error) as info:
        LLaDAUniDecoderTrainer(*make_components(), args, dataset, **encoders)
    assert all(word in str(info.value) for word in words), info.value


def test_the_best_model_is_the_best_average(tmp_path):
    """By the greatest loss the first checkpoint is the best; what is saved is what was the average then."""
    settings = {"max_steps": 2, "eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 1, "save_steps": 1}
    settings |= {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
    settings |= {"ema_decay": 0.5, "learning_rate": 1e-2, "save_only_model": True}
    trainer = test_decoder_trainer.make_trainer(tmp_path, **settings)
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-1")
    best = load_file(tmp_path / "checkpoint-1" / AVERAGE_FILE)
    last = load_file(tmp_path / "checkpoint-2" / AVERAGE_FILE)
    average = trainer.moving_average.average.state_dict()
    assert all(torch.equal(tensor, best[name]) for name, tensor in average.items())
    assert not all(torch.equal(tensor, last[name]) for name, tensor in average.items())
