"""The alignment of the image tokenizer: the loss by hand, and that images get the codes they are given."""

import json

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset, Image
from PIL import Image as PILImage
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from transformers_llada_uni.training import (
    LLaDAUniImageTokenizerAlignmentConfig,
    LLaDAUniImageTokenizerAlignmentTrainer,
)
from transformers_llada_uni.training.data.dataset_loading import load_training_dataset


COLOURS = ("red", "green", "blue", "yellow", "white", "black")


@pytest.fixture
def model_and_processor(converted_dir):
    return (
        AutoModelForImageTextToText.from_pretrained(converted_dir / "model"),
        AutoProcessor.from_pretrained(converted_dir / "processor"),
    )


def rows(model, processor):
    """Images of one colour each, darkened, with the codes of the bright ones."""
    bright = [PILImage.new("RGB", (64, 64), colour) for colour in COLOURS]
    dark = [PILImage.blend(image, PILImage.new("RGB", (64, 64), "grey"), 0.4) for image in bright]
    inputs = processor.image_processor([[image] for image in bright], return_tensors="pt")
    grids = model.get_image_codes(inputs["pixel_values"], inputs["image_grid_thw"])
    codes = [[{"grid": list(grid.shape), "codes": grid.flatten().tolist()}] for grid in grids]
    return Dataset.from_dict({"image": dark, "image_codes": codes}).cast_column("image", Image())


def make_trainer(model, processor, data, tmp_path, **settings):
    args = LLaDAUniImageTokenizerAlignmentConfig(
        str(tmp_path),
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        logging_steps=1,
        per_device_train_batch_size=6,
        per_device_eval_batch_size=6,
        resize_mode="understanding",  # fewer patches
        **settings,
    )
    return LLaDAUniImageTokenizerAlignmentTrainer(model, args, data, data, processor)


def test_loss_by_hand(model_and_processor, tmp_path):
    model, processor = model_and_processor
    data = rows(model, processor)
    trainer = make_trainer(model, processor, data, tmp_path)
    batch = trainer.data_collator([data[number] for number in range(3)])
    wanted = torch.tensor([code for row in data.select(range(3)) for code in row["image_codes"][0]["codes"]])
    assert torch.equal(batch["labels"], wanted)
    with torch.no_grad():
        loss, accuracy = trainer.model(**batch)
        hidden_states = model.model.visual(batch["pixel_values"], grid_thw=batch["image_grid_thw"]).last_hidden_state
        features = F.normalize(model.model.vqmodel.quant_conv(hidden_states.T[None, :, None])[0, :, 0].T, dim=-1)
        codes = F.normalize(model.model.vqmodel.quantize.embedding.weight, dim=-1)
    shares = (features @ codes.T / 0.05).log_softmax(dim=-1)
    torch.testing.assert_close(loss, -shares[range(len(wanted)), wanted].mean())
    codes = model.get_image_codes(batch["pixel_values"], batch["image_grid_thw"])
    nearest = torch.cat([grid.flatten() for grid in codes])
    assert accuracy == (nearest == wanted).float().mean()


def test_images_get_the_codes_they_are_given(model_and_processor, tmp_path):
    model, processor = model_and_processor
    data = rows(model, processor)
    trainer = make_trainer(model, processor, data, tmp_path, max_steps=80, learning_rate=3e-3)
    codebook = model.model.vqmodel.quantize.embedding.weight.detach().clone()
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    logged = [entry["code_accuracy"] for entry in trainer.state.log_history if "code_accuracy" in entry]
    assert logged[0] < 0.8 < 0.95 < logged[-1]
    assert trainer.evaluate()["eval_loss"] < before / 4
    assert torch.equal(model.model.vqmodel.quantize.embedding.weight, codebook)
    trainer.save_model()
    saved = load_file(tmp_path / "image_tokenizer" / "image_tokenizer.safetensors")
    assert torch.equal(saved["model.vqmodel.quant_conv.weight"], model.model.vqmodel.quant_conv.weight)


def test_codes_that_lie_too_close_move_apart(model_and_processor, tmp_path):
    """Two images shall have codes which are all but the same: the tower cannot learn to tell these, if they stay."""
    model, processor = model_and_processor
    codebook = model.model.vqmodel.quantize.embedding.weight
    with torch.no_grad():
        codebook[1] = codebook[0] + 1e-4 * codebook[2]
    first = codebook.detach().clone()
    images = [PILImage.new("RGB", (64, 64), colour) for colour in ("red", "blue")]
    inputs = processor.image_processor([[image] for image in images], return_tensors="pt")
    grids = inputs["image_grid_thw"][:, 1:].tolist()
    codes = [[{"grid": grid, "codes": [code] * (grid[0] * grid[1])}] for code, grid in enumerate(grids)]
    data = Dataset.from_dict({"image": images, "image_codes": codes}).cast_column("image", Image())
    settings = {"max_steps": 30, "learning_rate": 3e-3, "weight_decay": 0.0}
    make_trainer(model, processor, data, tmp_path, **settings).train()
    assert torch.equal(codebook, first)
    assert F.cosine_similarity(codebook[0], codebook[1], dim=0) > 0.999
    trainer = make_trainer(model, processor, data, tmp_path, **settings, train_codebook=True)
    trainer.train()
    assert F.cosine_similarity(codebook[0], codebook[1], dim=0) < 0.99
    logged = [entry["code_accuracy"] for entry in trainer.state.log_history if "code_accuracy" in entry]
    assert logged[0] < 0.6 and logged[-1] == 1
    trainer.save_model()
    saved = load_file(tmp_path / "image_tokenizer" / "image_tokenizer.safetensors")
    assert torch.equal(saved["model.vqmodel.quantize.embedding.weight"], codebook)


def test_activations_are_recomputed_and_weights_must_be_fine(model_and_processor, tmp_path):
    model, processor = model_and_processor
    data = rows(model, processor)
    trainer = make_trainer(model, processor, data, tmp_path, max_steps=1, activation_checkpointing=True)
    trainer.train()
    assert model.model.visual.is_gradient_checkpointing
    with pytest.raises(ValueError, match="`model` must be loaded with `dtype='float32'`"):
        make_trainer(model.bfloat16(), processor, data, tmp_path)


def test_rows_of_the_command_are_taken_as_they_are(model_and_processor, tmp_path):
    model, processor = model_and_processor
    data = rows(model, processor)
    entries = []
    for number, row in enumerate(data):
        row["image"].save(tmp_path / f"{number}.png")
        entries.append({"image": str(tmp_path / f"{number}.png"), **row["image_codes"][0]})
    (tmp_path / "codes.jsonl").write_text("\n".join(map(json.dumps, entries)))
    (command,) = load_training_dataset(str(tmp_path / "codes.jsonl")).values()
    batches = [make_trainer(model, processor, d, tmp_path).data_collator(list(d)) for d in (command, data)]
    assert all(torch.equal(batches[0][name], batches[1][name]) for name in batches[1])


def test_codes_that_do_not_fit_are_refused(model_and_processor, tmp_path):
    model, processor = model_and_processor
    data = rows(model, processor)
    trainer = make_trainer(model, processor, data, tmp_path)
    row = data[0]
    (codes,) = row["image_codes"]
    with pytest.raises(ValueError, match=r"`image_codes` have the grid \[1, 2\], but the image has"):
        trainer.data_collator([{**row, "image_codes": [{"grid": [1, 2], "codes": [0, 0]}]}])
    with pytest.raises(ValueError, match="`image_codes` must lie in 0.."):
        trainer.data_collator([{**row, "image_codes": [{**codes, "codes": [10**6] * len(codes["codes"])}]}])
    for wrong in ([[1, 2], [3, 4]], [1, 2], codes, [], [codes, codes], [{**codes, "codes": [0]}], None):
        with pytest.raises(ValueError, match="`image_codes` of a row must be"):
            trainer.data_collator([{**row, "image_codes": wrong}])
    with pytest.raises(ValueError, match="Row 1: `image_codes` must lie in 0..255, got 256"):
        wrong = [[{"grid": [1, 1], "codes": [code]}] for code in (0, 256)]
        wrong = Dataset.from_dict({"image": data[:2]["image"], "image_codes": wrong})
        make_trainer(model, processor, wrong, tmp_path)
    with pytest.raises(ValueError, match="`train_dataset` must have a column `image_codes`, or `grid` and `codes`"):
        make_trainer(model, processor, data.remove_columns("image_codes"), tmp_path)
