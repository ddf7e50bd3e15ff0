"""`llada-uni train ...` and `llada-uni consolidate ...`, as a user calls them."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset, Image
from PIL import Image as PILImage
from transformers import AutoModelForCausalLM, AutoProcessor, SiglipConfig, SiglipModel

from llada_uni.cli import STAGES, main
from llada_uni.training_stages import stages


ROOT = Path(__file__).resolve().parents[2]
RUN = {
    "max_steps": 1,
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "disable_tqdm": True,
    "save_strategy": "no",
    "logging_steps": 1,
    "per_device_train_batch_size": 2,
}


def run(command, tmp_path, *arguments, **settings):
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({**RUN, "output_dir": str(tmp_path / "out"), **settings}))
    main(["train", command, "--config", str(config), *arguments])
    return tmp_path / "out"


def as_file(tmp_path, rows):
    """A file that `datasets.load_dataset` reads, in a folder of its own."""
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "train.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return str(folder)


CHAT = [{"role": "user", "content": "Up or down?"}, {"role": "assistant", "content": "Up."}]


def test_sft_with_an_adapter_writes_adapter_and_card(converted_dir, tmp_path):
    output = run(
        "sft",
        tmp_path,
        "--learning_rate",
        "1e-3",
        model_name_or_path=str(converted_dir),
        dataset_name=as_file(tmp_path, [{"messages": CHAT}] * 4),
        use_peft=True,
        block_length=8,
        max_length=64,
    )
    adapter = json.loads((output / "adapter_config.json").read_text())
    assert adapter["target_parameters"] == ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    card = (output / "README.md").read_text()
    for words in (
        "LLaDAUniSFTTrainer",
        "`learning_rate` | `0.001`",
        "`block_length` | `8`",
        "text_loss",
        "1 optimiser",
    ):
        assert words in card
    assert type(AutoProcessor.from_pretrained(output)).__name__ == "LLaDAUniProcessor"


def test_sft_on_the_released_layout(official_tiny, tmp_path):
    output = run(
        "sft",
        tmp_path,
        model_name_or_path=str(official_tiny),
        dataset_name=as_file(tmp_path, [{"text": "once upon a time"}] * 4),
        stage="pretraining",
        max_length=64,
    )
    model = AutoModelForCausalLM.from_pretrained(output)
    old = AutoModelForCausalLM.from_pretrained(official_tiny)
    assert not torch.equal(model.lm_head.weight, old.lm_head.weight)


def test_dpo(converted_dir, tmp_path):
    row = {"prompt": CHAT[:1], "chosen": CHAT[1:], "rejected": [{"role": "assistant", "content": "Down."}]}
    data = as_file(tmp_path, [row] * 4)
    output = run("dpo", tmp_path, model_name_or_path=str(converted_dir), dataset_name=data, block_length=8)
    assert "rewards/margins" in (output / "README.md").read_text()


def test_grpo_finds_a_reward_in_the_working_directory(converted_dir, tmp_path, monkeypatch):
    (tmp_path / "own_rewards.py").write_text(
        "def length(completion_ids, **kwargs):\n    return [float(len(ids)) for ids in completion_ids]\n"
    )
    monkeypatch.chdir(tmp_path)
    output = run(
        "grpo",
        tmp_path,
        model_name_or_path=str(converted_dir),
        dataset_name=as_file(tmp_path, [{"prompt": CHAT[:1]}] * 4),
        reward_funcs=["own_rewards.length"],
        num_generations=2,
        max_completion_length=8,
        num_steps_per_block=2,
        block_length=8,
    )
    assert "rewards/length/mean" in (output / "README.md").read_text()


def test_tokenizer(converted_dir, tmp_path):
    processor = AutoProcessor.from_pretrained(converted_dir / "processor")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text_config = {**sizes, "vocab_size": len(processor.tokenizer), "max_position_embeddings": 16}
    vision_config = {**sizes, "image_size": 32, "patch_size": 16}
    SiglipModel(SiglipConfig(text_config=text_config, vision_config=vision_config)).save_pretrained(tmp_path / "text")
    processor.tokenizer.save_pretrained(tmp_path / "text")
    rows = {"image": [PILImage.new("RGB", (64, 64))] * 2, "caption": ["a", "b"]}
    Dataset.from_dict(rows).cast_column("image", Image()).save_to_disk(tmp_path / "data")
    output = run(
        "tokenizer",
        tmp_path,
        model_name_or_path=str(converted_dir),
        dataset_name=str(tmp_path / "data"),
        text_model_name_or_path=str(tmp_path / "text"),
        max_text_length=16,
        resize_mode="understanding",
    )
    assert (output / "image_tokenizer" / "image_tokenizer.safetensors").exists()


def test_decoder_and_its_distillation(converted_dir, tmp_path):
    pictures = Dataset.from_dict({"image": [PILImage.new("RGB", (64, 64))] * 2}).cast_column("image", Image())
    pictures.save_to_disk(tmp_path / "pictures")
    codes = Dataset.from_dict({"codes": [[1, 2, 3, 4]] * 2, "grid": [[2, 2]] * 2})
    codes.save_to_disk(tmp_path / "codes")
    common = {"model_name_or_path": str(converted_dir), "per_device_train_batch_size": 1}
    output = run("decoder", tmp_path, dataset_name=str(tmp_path / "pictures"), **common)
    assert {"transformer", "semantic_embedder"} <= {path.name for path in output.iterdir()}
    output = run("distill", tmp_path, dataset_name=str(tmp_path / "codes"), num_teacher_steps=3, **common)
    assert {"transformer_turbo", "scheduler_turbo"} <= {path.name for path in output.iterdir()}


@pytest.mark.parametrize("stage", STAGES)
def test_example_configurations_are_understood(stage, tmp_path):
    from trl import TrlParser

    options, _ = stages()[stage]
    config = yaml.safe_load((ROOT / "examples" / "training" / f"{stage}.yaml").read_text())
    config |= {"output_dir": str(tmp_path / "out"), "use_cpu": True, "bf16": False}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    parser = TrlParser(options)
    parsed = parser.parse_args_and_config(["--config", str(tmp_path / "config.yaml")], fail_with_unknown_args=True)
    assert any(getattr(part, "model_name_or_path", None) == "path/to/llada-uni" for part in parsed)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "`dataset_name`"),
        ({"dataset_name": "DATA"}, "`model_name_or_path`"),
        ({"dataset_name": "DATA", "dataset_train_split": "dev", "model_name_or_path": "x"}, "no split 'dev'"),
    ],
)
def test_missing_options_are_named(settings, message, tmp_path):
    data = as_file(tmp_path, [{"text": "a"}])
    settings = {name: data if value == "DATA" else value for name, value in settings.items()}
    with pytest.raises(ValueError, match=message):
        run("sft", tmp_path, **settings)


def test_unknown_options_and_stages_are_refused(tmp_path, capsys):
    with pytest.raises((ValueError, SystemExit)):
        run("sft", tmp_path, block_lenght=8)
    with pytest.raises(SystemExit):
        main(["train", "rlhf"])
    assert "invalid choice" in capsys.readouterr().err
    main([])
    assert "llada-uni train sft" in capsys.readouterr().out


def test_only_shards_can_be_consolidated(converted_dir, tmp_path):
    with pytest.raises(ValueError, match="`checkpoint`"):
        main(["consolidate", str(converted_dir / "model"), str(tmp_path / "out")])
