"""Published settings: what they are, what goes before them, and what their losses are taken on."""

import pytest
import torch
from datasets import Dataset, Image, List
from transformers import AutoModelForImageTextToText, AutoProcessor

from llada_uni.commands.train_options import StageParser
from llada_uni.commands.train_trainers import stages
from tests.transformers_llada_uni.training.test_sft_trainer import BLOCK, loss_by_hand
from transformers_llada_uni.training import (
    RECIPES,
    LLaDAUniSFTConfig,
    LLaDAUniSFTTrainer,
    encode_images,
    prepare_dataset,
)
from transformers_llada_uni.training.objective.noise import step_generators
from transformers_llada_uni.training.stages import LANGUAGE_MODEL, STAGES

from .data.test_preparation import answer_of, codes_of, picture, prompt_of


QUIET = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "save_strategy": "no"}


@pytest.fixture(scope="module")
def processor(converted_dir):
    return AutoProcessor.from_pretrained(converted_dir / "processor")


@pytest.fixture(scope="module")
def model(converted_dir):
    return AutoModelForImageTextToText.from_pretrained(converted_dir / "model")


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_a_configuration(tmp_path, name):
    args = LLaDAUniSFTConfig(str(tmp_path), use_cpu=True, **RECIPES[name])
    for setting, value in RECIPES[name].items():
        assert getattr(args, setting) == value, setting


def test_what_is_published(tmp_path):
    lengths = {name: recipe["max_length"] for name, recipe in RECIPES.items() if name.startswith("uni_")}
    assert lengths == {"uni_alignment": 8192, "uni_pretraining": 8192, "uni_finetuning": 16384}
    sides = [RECIPES[name]["editing_max_pixels"] ** 0.5 for name in lengths]
    assert sides == [256, 512, 512]
    mix = RECIPES["uni_finetuning"]["task_mix"]
    assert 5 * mix["text"] == sum(share for task, share in mix.items() if task != "text")
    assert mix.keys() == STAGES["supervised_finetuning"].task_mix.keys()
    args = LLaDAUniSFTConfig(str(tmp_path), use_cpu=True, **RECIPES["dfactory"])
    assert set(args.trained_parts) == set(LANGUAGE_MODEL) and args.confidence_weight == 2.0
    noise = args.make_noise()
    assert (noise.noise_range, noise.noise_level, noise.weighting) == ((0.3, 0.8), "sample", "none")
    masked, weights = noise.sample(torch.zeros(1, 4096).long(), None, 32, torch.Generator().manual_seed(0))
    assert 0.25 < masked.float().mean() < 0.85 and weights[masked].unique().numel() == 1
    assert (
        not noise.complementary and LLaDAUniSFTConfig(str(tmp_path), **RECIPES["clipped"]).make_noise().complementary
    )


@pytest.mark.parametrize("place", ["--recipe", "in the file"])
def test_the_command_takes_a_recipe_and_all_else_goes_before_it(tmp_path, place):
    file = tmp_path / "config.yaml"
    file.write_text("weight_decay: 0.5\n" + ("recipe: dfactory\n" if place == "in the file" else "recipe: clipped\n"))
    words = ["--config", str(file), "--output_dir", str(tmp_path), "--learning_rate", "3e-5", "--use_cpu"]
    words += [place, "dfactory"] if place != "in the file" else []
    _, args, *rest = StageParser("sft", stages()["sft"][0]).parse(words)
    assert len(rest) == 2
    assert (args.learning_rate, args.weight_decay, args.noise_level) == (3e-5, 0.5, "sample")
    assert args.noise_range == [0.3, 0.8] and args.confidence_weight == 2.0


def test_an_unknown_recipe_is_refused(tmp_path):
    file = tmp_path / "config.yaml"
    for option, value in (("recipe", "secret"), ("recipe", "[dfactory]"), ("stage", "[alignment]")):
        file.write_text(f"{option}: {value}\n")
        with pytest.raises(ValueError, match=f"`{option}` must be one of"):
            StageParser("sft", stages()["sft"][0]).parse(["--config", str(file), "--output_dir", str(tmp_path)])
    file.write_text("recipe: dfactory\n")
    with pytest.raises(ValueError, match="recipe"):
        StageParser("dpo", stages()["dpo"][0]).parse(["--config", str(file), "--output_dir", str(tmp_path)])


def test_the_loss_is_taken_on_one_side_of_captions_and_images(processor, model):
    """Stage 0 of the paper: on codes (and what closes them) where an image is made, on words where one is shown."""
    settings = {"block_length": BLOCK, "caption_dropout": 0.0, "image_dropout": 0.0, "model": model}
    image = picture(size=(128, 96))
    made = Dataset.from_dict({"image": [image], "caption": ["a cat"]}).cast_column("image", Image())
    row = prepare_dataset(made, processor, **settings)[0]
    num_codes = codes_of(model, processor, image, "editing").numel()
    learnt = torch.tensor(answer_of(row))
    assert (learnt[:num_codes] >= processor.image_token_offset).all()
    closing = {processor.image_end_token_id, processor.tokenizer.eos_token_id}
    assert set(learnt[num_codes:].tolist()) <= closing
    chat = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "A cat."}]
    shown = Dataset.from_dict({"messages": [chat], "image": [image]}).cast_column("image", Image())
    row = prepare_dataset(shown, processor, **settings)[0]
    assert max(answer_of(row)) < processor.image_token_offset <= max(prompt_of(row))


def test_images_to_make_grow_and_those_to_understand_do_not(processor, model, tmp_path):
    """At an area of 64 x 64 pixels an image is a quarter of what it is at 128 x 128; the saved processor stays."""
    square = picture(size=(160, 160))
    made = Dataset.from_dict({"image": [square], "caption": ["a cat"]}).cast_column("image", Image())
    settings = {"block_length": BLOCK, "caption_dropout": 0.0, "model": model}
    counts = []
    for side in (64, 128):
        row = prepare_dataset(made, processor, editing_max_pixels=side**2, **settings)[0]
        counts.append(sum(token >= processor.image_token_offset for token in row["input_ids"]))
    assert counts == [16, 64] and processor.image_processor.editing_max_pixels == 512**2
    chat = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "A cat."}]
    shown = Dataset.from_dict({"messages": [chat], "image": [square]}).cast_column("image", Image())
    small, usual = (prepare_dataset(shown, processor, editing_max_pixels=s, **settings)[0] for s in (64**2, None))
    assert small == usual
    with pytest.raises(ValueError, match="`editing_max_pixels`"):
        LLaDAUniSFTConfig(str(tmp_path), editing_max_pixels=0, use_cpu=True)
    with pytest.raises(ValueError, match="`editing_max_pixels` must be at least 1024"):
        prepare_dataset(made, processor, editing_max_pixels=100, **settings)
    args = LLaDAUniSFTConfig(str(tmp_path), editing_max_pixels=64**2, block_length=BLOCK, caption_dropout=0.0, **QUIET)
    trainer = LLaDAUniSFTTrainer(model, args, made, processing_class=processor)
    assert sum(token >= processor.image_token_offset for token in trainer.train_dataset[0]["input_ids"]) == 16


def test_a_document_in_several_resolutions(processor, model, tmp_path):
    """Three images of three grids in one document: its ids are those of inference, its loss that of the formula."""
    images = [picture(seed, size) for seed, size in enumerate([(128, 96), (64, 160), (160, 64)])]
    parts = [{"type": "text", "text": "Here:"}, {"type": "image"}, {"type": "text", "text": "and"}, {"type": "image"}]
    asked = [{"type": "image"}, {"type": "text", "text": "Wider, then higher."}]
    chat = [{"role": "user", "content": asked}, {"role": "assistant", "content": parts}]
    rows = Dataset.from_dict({"messages": [chat], "images": [images]}).cast_column("images", List(Image()))
    rows = encode_images(rows, model, processor, editing_max_pixels=64**2)
    grids = [torch.tensor(image["codes"]).view(image["grid"]) for image in rows[0]["image_codes"]]
    assert [tuple(grid.shape) for grid in grids] == [(8, 10), (6, 2), (2, 6)]

    row = prepare_dataset(rows, processor, block_length=BLOCK)[0]
    inputs = processor(text="Wider, then higher.", images=images[:1], task="interleaved").to(model.device)
    prompt = model.model.place_images(
        {"input_ids": inputs["input_ids"]}, inputs["pixel_values"], inputs["image_grid_thw"]
    )["input_ids"][0]
    assert prompt_of(row) == prompt.tolist()
    (found,) = processor.post_process(torch.tensor(answer_of(row)))
    assert [part.strip() for part in found[::2] if isinstance(part, str)][:2] == ["Here:", "and"]
    assert all(torch.equal(part, grid) for part, grid in zip(found[1::2], grids[1:], strict=True))

    settings = {"length_weighting": True, "complementary": False, "image_weight": 0.5}
    args = LLaDAUniSFTConfig(str(tmp_path), block_length=BLOCK, max_length=None, **settings, **QUIET)
    trainer = LLaDAUniSFTTrainer(model, args, rows, processing_class=processor)
    batch = trainer.data_collator([trainer.train_dataset[0]])
    trainer.model.train()
    masked, weights = trainer.noise.sample(batch["labels"], None, BLOCK, step_generators(trainer, 1))
    trainer.callback_handler.on_step_begin(trainer.args, trainer.state, trainer.control)  # the same noise again
    with torch.no_grad():
        loss = trainer.compute_loss(trainer.model, dict(batch))
        count = int((batch["labels"] != -100).sum())
        expected = loss_by_hand(trainer.model, batch, masked, weights, count, settings)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
