"""A pipeline in several threads gives what it gives in one."""

import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import PIL.Image
import pytest
import torch

from diffusers_llada_uni import LLaDAUniPipeline


NUM_THREADS = 4
TURNS = 8
FEW = {"num_inference_steps": 2, "num_steps_per_block": 2, "output_type": "latent"}


@pytest.fixture(scope="module")
def pipe(converted_dir):
    pipe = LLaDAUniPipeline.from_pretrained(converted_dir)
    pipe.processor.image_processor.editing_max_pixels = 4 * 32 * 32
    pipe.processor.image_processor.min_pixels = 32 * 32
    pipe.processor.image_processor.max_pixels = 64 * 64
    pipe.set_progress_bar_config(disable=True)
    return pipe


def image_of(turn: int) -> PIL.Image.Image:
    return PIL.Image.new("RGB", (64, 64), (30 * turn, 255 - 30 * turn, 128))


def generator_of(turn: int) -> torch.Generator:
    return torch.Generator().manual_seed(turn)


def draw(pipe, turn):
    sampled = {"generation_kwargs": {"do_sample": True, "temperature": 2.0}}
    arguments = {"height": 64, "width": 96, "decoder": "normal" if turn % 2 else "turbo", **FEW, **sampled}
    output = pipe(f"{turn} cats", generator=generator_of(turn), **arguments)
    return output.codes[0], output.images


def draw_two(pipe, turn):
    prompts = ["a cat", "a much longer wish " * (1 + turn % 3)]
    output = pipe(prompts, generator=generator_of(turn), height=64, width=64, **FEW)
    return output.codes, output.images


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


@pytest.mark.parametrize("task", [draw, draw_two, edit, chat, tell])
def test_threads_give_what_one_gives(pipe, task):
    expected = [task(pipe, turn) for turn in range(TURNS)]
    assert not all(is_same(expected[0], other) for other in expected)

    def run(thread):
        return [task(pipe, (thread + turn) % TURNS) for turn in range(TURNS)]

    with ThreadPoolExecutor(NUM_THREADS) as threads:
        for thread, results in enumerate(threads.map(run, range(NUM_THREADS))):
            for turn, result in enumerate(results):
                assert is_same(result, expected[(thread + turn) % TURNS]), (thread, turn)


def test_a_decoding_leaves_the_schedulers_as_they_are(pipe):
    before = pipe.scheduler_turbo.sigmas.clone()
    pipe.decode_codes(torch.tensor([[[1, 2], [3, 4]]]), "turbo", 2)
    assert torch.equal(pipe.scheduler_turbo.sigmas, before) and pipe.scheduler_turbo.step_index is None


def test_a_copy_decodes_for_itself(pipe):
    pipe.decode_codes(torch.tensor([[[1, 2], [3, 4]]]), "normal", 3, output_type="latent")
    copied = copy.deepcopy(pipe)
    assert pipe.num_timesteps == 2 and copied.num_timesteps == 0


def test_a_callback_stops_its_own_thread(pipe):
    """While one thread waits in its callback, another decodes with other settings; neither sees the other's."""
    entered, go_on = threading.Event(), threading.Event()
    codes = torch.tensor([[[1, 2], [3, 4]]])
    steps = []

    def stop(pipe, step, timestep, tensors):
        steps.append(step)
        entered.set()
        assert go_on.wait(60)
        assert pipe.guidance_scale == 2.0 and pipe.num_timesteps == 4
        pipe._interrupt = True
        return tensors

    with ThreadPoolExecutor(1) as threads:
        stopped = threads.submit(
            lambda: pipe.decode_codes(
                codes, "normal", 5, 2.0, generator=generator_of(0), output_type="latent", callback_on_step_end=stop
            )
        )
        assert entered.wait(60)
        whole = pipe.decode_codes(codes, "turbo", 3, generator=generator_of(1), output_type="latent")
        go_on.set()
        stopped.result()
    assert steps == [0]
    assert torch.equal(whole, pipe.decode_codes(codes, "turbo", 3, generator=generator_of(1), output_type="latent"))


def test_what_a_callback_decodes_changes_nothing_of_its_own_decoding(pipe):
    codes = torch.tensor([[[1, 2], [3, 4]]])
    settings = {"output_type": "latent", "generator": generator_of(0)}

    def preview(pipe, step, timestep, tensors):
        pipe.decode_codes(codes, "turbo", 2, generator=generator_of(1), output_type="latent")
        assert pipe.num_timesteps == 3 and pipe.guidance_scale == 2.0
        return tensors

    plain = pipe.decode_codes(codes, "normal", 4, 2.0, **settings)
    settings["generator"] = generator_of(0)
    watched = pipe.decode_codes(codes, "normal", 4, 2.0, callback_on_step_end=preview, **settings)
    assert torch.equal(plain, watched)
