"""The server, asked by OpenAI's own client."""

import base64
import gc
import io

import PIL.Image
import pytest
import torch

from llada_uni.serving.image_jobs import ImageJob


def data_url(image: PIL.Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def image_of(item) -> PIL.Image.Image:
    return PIL.Image.open(io.BytesIO(base64.b64decode(item.b64_json)))


@pytest.fixture(scope="module")
def apple(pipe) -> PIL.Image.Image:
    return pipe("red apple", generator=torch.Generator().manual_seed(0)).images[0]


@pytest.fixture(scope="module")
def said(pipe, apple) -> str:
    """What the model says of the apple, whether right or wrong."""
    content = [{"type": "image", "image": apple}, {"type": "text", "text": "What is this?"}]
    return pipe.chat([{"role": "user", "content": content}], max_new_tokens=64)


def question(image: PIL.Image.Image) -> list[dict]:
    content = [
        {"type": "image_url", "image_url": {"url": data_url(image)}},
        {"type": "text", "text": "What is this?"},
    ]
    return [{"role": "user", "content": content}]


def test_models(client):
    assert [model.id for model in client.models.list()] == ["emoji"]
    assert client.models.retrieve("emoji").owned_by == "llada-uni"


def test_an_answer_is_that_of_the_pipeline(client, apple, said):
    answer = client.chat.completions.create(model="emoji", messages=question(apple))
    assert answer.choices[0].message.content == said
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens > 0


def test_a_stream_adds_up(client, apple, said):
    stream = client.chat.completions.create(
        model="emoji", messages=question(apple), stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == said
    assert chunks[-1].usage.prompt_tokens > 0 and chunks[-2].choices[0].finish_reason == "stop"


def test_stop_and_length(client, apple, said):
    answer = client.chat.completions.create(model="emoji", messages=question(apple), stop=["nothing", said[2:6]])
    assert answer.choices[0].message.content == said[:2] and answer.choices[0].finish_reason == "stop"
    answer = client.chat.completions.create(model="emoji", messages=question(apple), max_tokens=1)
    assert answer.choices[0].finish_reason == "length" and answer.usage.completion_tokens == 1


def test_images_are_those_of_the_pipeline(client, pipe, apple):
    made = client.images.generate(model="emoji", prompt="red apple", size="64x64", response_format="b64_json")
    assert image_of(made.data[0]).size == (64, 64)
    made = client.images.generate(model="emoji", prompt="red apple", extra_body={"seed": 5})
    settings = {"generator": torch.Generator().manual_seed(5), "generation_kwargs": {"do_sample": True}}
    assert image_of(made.data[0]).tobytes() == pipe("red apple", **settings).images[0].tobytes()


def test_seeds(client):
    def draw(seed):
        made = client.images.generate(model="emoji", prompt="red apple", n=2, extra_body={"seed": seed})
        return [item.b64_json for item in made.data]

    first = draw(1)
    assert draw(1) == first and first[0] != first[1] and draw(3) != first


def test_edit(client, apple):
    file = io.BytesIO()
    apple.save(file, "PNG")
    source = ("apple.png", file.getvalue(), "image/png")
    made = client.images.edit(model="emoji", image=source, prompt="make it green")
    assert image_of(made.data[0]).size == apple.size
    made = client.images.edit(model="emoji", image=[source, source], prompt="make it green", n=2, quality="auto")
    assert [image_of(item).size for item in made.data] == [apple.size] * 2


def test_edit_under_a_mask(client, pipe, apple):
    """As for OpenAI what is transparent is made anew; the codes of the rest are those of the source."""
    mask = apple.convert("RGBA")
    mask.paste((0, 0, 0, 0), (0, 0, 32, 64))
    files = []
    for image in (apple, mask):
        file = io.BytesIO()
        image.save(file, "PNG")
        files.append(("image.png", file.getvalue(), "image/png"))
    made = client.images.edit(
        model="emoji", image=files[0], mask=files[1], prompt="a green apple", extra_body={"seed": 3}
    )
    white_left = PIL.Image.new("L", apple.size)
    white_left.paste(255, (0, 0, 32, 64))
    expected = pipe(
        "a green apple", image=apple, mask_image=white_left, generator=torch.Generator().manual_seed(3),
        generation_kwargs={"do_sample": True},
    ).images[0]  # fmt: skip
    assert image_of(made.data[0]).tobytes() == expected.tobytes()


def test_what_asks_for_nothing_may_stand_there(client):
    messages = [{"role": "user", "content": "what are you?"}]
    plain = client.chat.completions.create(model="emoji", messages=messages, max_tokens=16)
    settings = {"n": None, "response_format": {"type": "text"}, "store": False, "logit_bias": {}, "tools": []}
    settings |= {"tool_choice": "none", "extra_body": {"stream": None}}
    answer = client.chat.completions.create(model="emoji", messages=messages, max_tokens=16, **settings)
    assert answer.choices[0].message.content == plain.choices[0].message.content
    again = [*messages, plain.choices[0].message.model_dump(), *messages]  # with `tool_calls` and more of null
    assert client.chat.completions.create(model="emoji", messages=again, max_tokens=16).choices
    image = client.images.generate(prompt="a cat", n=None, size=None, response_format=None, extra_body={"seed": 0})
    assert image.data[0].b64_json == client.images.generate(prompt="a cat", extra_body={"seed": 0}).data[0].b64_json


def test_images_that_were_sent_go_with_the_answer(client, apple):
    """Not when Python looks for cycles next: they may be hundreds of megabytes."""
    file = io.BytesIO()
    apple.save(file, "PNG")
    gc.collect()
    gc.disable()
    try:
        for _ in range(2):
            client.images.edit(image=("apple.png", file.getvalue(), "image/png"), prompt="make it green")
        jobs = [thing for thing in gc.get_objects() if isinstance(thing, ImageJob) and thing.images]
        assert len(jobs) <= 1  # of the one that a thread has done last
    finally:
        gc.enable()
