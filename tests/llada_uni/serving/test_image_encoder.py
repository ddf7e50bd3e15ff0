"""Images of prompts that come at the same time are encoded together; whose prompt is at fault fails alone."""

import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from transformers.image_processing_utils import BatchFeature

from llada_uni.serving import image_encoder
from llada_uni.serving.image_encoder import ImageEncoder


PLACE = 7


class Model:
    """Takes the first value of a patch for its code; refuses a patch of 13; begins when `go` is set."""

    config = SimpleNamespace(image_token_id=PLACE)

    def __init__(self) -> None:
        self.calls: list[int] = []
        self.begun, self.go = threading.Event(), threading.Event()

    def place_images(self, input_ids, pixel_values, image_grid_thw):
        self.calls.append(len(image_grid_thw))
        self.begun.set()
        assert self.go.wait(10)
        codes = pixel_values[:, 0].long()
        if 13 in codes:
            raise ValueError("A bad patch.")
        return {name: ids.masked_scatter(ids == PLACE, codes) for name, ids in input_ids.items()}


def inputs(code: int, num_patches: int = 2) -> BatchFeature:
    ids = torch.tensor([[1, *[PLACE] * num_patches, code + 1]])
    patches = torch.full((num_patches, 3), code)
    return BatchFeature(
        {"input_ids": ids, "pixel_values": patches, "image_grid_thw": torch.tensor([[1, 1, num_patches]])}
    )


def place_together(model: Model, prompts: list[BatchFeature]) -> list[torch.Tensor | Exception]:
    """The first, and while it is encoded all others."""
    encoder = ImageEncoder(model)

    def place(prompt: BatchFeature) -> torch.Tensor | Exception:
        try:
            return encoder.place_images(prompt)
        except ValueError as error:
            return error

    with ThreadPoolExecutor(len(prompts)) as threads:
        first = threads.submit(place, prompts[0])
        assert model.begun.wait(10)
        others = [threads.submit(place, prompt) for prompt in prompts[1:]]
        while len(encoder._waiting) < len(others):
            pass
        model.go.set()
        return [placed.result(10) for placed in (first, *others)]


def test_who_waits_is_encoded_along():
    model = Model()
    found = place_together(model, [inputs(code, 1 + code % 3) for code in range(20, 26)])
    assert [ids.tolist() for ids in found] == [[1, *[code] * (1 + code % 3), code + 1] for code in range(20, 26)]
    assert model.calls == [1, 5]


def test_a_bad_prompt_fails_alone():
    model = Model()
    first, bad, good = place_together(model, [inputs(20), inputs(13), inputs(21)])
    assert str(bad) == "A bad patch." and isinstance(bad, ValueError)
    assert first.tolist() == [1, 20, 20, 21] and good.tolist() == [1, 21, 21, 22]


def test_no_more_patches_than_allowed(monkeypatch):
    monkeypatch.setattr(image_encoder, "MAX_PATCHES", 5)
    model = Model()
    found = place_together(model, [inputs(20), inputs(21, 9), *[inputs(code) for code in range(22, 25)]])
    assert [ids[1].item() for ids in found] == [20, 21, 22, 23, 24]
    assert sum(model.calls) == 5 and max(model.calls) == 2


def test_places_and_patches_of_one_prompt_must_fit():
    """Or the codes of one would stand in another's prompt."""
    model, prompt = Model(), inputs(20)
    model.go.set()
    prompt["input_ids"] = torch.tensor([[1, PLACE, 2]])
    with pytest.raises(ValueError, match="1 places for 2 codes"):
        ImageEncoder(model).place_images(prompt)
    assert not model.calls


def test_a_prompt_without_images():
    prompt = BatchFeature({"input_ids": torch.tensor([[1, 2]])})
    assert ImageEncoder(Model()).place_images(prompt).tolist() == [1, 2]
