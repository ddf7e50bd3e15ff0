"""Consolidation writes all or nothing; `tests/transformers_llada_uni/training/test_parallel.py` has shards to read."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from diffusers_llada_uni import embedded_checkpoint
from transformers_llada_uni.loading import consolidation
from transformers_llada_uni.loading.consolidation import consolidate_checkpoint


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    """Taken for one in shards: how those are read is upstream's."""
    monkeypatch.setattr(consolidation, "is_sharded_checkpoint", lambda folder: True)
    folder = tmp_path / "in"
    shutil.copytree(embedded_checkpoint("emoji") / "model", folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(embedded_checkpoint("emoji") / "processor" / name, folder)
    (folder / "trainer_state.json").write_text("{}")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "text_chat.jinja").write_text("{{ messages }}")
    return folder


def test_weights_and_tokenizer_are_whole(checkpoint, tmp_path):
    consolidate_checkpoint(checkpoint, tmp_path / "out")
    found, wanted = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", checkpoint))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (checkpoint / "tokenizer.json").read_bytes()
    assert not (tmp_path / "out" / "trainer_state.json").exists()
    assert (tmp_path / "out" / "additional_chat_templates" / "text_chat.jinja").read_text() == "{{ messages }}"


def test_failure_leaves_nothing(checkpoint, tmp_path, monkeypatch):
    save = PreTrainedModel.save_pretrained

    def fail(model, folder, **settings):
        save(model, folder, **settings)
        raise OSError("no space left")

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", fail)
    with pytest.raises(OSError, match="no space left"):
        consolidate_checkpoint(checkpoint, tmp_path / "deep" / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_bad_arguments(checkpoint, tmp_path, monkeypatch):
    with pytest.raises(FileExistsError, match="`output`"):
        consolidate_checkpoint(checkpoint, checkpoint)
    (checkpoint / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ValueError, match="`checkpoint` .* 'llama'"):
        consolidate_checkpoint(checkpoint, tmp_path / "out")
    monkeypatch.undo()
    with pytest.raises(ValueError, match="`checkpoint` .* no shards"):
        consolidate_checkpoint(checkpoint, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
