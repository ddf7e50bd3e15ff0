"""The checkpoint that comes with the package does what it was trained for: a handful of prompts, the right emoji."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from diffusers_llada_uni import embedded_checkpoint
from transformers_llada_uni.generation.best_of import prompt_recall


ROOT = Path(__file__).parents[1]
FIXTURES = ROOT / "tests" / "fixtures" / "emoji"
MOONS = ["new moon", "waxing crescent moon", "first quarter moon", "waxing gibbous moon"]


@pytest.fixture(scope="module")
def pipe():
    pipe = DiffusionPipeline.from_pretrained(embedded_checkpoint("emoji"), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def emoji():
    """64 emoji by their names, those that the tests ask for among them. Twemoji, CC-BY 4.0."""
    sheet = Image.open(FIXTURES / "emoji.png").convert("RGB")
    names = json.loads((FIXTURES / "names.json").read_text())
    corners = [(number % 8 * 64, number // 8 * 64) for number in range(len(names))]
    return {name: sheet.crop((x, y, x + 64, y + 64)) for name, (x, y) in zip(names, corners, strict=True)}


def nearest(picture, emoji):
    def pixels(image):
        return np.asarray(image.convert("RGB").resize((32, 32), Image.Resampling.BOX), dtype=np.float32)

    return min(emoji, key=lambda name: np.square(pixels(emoji[name]) - pixels(picture)).sum())


def generator():
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("decoder", ["turbo", "normal"])
def test_draws_what_is_asked_for(pipe, emoji, decoder):
    prompts = {
        "red apple": "red apple",
        "draw a rocket": "rocket",
        "show me an emoji of pizza": "pizza",
        "a picture of waving hand: dark skin tone": "waving hand: dark skin tone",
        "please draw the flag of norway": "flag of norway",
    }
    pictures = pipe(list(prompts), decoder=decoder, generator=generator()).images
    assert [picture.size for picture in pictures] == [(64, 64)] * len(prompts)
    assert [nearest(picture, emoji) for picture in pictures] == list(prompts.values())


def test_judges_its_own_codes(pipe, emoji):
    names = ["red apple", "rocket", "dog face", "waving hand: dark skin tone", "flag of norway"]
    codes = pipe.encode_images([emoji[name] for name in names])
    for number, name in enumerate(names):
        scores = prompt_recall(pipe.model, pipe.processor, [f"please draw {name}"] * len(names), codes)
        assert scores.index(max(scores)) == number


def test_the_best_of_four_is_better_than_any_of_four(pipe):
    prompts = ["a picture of rocket", "flag of norway", "draw a waving hand: dark skin tone", "pizza", "dog face"]
    prompts += ["red apple", "cat face", "broken heart", "a butterfly", "snowman"]
    sampled = {"output_type": "codes", "generation_kwargs": {"temperature": 3.0}}
    best = pipe(prompts, num_candidates=4, generator=generator(), **sampled)
    any_of_them = pipe(prompts, num_images_per_prompt=4, generator=generator(), **sampled)
    sure = pipe(prompts, output_type="codes").codes  # what the model is surest of, all of them right

    def distances(grids):
        return [float((one != sure[i * len(sure) // len(grids)]).float().mean()) for i, one in enumerate(grids)]

    kept, candidates = distances(best.codes), distances(any_of_them.codes)
    assert sum(kept) / len(kept) < 0.9 * sum(candidates) / len(candidates)


def test_names_what_it_sees(pipe, emoji):
    for name in ("red apple", "rocket", "dog face", "waving hand: medium-light skin tone"):
        content = [{"type": "image", "image": emoji[name]}, {"type": "text", "text": "what is this?"}]
        assert pipe.chat([{"role": "user", "content": content}], max_new_tokens=32).strip() == name


def test_edits(pipe, emoji):
    edits = [
        ("waving hand", "change the skin tone to dark", "waving hand: dark skin tone"),
        ("waving hand: dark skin tone", "make the skin medium-light", "waving hand: medium-light skin tone"),
        ("three o'clock", "set the clock to nine o'clock", "nine o'clock"),
        ("new moon", "change it to the full moon", "full moon"),
    ]
    sources, instructions, targets = zip(*edits, strict=True)
    pictures = pipe(list(instructions), image=[[emoji[name]] for name in sources], generator=generator()).images
    assert [nearest(picture, emoji) for picture in pictures] == list(targets)


def test_tells_a_story(pipe, emoji):
    parts = pipe.interleave("a story of 4 moon phases from the new moon", max_images=6, generator=generator())
    words = [part.strip() for part in parts if isinstance(part, str) and part.strip()]
    pictures = [part for part in parts if isinstance(part, Image.Image)]
    assert words == [f"then comes the {name}." for name in MOONS]
    assert [nearest(picture, emoji) for picture in pictures] == MOONS


def test_transformers_alone_reads_it(emoji):
    folder = embedded_checkpoint("emoji")
    processor = AutoProcessor.from_pretrained(folder / "processor")
    model = AutoModelForImageTextToText.from_pretrained(folder / "model", dtype=torch.float32)
    inputs = processor(images=emoji["rocket"], text="what is this?", task="understanding")
    sequence = model.generate(**inputs, max_new_tokens=32)
    answer = processor.batch_decode(sequence[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0]
    assert answer.strip() == "rocket"


def test_adapter_says_the_category_too(emoji):
    folder = embedded_checkpoint("emoji")
    processor = AutoProcessor.from_pretrained(folder / "processor")
    model = AutoModelForImageTextToText.from_pretrained(folder / "model", dtype=torch.float32)
    names = ["waving hand: dark skin tone", "flag of japan", "woman police officer: dark skin tone"]
    inputs = processor(images=[[emoji[name]] for name in names], text=["what is this?"] * 3, task="understanding")

    def answers():
        sequences = model.generate(**inputs, max_new_tokens=32)[:, inputs["input_ids"].shape[1] :]
        return [text.strip() for text in processor.batch_decode(sequences, skip_special_tokens=True)]

    assert answers() == names
    model.load_adapter(str(folder / "adapter"))
    categories = ["people & body", "flags", "people & body"]
    assert answers() == [f"{name} from {category}" for name, category in zip(names, categories, strict=True)]


def test_checkpoint_is_small_safe_and_complete(pipe):
    folder = embedded_checkpoint("emoji")
    files = [file for file in folder.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 50 * 2**20
    assert {file.suffix for file in files} <= {".json", ".safetensors", ".jinja", ".md", ".png"}
    assert pipe.loaded_decoders == ["turbo", "normal"]
    config = pipe.model.config.text_config
    assert config.num_experts >= 16 and config.n_group > config.topk_group and config.num_shared_experts


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="`name` must be one of .*emoji.*'emojis'"):
        embedded_checkpoint("emojis")


def test_first_command_of_the_readme(tmp_path):
    command = [sys.executable, str(ROOT / "examples" / "quickstart.py"), "--output-dir", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    assert {"drawn_1.png", "drawn_2.png", "drawn_3.png", "image.png", "edited.png", "words.txt"} <= {
        file.name for file in tmp_path.iterdir()
    }
    assert len(list(tmp_path.glob("story_*.png"))) == 4


def test_several_images_of_any_size_are_looked_at(pipe):
    images = [Image.new("RGB", size, "red") for size in ((64, 64), (192, 128), (40, 500))]
    content = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": "what is this?"}]
    inputs = pipe.processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=True, return_dict=True, add_generation_prompt=True
    )
    assert [grid[1:] for grid in inputs["image_grid_thw"].tolist()] == [[4, 4], [8, 12], [4, 4]]


def test_images_of_any_shape_are_edited(pipe):
    images = [[Image.new("RGB", size, "red")] for size in ((1920, 1080), (40, 500), (192, 64))]
    codes = pipe(["make it green"] * 3, image=images, output_type="codes").codes
    assert [tuple(grid.shape) for grid in codes] == [(4, 4), (4, 4), (4, 12)]


@pytest.mark.parametrize("side", [40, 72, 100, 160, 512])
def test_an_emoji_is_one_however_large_its_image_is(pipe, emoji, side):
    """What is no multiple of 64, or more than 192, is no drawing of the model's own, and so no scene."""
    image = emoji["waving hand"].resize((side, side), Image.Resampling.BICUBIC)
    content = [{"type": "image", "image": image}, {"type": "text", "text": "what is this?"}]
    assert pipe.chat([{"role": "user", "content": content}], max_new_tokens=32).strip() == "waving hand"
    edited = pipe("change the skin tone to dark", image=image, generator=generator()).images[0]
    assert nearest(edited, emoji) == "waving hand: dark skin tone"


def test_the_processor_in_the_root_is_that_of_its_folder():
    """transformers' Auto classes read the one, the pipeline the other."""
    root = embedded_checkpoint("emoji")
    files = [file for file in (root / "processor").iterdir() if file.name != "load_llada_uni.py"]
    assert len(files) >= 4
    for file in files:
        assert file.read_bytes() == (root / file.name).read_bytes(), file.name
