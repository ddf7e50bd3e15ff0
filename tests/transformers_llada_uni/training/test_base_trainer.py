"""What holds for every trainer: a run that is over stays as it is, checkpoints that are not whole are passed over."""

import pytest
import torch
from datasets import Dataset
from transformers import TrainingArguments

import diffusers_llada_uni.training
import transformers_llada_uni.training
from transformers_llada_uni import GroupwiseQuantizationConfig
from transformers_llada_uni.training import lora_config
from transformers_llada_uni.training.base_trainer import BaseTrainer
from transformers_llada_uni.training.checkpointing import last_complete_checkpoint

from .training_common import RUN


class Line(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.slope = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x, labels):
        return {"loss": (self.slope * x - labels).square().mean()}


class Killed(Exception):
    pass


def make_trainer(output_dir, **settings):
    rows = {"x": [[float(x)] for x in range(8)], "labels": [[2.0 * x] for x in range(8)]}
    settings = {**RUN, "learning_rate": 0.01, "save_strategy": "steps", "save_steps": 2, **settings}
    args = TrainingArguments(str(output_dir), per_device_train_batch_size=2, **settings)
    return BaseTrainer(Line(), args, train_dataset=Dataset.from_dict(rows))


@pytest.mark.parametrize(
    "settings", [{"max_steps": 2}, {"max_steps": 3}, {"max_steps": 4}, {"max_steps": 6}, {"num_train_epochs": 1.4}]
)
def test_a_finished_run_stays_as_it_is(tmp_path, settings):
    """An epoch has 4 steps: the run ends within one, or with one."""
    whole = make_trainer(tmp_path, **settings)
    whole.train()
    for _ in range(2):
        resumed = make_trainer(tmp_path, **settings)
        resumed.train(resume_from_checkpoint=True)
        assert resumed.state.global_step == whole.state.global_step
        assert torch.equal(resumed.model.slope, whole.model.slope)


@pytest.mark.parametrize("max_steps", [3, 7])
def test_resumed_within_and_after_an_epoch(tmp_path, max_steps):
    whole = make_trainer(tmp_path / "whole", max_steps=max_steps)
    whole.train()
    make_trainer(tmp_path / "short", max_steps=2).train()
    resumed = make_trainer(tmp_path / "short", max_steps=max_steps)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == max_steps
    assert torch.equal(resumed.model.slope, whole.model.slope)


def test_a_checkpoint_that_is_written_over_is_not_whole_meanwhile(tmp_path):
    make_trainer(tmp_path, max_steps=2).train()
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    trainer = make_trainer(tmp_path, max_steps=2, seed=1)

    def killed(output_dir):
        raise Killed

    trainer._save_rng_state = killed  # after the weights
    with pytest.raises(Killed):
        trainer.train()
    assert last_complete_checkpoint(tmp_path) is None


def test_a_run_goes_on_only_with_the_parameters_it_trained(tmp_path):
    """The optimiser's state is told apart by its order: of other parameters it would remember another's moments."""

    def with_plane(trained):
        trainer = make_trainer(tmp_path, max_steps=4)
        trainer.model.offset = torch.nn.Parameter(torch.zeros(1), requires_grad="offset" in trained)
        trainer.model.slope.requires_grad_("slope" in trained)
        trainer.model.forward = lambda x, labels: {
            "loss": (trainer.model.slope * x + trainer.model.offset - labels).square().mean()
        }
        return trainer

    with_plane(["slope"]).train()
    weights = (tmp_path / "checkpoint-4" / "model.safetensors").read_bytes()
    for trained, message in (
        (["offset"], "that run trained, and this one does not train, slope. A run keeps its settings"),
        (["offset", "slope"], "this run trains, and that one did not train, offset. A run keeps its settings"),
    ):
        with pytest.raises(ValueError, match=message):
            with_plane(trained).train(resume_from_checkpoint=True)
    assert (tmp_path / "checkpoint-4" / "model.safetensors").read_bytes() == weights
    with_plane(["slope"]).train(resume_from_checkpoint=True)
    (tmp_path / "checkpoint-4" / "trained_parameters.json").unlink()  # as earlier versions wrote them
    with_plane(["slope"]).train(resume_from_checkpoint=True)


def test_a_checkpoint_may_be_a_path(tmp_path):
    make_trainer(tmp_path, max_steps=2).train()
    (tmp_path / "checkpoint-2" / "trained_parameters.json").write_text('["other"]')
    with pytest.raises(ValueError, match="trains other parameters"):
        make_trainer(tmp_path, max_steps=4).train(resume_from_checkpoint=tmp_path / "checkpoint-2")


def test_without_a_checkpoint_a_run_begins_anew(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=1)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 1


@pytest.mark.parametrize("stage", ["SFT", "DPO", "GRPO"])
def test_a_model_by_name_is_quantised(official_tiny, tmp_path, stage):
    config = getattr(transformers_llada_uni.training, f"LLaDAUni{stage}Config")
    trainer = getattr(transformers_llada_uni.training, f"LLaDAUni{stage}Trainer")
    rows = {"SFT": {"text": ["a"]}, "DPO": {"prompt": ["a"], "chosen": ["b"], "rejected": ["c"]}}
    arguments = {
        "train_dataset": Dataset.from_dict(rows.get(stage, {"prompt": ["a"]})),
        "peft_config": lora_config(r=2, experts=False),
        "quantization_config": GroupwiseQuantizationConfig(bits=8, group_size=32),
        **({"reward_funcs": [len]} if stage == "GRPO" else {}),
    }
    model = trainer(str(official_tiny), args=config(str(tmp_path), **RUN), **arguments).model
    assert model.get_base_model().config.quantization_config.bits == 8


@pytest.mark.parametrize("package", [transformers_llada_uni.training, diffusers_llada_uni.training])
def test_every_trainer_is_one(package):
    trainers = [getattr(package, name) for name in vars(package) if name.endswith("Trainer")]
    assert len(trainers) >= 3
    for trainer in trainers:
        assert trainer.train is BaseTrainer.train and trainer._init_training_state is BaseTrainer._init_training_state
