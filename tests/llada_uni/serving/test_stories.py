"""Answers with images, asked for by OpenAI's client; what they hold is what `pipe.interleave` gives."""

import base64
import io
import time

import httpx
import PIL.Image
import pytest
import torch
from openai import BadRequestError

from diffusers_llada_uni import CodeDecoder
from llada_uni.serving.chat_request import Message, read_messages
from llada_uni.serving.image_jobs import StoryJob
from llada_uni.serving.settings import ServerSettings
from tests.llada_uni.serving.conftest import Server
from transformers_llada_uni.image_places import HEADER_LENGTH


PROMPT = "a story of 2 moon phases from the new moon"  # of text, image, text, image
ONE = {"max_tokens": 16, "max_images": 1}


def tell(client, prompt=PROMPT, **fields):
    names = {"max_images", "size", "guidance_scale", "num_inference_steps", "num_image_steps_per_block"}
    body = {name: fields.pop(name) for name in names & set(fields)}
    messages = fields.pop("messages", [{"role": "user", "content": prompt}])
    return client.chat.completions.create(
        model="emoji", messages=messages, modalities=["text", "image"], extra_body=body, **fields
    )


def image_of(part: dict) -> PIL.Image.Image:
    assert part["type"] == "image_url"
    header, _, encoded = part["image_url"]["url"].partition(",")
    assert header == "data:image/png;base64"
    return PIL.Image.open(io.BytesIO(base64.b64decode(encoded)))


@pytest.fixture(scope="module")
def decoded():
    """Codes that have been decoded since it was last emptied."""
    codes, decode = [], CodeDecoder.decode
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            CodeDecoder, "decode", lambda self, *args, **further: codes.extend(args[0]) or decode(self, *args)
        )
        yield codes


@pytest.fixture(scope="module")
def expected(pipe, decoded):
    """Parts, and the codes of the images among them."""
    decoded.clear()
    return pipe.interleave(PROMPT, generator=torch.Generator().manual_seed(0)), list(decoded)


@pytest.fixture(scope="module")
def told(client, decoded):
    decoded.clear()
    return tell(client, seed=0), list(decoded)


@pytest.fixture(scope="module")
def answer(told):
    return told[0]


def test_an_answer_is_that_of_the_pipeline(told, expected):
    """Only the decoder's noise is another: each image has its own."""
    (answer, codes), (expected, expected_codes) = told, expected
    message = answer.choices[0].message
    assert answer.choices[0].finish_reason == "stop" and answer.usage.completion_tokens > 2 * 16
    parts, begin = [], 0
    for index, part in enumerate(message.images):
        assert part["index"] == index
        parts += [message.content[begin : part["text_offset"]], image_of(part).size]
        begin = part["text_offset"]
    assert message.content[begin:] == ""
    assert parts == [part if isinstance(part, str) else part.size for part in expected] and len(parts) == 4
    assert torch.equal(torch.stack(codes), torch.stack(expected_codes))


def test_a_stream_has_the_parts_in_their_order(client, answer):
    chunks = list(tell(client, seed=0, stream=True, stream_options={"include_usage": True}))
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    kinds = ["image" if getattr(delta, "images", None) else "text" for delta in deltas[1:-1]]
    assert kinds == ["text", "image", "text", "image"]
    message = answer.choices[0].message
    assert "".join(delta.content or "" for delta in deltas) == message.content
    # A seed repeats the pixels, too.
    assert [part for delta in deltas for part in getattr(delta, "images", [])] == message.images
    assert chunks[-2].choices[0].finish_reason == "stop" and chunks[-1].usage == answer.usage


def test_limits(client):
    answer = tell(client, **ONE, size="64x64", num_inference_steps=1, num_image_steps_per_block=2)
    message = answer.choices[0].message
    assert answer.choices[0].finish_reason == "length"
    assert [image_of(part).size for part in message.images] == [(64, 64)]
    answer = tell(client, max_tokens=2)
    assert answer.choices[0].finish_reason == "length" and answer.choices[0].message.images == []
    assert 0 < answer.usage.completion_tokens <= 2


def test_an_answer_goes_back_into_the_conversation(server, client, answer):
    """Each image stands where it stood in the answer."""
    message = answer.choices[0].message
    turns = [{"role": "user", "content": PROMPT}, message, {"role": "user", "content": "And then?"}]
    continued = client.chat.completions.create(model="emoji", messages=turns, max_tokens=1)
    first, second = message.images
    ends = first["text_offset"], second["text_offset"]
    texts = [message.content[: ends[0]], message.content[ends[0] : ends[1]], message.content[ends[1] :]]
    parts = [{"type": "text", "text": text} for text in texts]
    parts[1:1] = [{"type": "image", "image": image_of(first)}]
    parts[3:3] = [{"type": "image", "image": image_of(second)}]
    ids = server.engine.write_prompt([turns[0], {"role": "assistant", "content": parts}, turns[2]], 1000)
    assert continued.usage.prompt_tokens == len(ids) > 2 * 16 + 2 * HEADER_LENGTH
    body = [Message(**turns[0]), Message(**message.model_dump(exclude_unset=True)), Message(**turns[2])]
    assert torch.equal(server.engine.write_prompt(read_messages(body, ServerSettings()), 1000), ids)


def test_images_before_the_words(client, answer):
    content = [{"type": "image_url", "image_url": answer.choices[0].message.images[0]["image_url"]}]
    content += [{"type": "text", "text": PROMPT}]
    shown = tell(client, messages=[{"role": "user", "content": content}], **ONE)
    assert shown.usage.prompt_tokens > answer.usage.prompt_tokens


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_images": 9}, "max_images"),
        ({"max_images": 0}, "max_images"),
        ({"size": "64"}, "size"),
        ({"size": "4096x4096"}, "size"),
        ({"size": "65x64"}, "size"),
        ({"stop": "a"}, "stop"),
        ({"guidance_scale": -1}, "guidance_scale"),
        ({"max_tokens": 65}, "max_tokens"),
        ({"messages": [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]}, "messages"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "messages"),
        ({"messages": [{"role": "user", "content": "  "}]}, "messages"),
        ({"messages": [{"role": "user", "content": "word " * 9000}]}, "messages"),
    ],
)
def test_bad_requests(client, fields, param):
    with pytest.raises(BadRequestError) as refused:
        tell(client, **fields)
    assert refused.value.param == param


def test_a_side_that_the_model_has_chosen_is_limited(pipe):
    server = Server(pipe, ServerSettings("emoji", max_new_tokens=64, max_side=32))
    try:
        with pytest.raises(BadRequestError, match="the model has chosen 64 x 64 pixels, and 32 are allowed"):
            tell(server.client(), **ONE)
    finally:
        server.stop()


def test_who_leaves_frees_the_thread(server, client):
    stream = tell(client, stream=True, temperature=9, max_images=8, max_tokens=32, seed=0)
    next(iter(stream))
    body = {"model": "emoji", "messages": [{"role": "user", "content": PROMPT}], "modalities": ["text", "image"]}
    with pytest.raises(httpx.ReadTimeout):  # one that waits behind it
        httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=0.1)
    stream.close()
    deadline = time.monotonic() + 10
    while (len(server.engine.stories) or server.engine.num_running(StoryJob)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert server.engine.num_running(StoryJob) == len(server.engine.stories) == 0
    assert tell(client, **ONE).choices[0].message.images
