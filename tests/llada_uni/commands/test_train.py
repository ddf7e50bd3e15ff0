"""`llada-uni train ...` and `llada-uni consolidate ...`, as a user calls them."""

import json
import subprocess
import sys
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
import yaml
from datasets import Dataset
from PIL import Image
from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM, AutoProcessor

from diffusers_llada_uni import LLaDAUniPipeline
from llada_uni.cli import main
from llada_uni.commands import train_trainers
from llada_uni.commands.train_trainers import adapter_of, finish, stages
from llada_uni.pipeline_loading import load_pipeline
from transformers_llada_uni import GroupwiseQuantizationConfig
from transformers_llada_uni.loading.model_loading import load_model, load_processor
from transformers_llada_uni.training import LLaDAUniSFTConfig, LLaDAUniSFTTrainer, lora_config


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
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows))
    return str(file)


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


def test_generated_images_reach_a_reward_that_asks_for_them(converted_dir, tmp_path, monkeypatch):
    (tmp_path / "image_rewards.py").write_text(
        "def redness(generated_images, image_codes, prompts, **kwargs):\n"
        "    assert [codes.shape for codes in image_codes] == [(2, 2)] * len(prompts)\n"
        "    assert all(image.size == (64, 64) for image in generated_images)\n"
        "    return [float(image.resize((1, 1)).getpixel((0, 0))[0]) for image in generated_images]\n"
    )
    pipes, load = [], LLaDAUniPipeline.from_pretrained
    monkeypatch.setattr(LLaDAUniPipeline, "from_pretrained", lambda *a, **k: pipes.append(load(*a, **k)) or pipes[0])
    monkeypatch.chdir(tmp_path)
    output = run(
        "grpo",
        tmp_path,
        model_name_or_path=str(converted_dir),
        dataset_name=as_file(tmp_path, [{"prompt": "a fox", "grid": [2, 2]}] * 2),
        reward_funcs=["image_rewards.redness"],
        num_generations=2,
        num_steps_per_block=2,
    )
    assert "rewards/redness/mean" in (output / "README.md").read_text()
    assert pipes[0].model is None  # the trainer has it


def refused(capsys, *arguments):
    """What the command says on stderr, with exit status 2."""
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    assert stop.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "`dataset_name`"),
        ({"dataset_name": "DATA"}, "`model_name_or_path`"),
        ({"dataset_name": "DATA", "dataset_train_split": "dev", "model_name_or_path": "x"}, "no split 'dev'"),
        ({"dataset_name": "no/such/file.jsonl", "model_name_or_path": "x"}, "no/such/file.jsonl"),
        ({"dataset_name": "DATA", "model_name_or_path": "/no/such/model"}, "/no/such/model"),
        ({"block_lenght": 8}, "`block_lenght` is no option of `llada-uni train sft`. Did you mean `block_length`?"),
        ({"stage": "rlhf"}, "rlhf"),
        ({"noise_range": [0.5, 0.1]}, "`noise_range`"),
        ({"resume_from_checkpoint": "yes"}, "`resume_from_checkpoint` must be true, false or a checkpoint's folder"),
        ({"dataset_name": "data", "output_dir": "data"}, "`output_dir` is the folder of the data"),
        ({"dataset_name": "DATA", "model_name_or_path": "adapter"}, "`model_name_or_path` 'adapter' is an adapter"),
        ({"dataset_name": "DATA", "model_name_or_path": "emoji", "load_in_4bit": True}, "need bitsandbytes"),
        (
            {"dataset_name": "DATA", "model_name_or_path": "emoji", "use_peft": True, "lora_dropout": 0.5},
            "`lora_dropout` must be 0",
        ),
        (
            {"dataset_name": "DATA", "model_name_or_path": "x", "use_peft": True, "use_dora": True},
            "`use_dora` is not for",
        ),
    ],
)
def test_mistakes_are_told_in_a_line(settings, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    find_spec = train_trainers.find_spec
    monkeypatch.setattr(train_trainers, "find_spec", lambda name: None if name == "bitsandbytes" else find_spec(name))
    for folder in ("data", "adapter"):
        (tmp_path / folder).mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    data = as_file(tmp_path, [{"text": "a"}])
    settings = {name: data if value == "DATA" else value for name, value in settings.items()}
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({**RUN, "output_dir": str(tmp_path / "out"), **settings}))
    said = refused(capsys, "train", "sft", f"--config={config}")
    assert message in said.splitlines()[-1] and "Traceback" not in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "rlhf"], "No such command 'rlhf'"),
        (["train", "sft", "--config"], "argument --config: expected a file"),
        (["train", "sft", "--config", "no-such.yaml"], "no-such.yaml"),
        (["train", "sft", "--output_dir", "x", "--max_steps", "two"], "invalid int value: 'two'"),
        (["train", "dpo", "--output_dir", "x", "--learning_rat", "1"], "Did you mean `learning_rate`?"),
        (["train", "sft", "--model=emoji"], "`model` is no option of `llada-uni train sft`. Did you mean `model_"),
        (["consolidate", "nowhere", "out"], "`checkpoint`"),
    ],
)
def test_wrong_commands_are_told_in_a_line(arguments, message, capsys):
    said = refused(capsys, *arguments)
    assert message in said.splitlines()[-1] and "Traceback" not in said


def test_options_of_adapters_are_taken():
    model_arguments = stages()["sft"][0][2]
    config = adapter_of(model_arguments(use_peft=True))
    assert (config.use_dora, config.use_rslora, config.modules_to_save, config.lora_dropout) == (False, False, None, 0)
    assert config.target_parameters == lora_config().target_parameters
    given = {"use_dora": True, "use_rslora": True, "lora_r": 3, "lora_alpha": 5, "lora_dropout": 0.25}
    config = adapter_of(model_arguments(use_peft=True, lora_target_modules=["dense", "up_proj"], **given))
    found = (config.use_dora, config.use_rslora, config.r, config.lora_alpha, config.lora_dropout)
    assert found == (True, True, 3, 5, 0.25) and config.target_modules == {"dense", "up_proj"}
    config = adapter_of(model_arguments(use_peft=True, use_rslora=True, lora_modules_to_save=["lm_head"]))
    assert config.use_rslora and config.modules_to_save == ["lm_head"]
    assert adapter_of(model_arguments(lora_r=3)) is None


def test_an_adapter_of_named_layers_is_found_from_everywhere(converted_dir, tmp_path, monkeypatch):
    """It remembers its pipeline by the whole path, however that was named."""
    monkeypatch.chdir(converted_dir.parent)
    output = run(
        "sft",
        tmp_path,
        model_name_or_path=converted_dir.name,
        dataset_name=as_file(tmp_path, [{"messages": CHAT}] * 4),
        use_peft=True,
        lora_target_modules=[r".*attention\.dense"],  # of one, trl makes a pattern
        use_dora=True,
        learning_rate=1e-2,
    )
    monkeypatch.chdir(tmp_path)
    assert json.loads((output / "adapter_config.json").read_text())["use_dora"]
    weights, before = (load_pipeline(str(name), "cpu").model.state_dict() for name in (output, converted_dir))
    assert {name for name in weights if not torch.equal(weights[name], before[name])} == {
        name for name in weights if name.endswith("attention.dense.weight")
    }


def test_an_adapter_goes_on_with_its_own_settings(converted_dir, tmp_path, capsys):
    settings = {"model_name_or_path": str(converted_dir), "dataset_name": as_file(tmp_path, [{"messages": CHAT}] * 4)}
    settings |= {
        "save_strategy": "steps",
        "save_steps": 1,
        "use_peft": True,
        "lora_target_modules": [r".*attention\.dense"],
    }
    output = run("sft", tmp_path, **settings, lora_r=4)
    weights = (output / "adapter_model.safetensors").read_bytes()
    for changed, message in (
        ({"lora_r": 8}, "has `r` 4, this run 8"),
        ({"lora_r": 4, "lora_alpha": 64}, "has `lora_alpha` 32, this run 64"),
        ({"use_peft": False}, "holds an adapter, and this run trains the model itself"),
    ):
        with pytest.raises(SystemExit) as stop:
            run("sft", tmp_path, **{**settings, **changed}, resume_from_checkpoint="true", max_steps=2)
        assert stop.value.code == 2
        assert message in capsys.readouterr().err
    assert (output / "adapter_model.safetensors").read_bytes() == weights
    run("sft", tmp_path, **settings, lora_r=4, resume_from_checkpoint="true", max_steps=2)
    assert (output / "checkpoint-2").is_dir()


@pytest.mark.parametrize(
    "stage, before, now, message",
    [
        (
            "sft",
            {"trained_parts": ["embeddings"]},
            {"trained_parts": ["head"]},
            "does not train, model.language_model",
        ),
        ("image_tokenizer_alignment", {}, {"train_codebook": True}, "did not train, vqmodel.quantize.embedding"),
    ],
    ids=["sft", "alignment"],
)
def test_a_run_goes_on_only_with_the_parts_it_trained(converted_dir, tmp_path, capsys, stage, before, now, message):
    settings = {"model_name_or_path": str(converted_dir), "save_strategy": "steps", "save_steps": 1}
    rows = [{"messages": CHAT}] * 4
    if stage != "sft":
        image = Image.new("RGB", (64, 64), "red")
        image.save(tmp_path / "red.png")
        inputs = load_processor(str(converted_dir)).image_processor([[image]], return_tensors="pt")
        height, width = inputs["image_grid_thw"][0, 1:].tolist()
        codes = [number % 7 for number in range(height * width)]
        rows = [{"image": str(tmp_path / "red.png"), "grid": [height, width], "codes": codes}] * 4
        settings["resize_mode"] = "understanding"
    settings["dataset_name"] = as_file(tmp_path, rows)
    output = run(stage, tmp_path, **settings, **before)
    with pytest.raises(SystemExit) as stop:
        run(stage, tmp_path, **settings, **now, resume_from_checkpoint="true", max_steps=2)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    run(stage, tmp_path, **settings, **before, resume_from_checkpoint="true", max_steps=2)
    assert (output / "checkpoint-2").is_dir()


def test_upon_a_model_in_few_bits_an_adapter_leaves_out_its_experts(converted_dir, tmp_path):
    quantised = tmp_path / "quantised"
    config = GroupwiseQuantizationConfig(bits=8, group_size=32)
    load_model(str(converted_dir), quantization_config=config).save_pretrained(quantised)
    load_processor(str(converted_dir)).save_pretrained(quantised)
    settings = {"model_name_or_path": str(quantised), "dataset_name": as_file(tmp_path, [{"messages": CHAT}] * 4)}
    output = run("sft", tmp_path, **settings, use_peft=True, lora_dropout=0.1)
    adapter = json.loads((output / "adapter_config.json").read_text())
    assert adapter["target_parameters"] is None and "query_key_value" in adapter["target_modules"]


def test_stages_that_train_all_weights_refuse_adapters(tmp_path, capsys):
    arguments = ["--dataset_name", "x", "--output_dir", str(tmp_path / "out"), "--use_peft", "true"]
    for stage in ("decoder", "autoencoder", "distill", "image_tokenizer", "image_tokenizer_alignment"):
        assert "`use_peft` is for sft, dpo and grpo" in refused(capsys, "train", stage, *arguments)


@pytest.mark.parametrize(
    "stage, message",
    [
        ("sft", "`dataset_name`: the columns ['words'] make no example of training. Known are: prompt + chosen"),
        ("dpo", "`dataset_name`: the columns ['words'] make no example of training."),
        ("grpo", "`dataset_name` must have a column `prompt`, it has ['words']"),
        ("image_tokenizer", "`dataset_name` must have a column `image` and a column `caption`, it has ['words']"),
        ("image_tokenizer_alignment", "`dataset_name` must have a column `image`, it has ['words']"),
        ("autoencoder", "`dataset_name` must have a column `image`, it has ['words']"),
        ("decoder", "`dataset_name` must have a column `image`, it has ['words']"),
        ("distill", "`dataset_name` must have a column `image`, it has ['words']"),
    ],
)
def test_columns_that_are_missing_are_told_before_a_model_is_loaded(tmp_path, capsys, stage, message):
    data, further = as_file(tmp_path, [{"words": "a"}]), {"grpo": ["--reward_funcs", "think_format_reward"]}
    further["image_tokenizer"] = ["--text_model_name_or_path", str(tmp_path / "none")]
    options = ["--dataset_name", data, "--output_dir", str(tmp_path / "out"), *further.get(stage, [])]
    assert message in refused(capsys, "train", stage, "--model_name_or_path", str(tmp_path / "none"), *options)


def test_ctrl_c_leaves_no_traceback(monkeypatch, capsys):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("llada_uni.cli.prepare", interrupted)
    with pytest.raises(SystemExit) as stop:
        main(["train", "sft"])
    assert stop.value.code == 130
    assert capsys.readouterr().err == "llada-uni: interrupted\n"


def test_missing_packages_are_named_with_their_extra(monkeypatch, capsys):
    monkeypatch.setattr("transformers_llada_uni.optional_dependencies.find_spec", lambda name: None)
    assert 'pip install "llada-uni[train]"' in refused(capsys, "train", "sft")


@pytest.mark.parametrize(("arguments", "words"), [(["--version"], "llada-uni "), (["--help"], "Usage: llada-uni ")])
def test_version_and_help_come_at_once(arguments, words):
    code = f"import sys; sys.argv[1:] = {arguments}; import llada_uni.cli; llada_uni.cli.main()"
    code = f"import atexit, sys; atexit.register(lambda: print('torch' in sys.modules)); {code}"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert words in said and said.endswith("False\n")  # nothing slow was imported


def test_help_of_a_stage_begins_with_its_own_options(capsys):
    main(["train", "sft", "--help"])
    said = capsys.readouterr().out
    places = [
        said.index(word)
        for word in ("--block_length ", "--model_name_or_path", "--packing_strategy", "--warmup_steps")
    ]
    assert places == sorted(places)
    assert said.count("--learning_rate ") == 1 and len(said[: places[0]].splitlines()) < 60


@pytest.mark.parametrize("place", ["", "model"])
def test_the_processor_of_a_pipeline_lies_beside_its_model(converted_dir, place):
    assert type(load_processor(str(converted_dir / place))).__name__ == "LLaDAUniProcessor"


def test_an_adapter_names_the_model_and_not_the_pipeline(converted_dir, tmp_path):
    model = AutoModelForMultimodalLM.from_pretrained(converted_dir, subfolder="model")
    trainer = LLaDAUniSFTTrainer(
        model,
        LLaDAUniSFTConfig(str(tmp_path), use_cpu=True),
        train_dataset=Dataset.from_dict({"messages": [CHAT]}),
        peft_config=lora_config(r=2),
    )
    assert trainer.model.peft_config["default"].base_model_name_or_path == str(converted_dir / "model")


def test_a_folder_without_a_processor_is_refused(tmp_path):
    with pytest.raises(ValueError, match="neither a processor nor a tokenizer"):
        load_processor(str(tmp_path))


def test_the_attention_implementation_is_that_of_the_language_model(converted_dir):
    model = load_model(str(converted_dir), attn_implementation="flex_attention")
    assert model.config.text_config._attn_implementation == "flex_attention"
    assert model.config.vision_config._attn_implementation == "sdpa"


def test_only_shards_can_be_consolidated(converted_dir, tmp_path, capsys):
    said = refused(capsys, "consolidate", str(converted_dir / "model"), str(tmp_path / "out"))
    assert "`checkpoint`" in said


@pytest.mark.parametrize(
    ("given", "taken"),
    [("true", True), ("True", True), ("false", None), (None, None), ("runs/checkpoint-5", "runs/checkpoint-5")],
)
def test_resuming_is_a_switch_or_a_folder(given, taken):
    args = SimpleNamespace(resume_from_checkpoint=given, output_dir="out", push_to_hub=False)
    trainer = Mock(args=args)
    finish(trainer, SimpleNamespace(dataset_name="data"))
    trainer.train.assert_called_once_with(resume_from_checkpoint=taken)
    trainer.save_model.assert_called_once_with("out")
