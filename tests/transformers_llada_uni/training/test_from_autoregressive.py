"""A tiny Ling, converted, is taken through LLaDA2.0's blocks, and learns to fill in masks."""

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from llada_uni.conversion.convert_llada_uni_checkpoint import convert_autoregressive
from transformers_llada_uni.training import LLaDAUniSFTConfig, LLaDAUniSFTTrainer
from transformers_llada_uni.training.stages import STAGES


def test_blocks_grow_and_shrink_while_the_loss_falls(ling, tmp_path):
    preset = STAGES["from_autoregressive"]
    assert preset.block_lengths[:5] == [1, 4, 32, 64, 4096] and preset.block_lengths[5:] == [1024, 256, 64]
    folder = convert_autoregressive(ling, tmp_path / "ling", progress=False)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = ["a red apple in the morning", "a green apple and a dog", "a dog in a red house"] * 8
    settings = {"block_lengths": [1, 4, 32, 64, 4096], "block_length_shares": [0.2, 0.2, 0.1, 0.1, 0.2]}
    quiet = {"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": True, "logging_steps": 1}
    args = LLaDAUniSFTConfig(
        str(tmp_path / "run"),
        stage="from_autoregressive",
        max_steps=20,
        max_length=128,
        learning_rate=2e-2,
        per_device_train_batch_size=2,
        **settings,
        **quiet,
    )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    trainer = LLaDAUniSFTTrainer(model, args, Dataset.from_dict({"text": texts}), processing_class=tokenizer)
    before = trainer.evaluate(Dataset.from_dict({"text": texts[:3]}))["eval_loss"]
    trainer.train()
    lengths = [entry["block_length"] for entry in trainer.state.log_history if "loss" in entry]
    assert lengths == [1] * 4 + [4] * 4 + [32] * 2 + [64] * 2 + [4096] * 4 + [32] * 4
    after = trainer.evaluate(Dataset.from_dict({"text": texts[:3]}))["eval_loss"]
    assert after < 0.6 * before
    trainer.save_model(str(tmp_path / "saved"))
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert saved.config.block_length == 32 and saved.config.mask_token_id == tokenizer.mask_token_id
    ids = tokenizer("a red", return_tensors="pt")["input_ids"]
    assert saved.generate(ids, max_new_tokens=8, num_steps_per_block=2).shape[1] > ids.shape[1]
