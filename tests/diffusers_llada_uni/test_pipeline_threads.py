"""Pipelines that share their components, each in a thread of its own, give what they give alone."""

from concurrent.futures import ThreadPoolExecutor

import PIL.Image
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from diffusers_llada_uni import LLaDAUniPipeline


NUM_THREADS = 4
TURNS = 8
FEW = {"num_inference_steps": 2, "num_steps_per_block": 2, "output_type": "latent"}


@pytest.fixture(scope="module")
def pipelines(converted_dir):
    first = LLaDAUniPipeline.from_pretrained(converted_dir)
    first.processor.image_processor.editing_max_pixels = 4 * 32 * 32
    first.processor.image_processor.min_pixels = 32 * 32
    first.processor.image_processor.max_pixels = 64 * 64
    pipelines = [first]
    for _ in range(NUM_THREADS - 1):
        schedulers = {
            name: FlowMatchEulerDiscreteScheduler.from_config(getattr(first, name).config)
            for name in ("scheduler", "scheduler_turbo")
        }
        pipelines.append(LLaDAUniPipeline(**{**first.components, **schedulers}))
    for pipe in pipelines:
        pipe.set_progress_bar_config(disable=True)
    return pipelines


def image_of(turn: int) -> PIL.Image.Image:
    return PIL.Image.new("RGB", (64, 64), (30 * turn, 255 - 30 * turn, 128))


def generator_of(turn: int) -> torch.Generator:
    return torch.Generator().manual_seed(turn)


def draw(pipe, turn):
    sampled = {"generation_kwargs": {"do_sample": True, "temperature": 2.0}}
    arguments = {"height": 64, "width": 96, "decoder": "normal" if turn % 2 else "turbo", **FEW, **sampled}
    output = pipe(f"{turn} cats", generator=generator_of(turn), **arguments)
    return output.codes[0], output.images


def edit(pipe, turn):
    output = pipe(f"make it {turn}", image=image_of(turn), generator=generator_of(turn), **FEW)
    return output.codes[0], output.images


def chat(pipe, turn):
    content = [{"type": "image", "image": image_of(turn)}, {"type": "text", "text": f"What is {turn}?"}]
    return pipe.chat([{"role": "user", "content": content}], max_new_tokens=16)


def tell(pipe, turn):
    settings = {"max_new_tokens": 8, "num_steps_per_block": 2}
    arguments = {"max_images": 1, "height": 64, "width": 64, "num_inference_steps": 1, "num_steps_per_block": 2}
    return pipe.interleave(f"story {turn}", generator=generator_of(turn), generation_kwargs=settings, **arguments)


def is_same(ours, theirs):
    if isinstance(ours, torch.Tensor):
        return torch.equal(ours, theirs)
    if isinstance(ours, (list, tuple)):
        return len(ours) == len(theirs) and all(map(is_same, ours, theirs))
    return ours == theirs  # also images


@pytest.mark.parametrize("task", [draw, edit, chat, tell])
def test_threads_give_what_one_gives(pipelines, task):
    expected = [task(pipelines[0], turn) for turn in range(TURNS)]
    assert not all(is_same(expected[0], other) for other in expected)

    def run(thread):
        return [task(pipelines[thread], (thread + turn) % TURNS) for turn in range(TURNS)]

    with ThreadPoolExecutor(NUM_THREADS) as threads:
        for thread, results in enumerate(threads.map(run, range(NUM_THREADS))):
            for turn, result in enumerate(results):
                assert is_same(result, expected[(thread + turn) % TURNS]), (thread, turn)
