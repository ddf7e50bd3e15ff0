"""The server, asked by OpenAI's own client."""

import base64
import io

import PIL.Image
import pytest
import torch


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


def test_seeds(client):
    def draw(seed):
        made = client.images.generate(model="emoji", prompt="red apple", n=2, extra_body={"seed": seed})
        return [item.b64_json for item in made.data]

    first = draw(1)
    assert draw(1) == first and first[0] != first[1] and draw(3) != first


def test_edit(client, apple):
    file = io.BytesIO()
    apple.save(file, "PNG")
    made = client.images.edit(model="emoji", image=("apple.png", file.getvalue(), "image/png"), prompt="make it green")
    assert image_of(made.data[0]).size == apple.size
