"""The mean of several checkpoints."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffusers_llada_uni import embedded_checkpoint
from llada_uni.cli import main
from transformers_llada_uni import LLaDA2MoeForBlockDiffusion
from transformers_llada_uni.loading.checkpoint_merging import best_checkpoints, merge_checkpoints


@pytest.fixture(scope="module")
def run(official_tiny, tmp_path_factory):
    """Four checkpoints of a run, whose weights differ by noise, with the losses 4, 1, 3, 2."""
    folder = tmp_path_factory.mktemp("merging")
    model = LLaDA2MoeForBlockDiffusion.from_pretrained(official_tiny)
    torch.manual_seed(0)
    for number, loss in enumerate((4.0, 1.0, 3.0, 2.0), 1):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.01 * torch.randn_like(parameter))
        checkpoint = folder / f"checkpoint-{number}"
        # The last is saved in several files, as another machine might
        model.save_pretrained(checkpoint, max_shard_size="200KB" if number == 4 else "5GB")
        history = [
            {"step": number - 1, "eval_loss": 0.0},
            {"step": number, "loss": 9.0},
            {"step": number, "eval_loss": loss},
        ]
        (checkpoint / "trainer_state.json").write_text(json.dumps({"global_step": number, "log_history": history}))
        (checkpoint / "optimizer.pt").write_bytes(b"much")
    return folder


def weights_of(folder):
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("first", [2, 4])
def test_every_tensor_is_the_mean(run, tmp_path, first):
    checkpoints = [run / f"checkpoint-{first}", run / f"checkpoint-{6 - first}", run / "checkpoint-3"]
    merge_checkpoints(checkpoints, tmp_path / "merged")
    parts, merged = [weights_of(checkpoint) for checkpoint in checkpoints], weights_of(tmp_path / "merged")
    assert merged.keys() == parts[0].keys()
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, sum(part[name] for part in parts) / 3, msg=name)
    assert not (tmp_path / "merged" / "optimizer.pt").exists()
    loaded = LLaDA2MoeForBlockDiffusion.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(loaded.lm_head.weight, merged["lm_head.weight"])


def test_all_chat_templates_come_along(run, tmp_path):
    shutil.copytree(run / "checkpoint-1", tmp_path / "one")
    templates = tmp_path / "one" / "additional_chat_templates"
    templates.mkdir()
    (templates / "text_chat.jinja").write_text("{{ messages }}")
    merge_checkpoints([tmp_path / "one", run / "checkpoint-2"], tmp_path / "merged")
    assert (tmp_path / "merged" / "additional_chat_templates" / "text_chat.jinja").read_text() == "{{ messages }}"


def test_the_best_are_those_of_the_lowest_loss(run):
    assert [folder.name for folder in best_checkpoints(run, 3)] == ["checkpoint-2", "checkpoint-4", "checkpoint-3"]
    assert [folder.name for folder in best_checkpoints(run, 1, greater_is_better=True)] == ["checkpoint-1"]


def test_one_that_has_diverged_is_none_of_the_best(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    state = tmp_path / "run" / "checkpoint-2" / "trainer_state.json"
    state.write_text(state.read_text().replace("1.0", "NaN"))
    assert [folder.name for folder in best_checkpoints(tmp_path / "run", 2)] == ["checkpoint-4", "checkpoint-3"]
    with pytest.raises(ValueError, match="has 3 checkpoints with a logged 'eval_loss'"):
        best_checkpoints(tmp_path / "run", 4)


def test_the_command_takes_the_best_of_a_run(run, tmp_path, capsys):
    main(["merge", str(run), "--best", "2", "--output", str(tmp_path / "merged")])
    assert capsys.readouterr().out.endswith("the mean of checkpoint-2, checkpoint-4\n")
    parts = [weights_of(run / name) for name in ("checkpoint-2", "checkpoint-4")]
    merged = weights_of(tmp_path / "merged")
    torch.testing.assert_close(merged["lm_head.weight"], (parts[0]["lm_head.weight"] + parts[1]["lm_head.weight"]) / 2)


def test_refused_by_name(run, tmp_path):
    good = run / "checkpoint-1"
    with pytest.raises(ValueError, match="`checkpoints` must be at least two"):
        merge_checkpoints([good], tmp_path / "merged")
    with pytest.raises(FileExistsError, match="`output`"):
        merge_checkpoints([good, good], run)
    with pytest.raises(FileNotFoundError, match="`checkpoints`"):
        merge_checkpoints([good, tmp_path], tmp_path / "merged")
    with pytest.raises(ValueError, match="`count` is 5"):
        best_checkpoints(run, 5)
    for change, message in (
        (lambda weights: weights.pop("lm_head.weight"), "other tensors.*lm_head.weight"),
        (lambda weights: weights.update({"lm_head.weight": torch.zeros(2, 2)}), "lm_head.weight.*shapes"),
    ):
        other = tmp_path / "other"
        shutil.copytree(good, other)
        weights = load_file(other / "model.safetensors")
        change(weights)
        save_file(weights, other / "model.safetensors")
        with pytest.raises(ValueError, match=message):
            merge_checkpoints([good, other], tmp_path / "merged")
        assert not (tmp_path / "merged").exists()
        shutil.rmtree(other)
    with pytest.raises(ValueError, match="is a pipeline; name the folder of its language model, '.*emoji/model'"):
        merge_checkpoints([embedded_checkpoint("emoji")] * 2, tmp_path / "merged")
    shutil.copytree(run / "checkpoint-4", other)
    (other / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="has an adapter"):
        merge_checkpoints([good, other], tmp_path / "merged")
