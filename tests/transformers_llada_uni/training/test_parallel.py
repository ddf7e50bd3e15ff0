"""
Training in two processes (gloo) under transformers' own sharding equals training in one; a run killed by SIGKILL and
resumed ends at the weights of the run that nobody killed.
"""

import json
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llada_uni.cli import main
from tests.forked import run_forked
from transformers_llada_uni.training.checkpointing import last_complete_checkpoint

from .training_worker import train


SHARDED = ["fsdp_size=2", "ep_size=2"]


def run(checkpoint, output_dir, *settings, num_processes=1, is_killed=False):
    codes = run_forked(train, str(checkpoint), str(output_dir), settings, num_processes=num_processes)
    assert codes == [-signal.SIGKILL if is_killed else 0] * num_processes


def weights(output_dir):
    tensors = {}
    for file in sorted(Path(output_dir, "final").glob("*.safetensors")):
        tensors |= load_file(file)
    assert tensors
    return tensors


def losses(output_dir):
    return json.loads(Path(output_dir, "losses.json").read_text())


@pytest.fixture(scope="module")
def single(official_tiny, tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("single")
    run(official_tiny, output_dir, "batch_size=2")
    assert losses(output_dir)[-1] < losses(output_dir)[0]
    return output_dir


@pytest.fixture(scope="module")
def sharded(official_tiny, tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("sharded")
    run(official_tiny, output_dir, *SHARDED, num_processes=2)
    return output_dir


def test_two_processes_train_as_one_does(single, sharded):
    assert losses(sharded) == pytest.approx(losses(single), rel=1e-3)
    for name, tensor in weights(single).items():
        torch.testing.assert_close(weights(sharded)[name], tensor, rtol=0, atol=2e-4, msg=name)


def test_killed_and_resumed_equals_uninterrupted(official_tiny, single, tmp_path):
    run(official_tiny, tmp_path, "batch_size=2", "kill_at=5", is_killed=True)
    assert Path(last_complete_checkpoint(tmp_path)).name == "checkpoint-4"
    run(official_tiny, tmp_path, "batch_size=2")
    for name, tensor in weights(single).items():
        assert torch.equal(weights(tmp_path)[name], tensor), name


def test_sharded_and_killed_and_resumed_equals_uninterrupted(official_tiny, sharded, tmp_path):
    run(official_tiny, tmp_path, *SHARDED, "kill_at=3", num_processes=2, is_killed=True)
    assert Path(last_complete_checkpoint(tmp_path)).name == "checkpoint-2"
    run(official_tiny, tmp_path, *SHARDED, num_processes=2)
    for name, tensor in weights(sharded).items():
        torch.testing.assert_close(weights(tmp_path)[name], tensor, rtol=0, atol=1e-6, msg=name)


def test_checkpoints_hold_no_whole_model(sharded):
    files = {file.name for file in Path(sharded, "checkpoint-6").glob("*.safetensors")}
    assert len(files) == 2 and all(name.startswith("shard-0000") for name in files)


def test_shards_are_made_one_model_on_demand(sharded, tmp_path):
    main(["consolidate", str(Path(sharded, "checkpoint-6")), str(tmp_path / "final")])
    consolidated, final = weights(tmp_path), weights(sharded)
    assert consolidated.keys() == final.keys()  # an entry for each expert, as in the release
    for name, tensor in final.items():
        assert torch.equal(consolidated[name], tensor), name
    assert (tmp_path / "final" / "tokenizer.json").exists()


def test_incomplete_checkpoints_are_passed_over(tmp_path):
    assert last_complete_checkpoint(tmp_path) is None
    for step, state in [(2, "{}"), (10, "{}"), (12, '{"global_'), (14, None)]:
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if state is not None:
            (folder / "trainer_state.json").write_text(state)
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
