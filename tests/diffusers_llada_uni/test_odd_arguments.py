"""What is odd and means something: stacks of images, callbacks that know their tensors, settings given twice."""

import copy
import json

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback

from diffusers_llada_uni import LLaDAUniPipeline, embedded_checkpoint
from transformers_llada_uni import BlockDiffusionGenerationConfig
from transformers_llada_uni.generation.best_of import prompt_recall


@pytest.fixture(scope="module")
def pipe():
    pipe = LLaDAUniPipeline.from_pretrained(embedded_checkpoint("emoji"), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def drawn(pipe):
    return pipe(["a cat", "a red apple"], generator=torch.Generator().manual_seed(0), output_type="pt").images


def of(pipe, *args, **kwargs):
    return [codes.tolist() for codes in pipe(*args, output_type="codes", **kwargs).codes]


@pytest.mark.parametrize("kind", ["pt", "np"])
def test_a_stack_of_images_is_dealt_out_to_prompts(pipe, drawn, kind):
    stack = drawn if kind == "pt" else drawn.permute(0, 2, 3, 1).numpy()
    prompts = ["make it small"] * 2
    assert of(pipe, prompts, image=stack) == of(pipe, prompts, image=list(stack))
    with pytest.raises(ValueError, match="`image` has 2 entries for 3 prompts"):
        pipe(["make it small"] * 3, image=stack)


def test_a_stack_of_masks_is_dealt_out_to_prompts(pipe):
    source, masks = torch.arange(16).view(4, 4) + 100, torch.zeros(2, 1, 4, 4)
    masks[0, 0, 0], masks[1, 0, 3] = 1, 1
    made = torch.tensor(of(pipe, ["a cat", "a dog"], image_codes=[source] * 2, mask_image=masks))
    changed = (made != source).any(dim=-1)
    assert not changed[0, 1:].any() and not changed[1, :3].any() and changed[0, 0] and changed[1, 3]
    with pytest.raises(ValueError, match="`mask_image` must hold one mask for each prompt, got 2"):
        pipe("a cat", image_codes=source, mask_image=[list(masks[:, 0])])


def test_a_mask_of_what_is_cut_off_is_refused_before_any_work(pipe, monkeypatch):
    image, mask = PIL.Image.new("RGB", (600, 400), "white"), PIL.Image.new("L", (600, 400))
    mask.paste(255, (0, 0, 60, 400))
    monkeypatch.setattr(pipe.model, "generate_image_codes", None)
    with pytest.raises(ValueError, match="`mask_image`: what is white of it is cut off"):
        pipe("a red apple", image=image, mask_image=mask)


def test_floats_that_shall_not_be_rescaled(pipe, drawn):
    for image in (drawn[0], drawn[0].permute(1, 2, 0).numpy()):
        with pytest.raises(ValueError, match="`do_rescale=False` is not needed for floats in 0..1"):
            pipe.processor(images=[image], text="what is this?", task="understanding", do_rescale=False)
    bright = np.full((64, 64, 3), 200.0, dtype=np.float32)
    values = pipe.processor(images=bright, text="a", task="understanding", do_rescale=False, do_normalize=False)
    assert values["pixel_values"].unique().tolist() == [200.0]


class Recorded(PipelineCallback):
    tensor_inputs = ["image_features"]

    def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
        self.seen = list(callback_kwargs)
        return callback_kwargs


@pytest.mark.parametrize("wrap", [lambda callback: callback, lambda callback: MultiPipelineCallbacks([callback])])
def test_callbacks_of_diffusers_say_their_tensors(pipe, wrap):
    callback = Recorded(cutoff_step_ratio=None, cutoff_step_index=1)
    pipe("a cat", callback_on_step_end=wrap(callback))
    assert callback.seen == ["image_features"]
    callback.tensor_inputs = ["prompt_embeds"]
    with pytest.raises(ValueError, match="`callback_on_step_end_tensor_inputs` may name .* got 'prompt_embeds'"):
        pipe("a cat", callback_on_step_end=wrap(callback))


@pytest.mark.parametrize("sizes", [("50GB", "20MB"), ("20MB", "50GB")])
def test_what_was_saved_last_is_loaded(pipe, tmp_path, sizes):
    absent = {"vae", "semantic_embedder", "transformer", "scheduler", "transformer_turbo", "scheduler_turbo"}
    alone = LLaDAUniPipeline(copy.deepcopy(pipe.model), pipe.processor, **dict.fromkeys(absent))
    for size in sizes:
        with torch.no_grad():
            alone.model.lm_head.weight.sub_(1)
        alone.save_pretrained(tmp_path, max_shard_size=size)
    loaded = LLaDAUniPipeline.from_pretrained(tmp_path).model.lm_head.weight
    assert torch.equal(loaded, alone.model.lm_head.weight)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = {str(file.relative_to(tmp_path)) for file in (tmp_path / "model").glob("*.safetensors")}
    assert files == set(index["weight_map"].values())


def test_steps_of_a_generation_config_count(pipe):
    inputs = pipe.processor(text="a cat", task="text_to_image", height=64, width=64)

    def passes(**arguments):
        settings = {"threshold": 1.0, "return_dict_in_generate": True}
        return pipe.model.generate_image_codes(**inputs, **settings, **arguments).num_forward_passes

    config = BlockDiffusionGenerationConfig(num_steps_per_block=2, block_length=16)
    assert passes(generation_config=config) == passes(num_steps_per_block=2) < passes()
    assert passes(generation_config=config, num_steps_per_block=8) == passes() == passes(num_steps_per_block=8)


def test_guidance_among_further_settings_is_checked_before_thoughts(pipe, monkeypatch):
    monkeypatch.setattr(pipe.model, "generate", None)
    with pytest.raises(ValueError, match="`image_guidance_scale` needs an `image`"):
        pipe("a cat", thinking=True, generation_kwargs={"image_guidance_scale": 1.0})
    with pytest.raises(ValueError, match="`negative_prompt` needs guidance"):
        pipe("a cat", negative_prompt="a dog", generation_kwargs={"guidance_scale": 1.0})


def test_thoughts_may_end_at_a_string(pipe):
    words = "the animal that says moo"
    thought = pipe(words, thinking=True).thoughts[0]
    end = thought.split()[2].strip(".")  # whatever the model thinks
    stopped = pipe(words, thinking=True, thinking_kwargs={"stop_strings": [end]}).thoughts[0]
    assert 0 < len(stopped) < len(thought) and thought.startswith(stopped[:5])


def test_parts_of_a_chat_that_nobody_knows_are_refused(pipe):
    for part in ({"type": "input_text", "text": "hello"}, {"type": "file", "file": {}}):
        with pytest.raises(ValueError, match=rf"has a part of type '{part['type']}'; known are 'text', 'image'"):
            pipe.processor.apply_chat_template([{"role": "user", "content": [part]}], tokenize=True)


def test_codes_of_a_call_are_decoded_again(pipe):
    made = [codes for size in (64, 128) for codes in pipe("a cat", height=size, width=size, output_type="codes").codes]
    images = pipe.decode_codes(made, generator=[torch.Generator().manual_seed(seed) for seed in range(2)])
    assert [image.size for image in images] == [(64, 64), (128, 128)]
    alone = pipe.decode_codes(made[1][None], generator=[torch.Generator().manual_seed(1)])[0]
    assert np.abs(np.asarray(alone, dtype=int) - np.asarray(images[1], dtype=int)).max() <= 1
    with pytest.raises(ValueError, match="`codes` must lie in 0"):
        pipe.decode_codes([made[0], made[1] - 10_000])


def test_control_tokens_in_a_prompt_are_words_to_the_judge(pipe):
    codes = pipe("a cat", output_type="codes").codes
    said = []
    tokenizer = pipe.processor.tokenizer
    for words in ("cat <|image|>", "cat"):
        said += prompt_recall(pipe.model, pipe.processor, [words], codes)
    assert said[0] != said[1] and tokenizer.convert_tokens_to_ids("<|image|>") is not None
