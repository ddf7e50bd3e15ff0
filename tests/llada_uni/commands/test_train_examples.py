"""
Every file of `examples/training/` as a reader runs it: in a process of its own, two steps on the embedded checkpoint,
with nothing but paths and steps put in on the command line. The processes are forked from one that has done the
imports, which take longer than the steps. What was trained is then loaded in a process that has done none.
"""

import gc
import json
import multiprocessing
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import Dataset, Image
from PIL import Image as PILImage
from transformers import AutoTokenizer, SiglipConfig, SiglipModel

from diffusers_llada_uni import embedded_checkpoint
from llada_uni.cli import STAGES, main
from llada_uni.commands.train_options import StageParser
from llada_uni.commands.train_trainers import stages


ROOT = Path(__file__).resolve().parents[3]
EXAMPLES, EMOJI = ROOT / "examples" / "training", ROOT / "examples" / "emoji"
CHAT = [{"role": "user", "content": "Up or down?"}, {"role": "assistant", "content": "Up."}]
ROWS = {
    "sft": {"messages": CHAT},
    "dpo": {"prompt": CHAT[:1], "chosen": CHAT[1:], "rejected": [{"role": "assistant", "content": "Down."}]},
    "grpo": {"prompt": CHAT[:1]},
}
REWARD = "def correctness(completions, **kwargs):\n    return [float(row % 2) for row in range(len(completions))]\n"
WRITTEN = {
    "sft": ["adapter_model.safetensors"],
    "dpo": ["adapter_model.safetensors"],
    "grpo": ["adapter_model.safetensors"],
    "image_tokenizer": ["image_tokenizer/image_tokenizer.safetensors"],
    "image_tokenizer_alignment": ["image_tokenizer/image_tokenizer.safetensors"],
    "autoencoder": ["vae/diffusion_pytorch_model.safetensors"],
    "decoder": ["transformer/diffusion_pytorch_model.safetensors", "semantic_embedder/config.json"],
    "distill": ["transformer_turbo/diffusion_pytorch_model.safetensors", "scheduler_turbo/scheduler_config.json"],
}
METRIC = {"dpo": "rewards/margins", "grpo": "rewards/correctness/mean"}


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """Where fresh processes come from."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["llada_uni.commands.train_trainers"])
        yield context


def run(folder, words):
    """In a new process: the command, its words on the screen in a file."""
    gc.freeze()  # what was imported before stays
    os.chdir(folder)
    screen = os.open("screen.txt", os.O_WRONLY | os.O_CREAT)
    os.dup2(screen, 1)
    os.dup2(screen, 2)
    sys.exit(main(words))


def data_for(stage, tmp_path) -> str:
    if stage in ROWS:
        (tmp_path / "rows.jsonl").write_text(f"{json.dumps(ROWS[stage])}\n" * 2)
        return "rows.jsonl"
    rows = {"image": [PILImage.new("RGB", (32, 32), name) for name in ("red", "blue")]}
    if stage == "image_tokenizer_alignment":
        rows["image_codes"] = [[{"grid": [4, 4], "codes": [code] * 16}] for code in (1, 2)]
    else:
        rows["caption"] = ["red", "blue"]
    Dataset.from_dict(rows).cast_column("image", Image()).to_parquet(tmp_path / "rows.parquet")
    return "rows.parquet"


def text_model_for(tmp_path) -> str:
    """A tiny SigLIP in the place of Google's."""
    tokenizer = AutoTokenizer.from_pretrained(embedded_checkpoint("emoji") / "processor")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text_config = {**sizes, "vocab_size": len(tokenizer), "max_position_embeddings": 64}
    vision_config = {**sizes, "image_size": 32, "patch_size": 16}
    SiglipModel(SiglipConfig(text_config=text_config, vision_config=vision_config)).save_pretrained(tmp_path / "text")
    tokenizer.save_pretrained(tmp_path / "text")
    return "text"


def test_every_stage_has_an_example():
    assert {file.stem for file in EXAMPLES.glob("*.yaml")} == set(STAGES)


@pytest.mark.parametrize("stage", STAGES)
def test_an_example_runs_as_it_is_printed(stage, processes, tmp_path):
    config = EXAMPLES / f"{stage}.yaml"
    assert config.read_text().startswith(f"# llada-uni train {stage} --config examples/training/{stage}.yaml\n")
    (tmp_path / "my_rewards.py").write_text(REWARD)
    options = {"model_name_or_path": embedded_checkpoint("emoji"), "dataset_name": data_for(stage, tmp_path)}
    options |= {"max_steps": 2, "output_dir": "out"}
    if stage == "image_tokenizer":
        options["text_model_name_or_path"] = text_model_for(tmp_path)
    words = ["train", stage, "--config", str(config)]
    words += [word for name, value in options.items() for word in (f"--{name}", str(value))]
    process = processes.Process(target=run, args=(tmp_path, words))
    process.start()
    process.join()
    said = (tmp_path / "screen.txt").read_text()
    assert process.exitcode == 0, said[-3000:]

    assert all((tmp_path / "out" / file).exists() for file in WRITTEN[stage])
    card = (tmp_path / "out" / "README.md").read_text()
    assert "2 optimiser steps" in card and METRIC.get(stage, "train_loss") in card
    assert "Saved to out" in said
    for words in ("FutureWarning", "pin_memory", "Could not find a config file"):  # which a reader cannot change
        assert words not in said
    if stage == "sft":
        assert_adapter_can_be_loaded(tmp_path)


def assert_adapter_can_be_loaded(tmp_path):
    """As the card says, and as peft's readers are used to."""
    base = json.loads((tmp_path / "out" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert base == str(embedded_checkpoint("emoji") / "model")
    (code,) = re.findall(r"```python\n(.*?)```", (tmp_path / "out" / "README.md").read_text(), re.DOTALL)
    (line,) = re.findall(r"`(AutoPeftModel\..*?)`", (tmp_path / "out" / "README.md").read_text())
    compare = (
        f"from peft import AutoPeftModel\nother = {line}\n"
        "own, others = model.state_dict(), other.state_dict()\n"
        "assert own.keys() == others.keys() and any('lora_A' in name for name in own)\n"
        "assert all((tensor == others[name].to(tensor)).all() for name, tensor in own.items() if 'lora' in name)\n"
        "print(type(processor).__name__)\n"
    )
    command = [sys.executable, "-c", code + compare]
    assert subprocess.run(command, cwd=tmp_path, check=True, capture_output=True).stdout == b"LLaDAUniProcessor\n"


@pytest.mark.parametrize("config", sorted((EMOJI / "configs").glob("*.yaml")), ids=lambda file: file.stem)
def test_settings_of_the_emoji_are_known(config):
    """`examples/emoji/train.py` would find out after hours."""
    (stage,) = re.findall(rf'stage\("(\w+)", "{config.stem}"', (EMOJI / "train.py").read_text())
    classes, _ = stages()[stage]
    StageParser(stage, classes).parse(["--config", str(config), "--output_dir", "out"])
