import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoProcessor,
    AutoTokenizer,
    ImageTextToTextPipeline,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from transformers_llada_uni import LLaDAUniImageProcessor, LLaDAUniProcessor
from transformers_llada_uni.training.data.example_tokens import ExampleTokenizer


OFFSET = 512
TEXT_CHAT = (
    "{% for m in messages %}<role>{{ m.role }}</role>{{ m.content }}<|role_end|>{% endfor %}"
    "{% if add_generation_prompt %}<role>ASSISTANT</role>{% endif %}"
)


def make_processor(official_tiny, max_position_embeddings=2048, text_chat=None, **kwargs):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(official_tiny)
    tokenizer.chat_template = text_chat
    return LLaDAUniProcessor(
        LLaDAUniImageProcessor(),
        tokenizer,
        image_token_offset=OFFSET,
        codebook_size=256,
        max_position_embeddings=max_position_embeddings,
        **kwargs,
    )


@pytest.fixture(scope="module")
def processor(official_tiny):
    return make_processor(official_tiny)


@pytest.fixture(scope="module")
def expected(official_tiny):
    return json.loads((official_tiny / "expected" / "generation.json").read_text())


def picture(width=128, height=128, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def block(height, width):
    header = f"<|image|><|reserved_token_{height}|><|reserved_token_{width}|><boi>"
    return header + "<|reserved_token_0|>" * (height * width) + "<|/image|>"


def understanding(images, text):
    return (
        "<role>SYSTEM</role> You are a multimodal understanding assistant. "
        f"<role>HUMAN</role>{images}{text}<role>ASSISTANT</role>"
    )


def user(*content):
    parts = [{"type": "text", "text": c} if isinstance(c, str) else {"type": "image", "image": c} for c in content]
    return {"role": "user", "content": parts}


def assistant(text):
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def ids_of(processor, text):
    return processor.tokenizer(text, add_special_tokens=False)["input_ids"]


def unpadded(inputs, row, prefix=""):
    return inputs[prefix + "input_ids"][row][inputs[prefix + "attention_mask"][row].bool()].tolist()


# Prompts, as released


def test_text_prompts_are_the_released_ones(processor, expected):
    for entry in expected["text_generate"]:
        inputs = processor(text=entry["prompt"], task="understanding")
        assert inputs["input_ids"].tolist() == [entry["prompt_ids"]]
        assert set(inputs) == {"input_ids", "attention_mask"}


def test_text_to_image_prompts_are_the_released_ones(processor, expected):
    for entry in expected["text_to_image"]:
        inputs = processor(text=entry["prompt"], task="text_to_image", height=32 * entry["h"], width=32 * entry["w"])
        assert inputs["input_ids"].tolist() == [entry["cond_ids"]]
        assert inputs["grid"] == (entry["h"], entry["w"])
        if entry["uncond_ids"] is not None:
            assert inputs["negative_input_ids"].tolist() == [entry["uncond_ids"]]


def test_editing_prompts_are_the_released_ones(processor, expected):
    for entry in expected["image_edit"]:
        source = picture(16 * entry["w"], 16 * entry["h"])
        inputs = processor(images=source, text=entry["instruction"], task="editing", resize_mode=None)
        assert inputs["grid"] == (entry["h"], entry["w"])
        for name, key in (
            ("input_ids", "cond_ids"),
            ("negative_input_ids", "no_text_ids"),
            ("negative_image_input_ids", "no_image_ids"),
        ):
            if entry[key] is not None:
                # The fixture holds codes where we hold placeholders for them.
                reference = [processor.image_token_id if token >= OFFSET else token for token in entry[key]]
                assert inputs[name].tolist() == [reference]
        assert (inputs["input_ids"] == processor.image_token_id).sum() == len(inputs["pixel_values"])


def test_token_ids_are_looked_up(processor, expected):
    ids = expected["ids"]
    assert processor.image_start_token_id == ids["<|image|>"]
    assert processor.image_end_token_id == ids["<|/image|>"]
    assert processor.begin_of_image_token_id == ids["<boi>"]
    first = expected["reserved_token_0"]
    assert processor.grid_token_ids == list(range(first, first + 64)) and processor.image_token_id == first


def test_understanding_a_image(processor):
    inputs = processor(images=picture(200, 133), text="What is it?", task="understanding")
    assert inputs["input_ids"].tolist() == [ids_of(processor, understanding(block(8, 12), "What is it?"))]
    assert inputs["image_grid_thw"].tolist() == [[1, 8, 12]] and inputs["pixel_values"].shape == (96, 768)
    assert set(inputs) == {"input_ids", "attention_mask", "pixel_values", "image_grid_thw"}


def test_several_images_follow_the_smaller_limit(official_tiny):
    unlimited = make_processor(official_tiny, max_position_embeddings=None)
    large = picture(900, 900)
    one = unlimited(images=large, text="a", task="understanding")
    two = unlimited(images=[large, large], text="a", task="understanding")
    assert one["image_grid_thw"].tolist() == [[1, 50, 50]] and two["image_grid_thw"].tolist() == [[1, 28, 28]] * 2
    assert two["input_ids"].tolist() == [ids_of(unlimited, understanding(block(28, 28) * 2, "a"))]


def test_editing_takes_several_references_and_the_first_gives_the_grid(processor):
    images = [picture(64, 96), picture(128, 64)]
    inputs = processor(images=images, text="merge them", task="editing", resize_mode=None)
    system = "<role>SYSTEM</role> You are an image editing assistant. <role>HUMAN</role>"
    header = "<role>ASSISTANT</role><|image|><|reserved_token_6|><|reserved_token_4|><boi>"
    sources = block(6, 4) + block(4, 8)
    assert inputs["grid"] == (6, 4)
    assert inputs["input_ids"].tolist() == [ids_of(processor, f"{system}{sources}merge them{header}")]
    assert inputs["negative_input_ids"].tolist() == [ids_of(processor, f"{system}{sources}<uncondition>{header}")]
    assert inputs["negative_image_input_ids"].tolist() == [
        ids_of(processor, f"{system}<|image|><|image|>merge them{header}")
    ]


def test_editing_follows_its_size_rule_and_another_size_can_be_wanted(official_tiny):
    unlimited = make_processor(official_tiny, max_position_embeddings=None)
    inputs = unlimited(images=picture(200, 133), text="a", task="editing")
    assert inputs["grid"] == (26, 38) and inputs["image_grid_thw"].tolist() == [[1, 26, 38]]
    inputs = unlimited(images=picture(200, 133), text="a", task="editing", height=64, width=96)
    assert inputs["grid"] == (2, 3) and inputs["image_grid_thw"].tolist() == [[1, 26, 38]]


def test_text_to_image_defaults_to_1024(processor):
    assert processor(text="a cat", task="text_to_image")["grid"] == (32, 32)


def test_thinking_returns_no_header_until_it_is_forced(processor):
    inputs = processor(text="a cat", task="thinking", height=128, width=192)
    prompt = (
        "<role>SYSTEM</role> You are a text-to-image generation assistant with a thinking process. "
        "<role>HUMAN</role>{}<role>ASSISTANT</role>"
    )
    header = "<|image|><|reserved_token_4|><|reserved_token_6|><boi>"
    assert inputs["input_ids"].tolist() == [ids_of(processor, prompt.format("a cat"))]
    assert set(inputs) == {"input_ids", "attention_mask"}
    known = processor(text="a cat", task="thinking", thinking_text="a red cat", height=128, width=192)
    assert known["input_ids"].tolist() == [ids_of(processor, prompt.format("a cat") + "a red cat" + header)]
    assert known["negative_input_ids"].tolist() == [ids_of(processor, prompt.format("<uncondition>") + header)]
    assert known["grid"] == (4, 6)


@pytest.mark.parametrize(
    "written",
    [
        "a red cat",
        "a red cat<boi>",
        "a red cat<|image|><|reserved_token_9|><|reserved_token_9|><boi>",
        "a red cat<|image|><|reserved_token_9|>",
        "a red cat<|endoftext|><|endoftext|>",
        "a red cat<|role_end|>rubbish",
        "a red cat<|image|><|endoftext|>",
    ],
)
def test_the_header_the_model_wrote_is_cut(processor, written):
    prompts = processor(text=["a cat", "a dog runs in the park"], task="thinking")
    thoughts = [ids_of(processor, text) for text in (written, "a red cat on a mat")]
    longest = max(map(len, thoughts))
    pad = processor.tokenizer.pad_token_id
    new = torch.tensor([ids + [pad] * (longest - len(ids)) for ids in thoughts])
    generated = torch.cat([prompts["input_ids"], new], dim=1)
    reference = processor(
        text=["a cat", "a dog runs in the park"],
        task="thinking",
        thinking_text=["a red cat", "a red cat on a mat"],
        height=128,
        width=192,
    )
    full = torch.cat([prompts["attention_mask"], torch.ones_like(new)], dim=1)
    for mask in (prompts["attention_mask"], full, None):
        forced = processor.add_image_header(generated, mask, height=128, width=192)
        assert set(forced) == set(reference) and forced["grid"] == (4, 6)
        for name in set(reference) - {"grid"}:
            assert torch.equal(forced[name], reference[name]), name


def test_interleaved(processor):
    system = "<role>SYSTEM</role> You are a interleaved generation assistant. <role>HUMAN</role>"
    inputs = processor(images=picture(), text="go on", task="interleaved")
    assert inputs["input_ids"].tolist() == [ids_of(processor, f"{system}{block(8, 8)}go on<role>ASSISTANT</role>")]
    assert inputs["negative_input_ids"].tolist() == [ids_of(processor, f"{system}<uncondition><role>ASSISTANT</role>")]
    assert inputs["uncondition_ids"].tolist() == [ids_of(processor, "<uncondition>")]
    names = {"input_ids", "attention_mask", "pixel_values", "image_grid_thw"}
    assert set(inputs) == names | {"negative_input_ids", "negative_attention_mask", "uncondition_ids"}


# Finished prompts


def test_finished_prompts_are_expanded_in_order(processor):
    text = "one <|image|> two <|image|> three"
    inputs = processor(images=[picture(128, 160), picture(160, 128)], text=text)
    assert inputs["input_ids"].tolist() == [ids_of(processor, f"one {block(10, 8)} two {block(8, 10)} three")]
    assert inputs["image_grid_thw"].tolist() == [[1, 10, 8], [1, 8, 10]]


def test_a_header_in_a_finished_prompt_is_left_alone(processor):
    header = "<|image|><|reserved_token_4|><|reserved_token_4|><boi>"
    inputs = processor(images=picture(), text=f"<|image|>a{header}")
    assert inputs["input_ids"].tolist() == [ids_of(processor, f"{block(8, 8)}a{header}")]
    assert processor(text=header)["input_ids"].tolist() == [ids_of(processor, header)]


def test_images_alone_and_text_alone(processor):
    assert set(processor(images=picture())) == {"pixel_values", "image_grid_thw"}
    assert set(processor(text="hello")) == {"input_ids", "attention_mask"}


# Batches


def test_batches_are_left_padded_and_equal_their_rows(processor):
    texts = ["a cat", "A red apple on a wooden table"]
    inputs = processor(text=texts, task="text_to_image", height=64, width=64)
    assert inputs["attention_mask"][0, 0] == 0 and inputs["attention_mask"][:, -1].all()
    assert inputs["input_ids"][0, 0] == processor.tokenizer.pad_token_id
    for row, text in enumerate(texts):
        single = processor(text=text, task="text_to_image", height=64, width=64)
        for prefix in ("", "negative_"):
            assert unpadded(inputs, row, prefix) == single[prefix + "input_ids"][0].tolist()


def test_images_are_dealt_out_over_a_batch(processor):
    first, second, third = picture(128, 160, 1), picture(160, 128, 2), picture(128, 128, 3)
    nested = processor(images=[[first], [], [second, third]], text=["a", "b", "c"], task="understanding")
    ready = processor(images=[first, second, third], text=["<|image|>a", "b", "<|image|><|image|>c"])
    nested_ready = processor(images=[[first], [], [second, third]], text=["<|image|>a", "b", "<|image|><|image|>c"])
    for name in ready:
        assert torch.equal(ready[name], nested_ready[name])
    assert torch.equal(nested["pixel_values"], ready["pixel_values"])
    for row, (images, text) in enumerate([([first], "a"), (None, "b"), ([second, third], "c")]):
        single = processor(images=images, text=text, task="understanding")
        assert unpadded(nested, row) == single["input_ids"][0].tolist()
    one_each = processor(images=[first, second], text=["a", "b"], task="understanding")
    assert one_each["image_grid_thw"].tolist() == [[1, 10, 8], [1, 8, 10]]


def test_return_tensors(processor):
    arrays = processor(images=picture(), text="a", task="editing", resize_mode=None, return_tensors="np")
    assert isinstance(arrays["input_ids"], np.ndarray) and arrays["grid"] == (8, 8)
    lists = processor(text=["a", "a b c d e"], task="understanding", return_tensors=None)
    assert [type(row) for row in lists["input_ids"]] == [list, list]
    nested = processor(text="a", text_kwargs={"return_tensors": "np"})
    assert isinstance(nested["input_ids"], np.ndarray)


def test_a_batch_feature_can_be_cast_as_pipelines_do(processor):
    inputs = processor(images=picture(), text="a", task="editing", resize_mode=None).to("cpu", dtype=torch.bfloat16)
    assert inputs["pixel_values"].dtype == torch.bfloat16 and inputs["input_ids"].dtype == torch.int64
    assert inputs["grid"] == (8, 8)


# Chats


def chat(processor, messages, **kwargs):
    kwargs = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt", **kwargs}
    return processor.apply_chat_template(messages, **kwargs)


def test_a_single_turn_is_the_released_understanding_prompt(processor):
    image = picture(200, 133)
    reference = processor(images=image, text="What is it?", task="understanding")
    for messages in ([user(image, "What is it?")], [user("What ", image, "is it?")]):
        inputs = chat(processor, messages)
        assert set(inputs) == set(reference)
        for name in reference:
            assert torch.equal(inputs[name], reference[name])


def test_chats_without_images_are_the_released_prompts(processor, expected):
    for entry in expected["text_generate"]:
        for content in (entry["prompt"], [{"type": "text", "text": entry["prompt"]}]):
            assert chat(processor, [{"role": "user", "content": content}])["input_ids"].tolist() == [
                entry["prompt_ids"]
            ]


def test_several_turns(processor):
    messages = [user(picture(128, 160), "What?"), assistant("A dog."), user(picture(), picture(), "And these?")]
    text = chat(processor, messages, tokenize=False)
    assert text == (
        "<role>SYSTEM</role> You are a multimodal understanding assistant. <role>HUMAN</role><|image|>What?"
        "<role>ASSISTANT</role>A dog.<|role_end|><role>HUMAN</role><|image|><|image|>And these?<role>ASSISTANT</role>"
    )
    inputs = chat(processor, messages)
    assert inputs["image_grid_thw"].tolist() == [[1, 10, 8], [1, 8, 8], [1, 8, 8]]
    assert (inputs["input_ids"] == processor.image_token_id).sum() == 80 + 64 + 64
    assert chat(processor, messages[:2], tokenize=False, add_generation_prompt=False).endswith("A dog.<|role_end|>")
    prefill = chat(processor, messages[:2], tokenize=False, add_generation_prompt=False, continue_final_message=True)
    assert prefill.endswith("<role>ASSISTANT</role>A dog.")


def test_system_message_and_generated_images(processor):
    messages = [
        {"role": "system", "content": "Be brief."},
        user("draw"),
        {"role": "assistant", "content": [{"type": "text", "text": "Here: "}, {"type": "image", "image": picture()}]},
    ]
    text = chat(processor, messages, tokenize=False, add_generation_prompt=False)
    assert text == (
        "<role>SYSTEM</role> Be brief. <role>HUMAN</role>draw<role>ASSISTANT</role>Here: <|image|><|role_end|>"
    )


def test_image_sources_in_messages(processor, tmp_path):
    path = tmp_path / "a.png"
    picture().save(path)
    reference = chat(processor, [user(picture(), "hi")])
    for key in ("image", "url", "path"):
        content = [{"type": "image", key: str(path)}, {"type": "text", "text": "hi"}]
        inputs = chat(processor, [{"role": "user", "content": content}])
        assert torch.equal(inputs["pixel_values"], reference["pixel_values"])
    openai = [{"type": "image_url", "image_url": {"url": str(path)}}, {"type": "text", "text": "hi"}]
    assert torch.equal(chat(processor, [{"role": "user", "content": openai}])["input_ids"], reference["input_ids"])


@pytest.mark.parametrize("text_chat", [None, TEXT_CHAT])
def test_batches_of_chats_equal_their_rows(official_tiny, text_chat):
    processor = make_processor(official_tiny, text_chat=text_chat)
    chats = [[user(picture(), "hi")], [user("hello there")], [user(picture(128, 160), "a"), assistant("b"), user("c")]]
    batch = chat(processor, chats)
    assert [len(text) > 0 for text in chat(processor, chats, tokenize=False)] == [True] * 3
    for row, messages in enumerate(chats):
        assert unpadded(batch, row) == chat(processor, messages)["input_ids"][0].tolist()
    assert batch["image_grid_thw"].tolist() == [[1, 8, 8], [1, 10, 8]]
    # What the processor is told beside the chats reaches it, also where some have images and some have none.
    batch = chat(processor, chats, padding="max_length", max_length=512, max_pixels=128 * 128)
    assert batch["input_ids"].shape == (3, 512) and batch["image_grid_thw"].prod(dim=-1).max() <= 64


def test_text_only_chats_use_the_tokenizers_own_template(official_tiny):
    processor = make_processor(official_tiny, text_chat=TEXT_CHAT)
    assert chat(processor, [user("hi ", "there")], tokenize=False) == (
        "<role>user</role>hi there<|role_end|><role>ASSISTANT</role>"
    )
    assert chat(processor, [user(picture(), "hi")], tokenize=False) == understanding("<|image|>", "hi")


def test_assistant_mask_for_training(processor):
    messages = [user(picture(), "What?"), assistant("A dog."), user("And?"), assistant("A cat.")]
    inputs = chat(processor, messages, add_generation_prompt=False, return_assistant_tokens_mask=True)
    kept = inputs["input_ids"][0][torch.as_tensor(inputs["assistant_masks"][0]).bool()]
    assert processor.tokenizer.decode(kept) == "A dog.<|role_end|>A cat.<|role_end|>"


def test_modality_of_tokens(processor):
    inputs = processor(images=picture(), text="<|image|>a", return_mm_token_type_ids=True)
    assert torch.equal(inputs["mm_token_type_ids"] == 1, inputs["input_ids"] == processor.image_token_id)


# transformers' pipeline, with a stand-in for the model


class Answers(PreTrainedModel):
    """Writes "a dog" behind every prompt, and remembers what it was given."""

    config_class = PreTrainedConfig

    def __init__(self, config, answer):
        super().__init__(config)
        self.answer = torch.nn.Parameter(torch.tensor(answer, dtype=torch.float32))
        self.post_init()

    @classmethod
    def can_generate(cls):
        return True

    def generate(self, input_ids, attention_mask, pixel_values=None, image_grid_thw=None, **kwargs):
        self.seen = (input_ids, pixel_values)
        return torch.cat([input_ids, self.answer.long().expand(len(input_ids), -1)], dim=1)


def test_image_text_to_text_pipeline(processor):
    model = Answers(PreTrainedConfig(), ids_of(processor, "a dog<|role_end|>"))
    pipe = ImageTextToTextPipeline(model=model, processor=processor, tokenizer=processor.tokenizer)
    messages = [user(picture(128, 160), "What?")]
    (result,) = pipe(text=messages, return_full_text=False, max_new_tokens=8)
    assert result["generated_text"] == "a dog"
    assert torch.equal(model.seen[0], chat(processor, messages)["input_ids"]) and len(model.seen[1]) == 80
    (result,) = pipe(text=messages, max_new_tokens=8)
    assert result["generated_text"][-1] == {"role": "assistant", "content": "a dog"}
    (result,) = pipe(picture(128, 160), text="<|image|>What?", return_full_text=False, max_new_tokens=8)
    assert result["generated_text"] == "a dog"
    results = pipe([picture(), picture()], text=["<|image|>a", "<|image|>a b c"], return_full_text=False)
    assert [result["generated_text"] for result in results] == ["a dog", "a dog"]


# Saving


@pytest.mark.parametrize("text_chat", [None, TEXT_CHAT])
def test_saves_and_loads_through_the_auto_classes(official_tiny, tmp_path, text_chat):
    processor = make_processor(official_tiny, text_chat=text_chat)
    processor.image_processor.max_pixels = 320 * 320
    for folder in (tmp_path / "one", tmp_path / "two"):
        processor.save_pretrained(folder)
        processor = AutoProcessor.from_pretrained(folder)  # twice: what is saved must not drift
    assert type(processor) is LLaDAUniProcessor and type(processor.image_processor) is LLaDAUniImageProcessor
    assert (processor.image_token_offset, processor.codebook_size) == (OFFSET, 256)
    assert processor.max_position_embeddings == 2048 and processor.image_processor.max_pixels == 320 * 320
    original = make_processor(official_tiny, text_chat=text_chat)
    assert processor.chat_template == original.chat_template
    for messages in ([user("hi")], [user(picture(), "hi")], [user("hi"), assistant("ho"), user("hu")]):
        assert torch.equal(chat(processor, messages)["input_ids"], chat(original, messages)["input_ids"])
    if text_chat:
        assert processor.tokenizer.chat_template == text_chat
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "two")
    hello = [{"role": "user", "content": "hello"}]
    own = ExampleTokenizer(tokenizer).tokenizer  # training by it writes what the processor writes
    assert own.apply_chat_template(hello, tokenize=False) == original.apply_chat_template(hello)


def test_a_chat_template_of_ones_own_is_kept(official_tiny, tmp_path):
    processor = make_processor(official_tiny, chat_template="{{ messages[0].role }}")
    processor.save_pretrained(tmp_path)
    assert AutoProcessor.from_pretrained(tmp_path).chat_template == "{{ messages[0].role }}"


@pytest.mark.parametrize("text_chat", [None, TEXT_CHAT])
def test_named_chat_templates_are_kept(official_tiny, tmp_path, text_chat):
    named = {"default": "{{ messages[0].role }}", "brief": "{{ messages[0].content }}"}
    processor = make_processor(official_tiny, text_chat=text_chat, chat_template=named)
    for folder in (tmp_path / "one", tmp_path / "two"):
        processor.save_pretrained(folder)
        processor = AutoProcessor.from_pretrained(folder)
        assert processor.chat_template == named
    assert processor.apply_chat_template([user(picture(), "hi")]) == "user"
    assert processor.apply_chat_template([{"role": "user", "content": "hi"}], chat_template="brief") == "hi"
    expected = "user" if text_chat is None else "<role>user</role>hi<|role_end|>"
    assert processor.apply_chat_template([user("hi")]) == expected


def test_a_new_chat_template_is_that_of_all_chats(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)  # whose tokenizer has read the same file
    loaded.chat_template = "{{ messages[0].role }}"
    assert loaded.apply_chat_template([user("hi")]) == "user"


def test_model_input_names(processor):
    assert processor.model_input_names == ["input_ids", "attention_mask", "pixel_values", "image_grid_thw"]


# Back from ids


def header_ids(processor, height, width):
    return ids_of(processor, f"<|image|><|reserved_token_{height}|><|reserved_token_{width}|><boi>")


def test_post_process_of_mixed_ids(processor):
    codes = torch.randint(0, 256, (2, 3), generator=torch.Generator().manual_seed(0))
    image = header_ids(processor, 2, 3) + (codes.flatten() + OFFSET).tolist() + ids_of(processor, "<|/image|>")
    row = ids_of(processor, "a cat") + image + image + ids_of(processor, "a dog<|role_end|><|endoftext|>")
    (parts,) = processor.post_process(torch.tensor([row]))
    assert [type(part) for part in parts] == [str, torch.Tensor, torch.Tensor, str]
    assert (parts[0], parts[3]) == ("a cat", "a dog")
    assert torch.equal(parts[1], codes) and torch.equal(parts[2], codes) and parts[1].dtype == torch.int64
    assert processor.post_process(row)[0][0] == "a cat"  # a single row, as a list
    (kept,) = processor.post_process([row], skip_special_tokens=False)
    assert kept[3] == "a dog<|role_end|><|endoftext|>"
    assert processor.post_process_image_text_to_text(torch.tensor([row])) == ["a cata dog"]


def test_post_process_of_incomplete_given_and_stray_images(processor):
    given = ids_of(processor, block(2, 2))
    cut = header_ids(processor, 2, 2) + [OFFSET, OFFSET + 1]
    ended = [*cut, processor.image_end_token_id]
    stray = [OFFSET + 3]
    text = ids_of(processor, "a dog")
    rows = [given + text, text + cut, ended + text, text + stray, text + header_ids(processor, 2, 2), []]
    assert processor.post_process(rows) == [["a dog"]] * 5 + [[]]
    assert processor.post_process_image_text_to_text(rows) == ["a dog"] * 5 + [""]


def test_post_process_ends_a_image_without_its_end_token(processor):
    (parts,) = processor.post_process([header_ids(processor, 1, 1) + [OFFSET + 7] + ids_of(processor, "a dog")])
    assert parts[0].tolist() == [[7]] and parts[1] == "a dog"


def test_post_process_needs_to_know_the_codes(official_tiny):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(official_tiny)
    processor = LLaDAUniProcessor(LLaDAUniImageProcessor(), tokenizer)
    assert processor.post_process(ids_of(processor, "a dog")) == [["a dog"]]
    with pytest.raises(ValueError, match="`image_token_offset`"):
        processor.post_process(header_ids(processor, 1, 1) + [OFFSET])


def test_decode(processor):
    ids = ids_of(processor, "a dog")
    assert processor.decode(ids) == "a dog" and processor.batch_decode([ids]) == ["a dog"]


# Bad input: each with the error's type and the words it must contain

BAD_CALLS = {
    "nothing": ({}, ValueError, "`images` and `text`"),
    "no text": ({"task": "text_to_image"}, ValueError, "`text` is missing"),
    "empty text": ({"text": "", "task": "understanding"}, ValueError, "`text` is empty"),
    "blank text": ({"text": ["a", "  "], "task": "text_to_image"}, ValueError, "`text` is empty"),
    "empty finished prompt": ({"text": ""}, ValueError, "`text` is empty"),
    "empty list": ({"text": [], "task": "understanding"}, ValueError, "`text` is an empty list"),
    "text is a number": ({"text": 3, "task": "understanding"}, TypeError, "`text` must be a string"),
    "text holds a number": ({"text": ["a", 3]}, TypeError, "`text` must be a string"),
    "unknown task": ({"text": "a", "task": "drawing"}, ValueError, "`task` must be one of understanding.*'drawing'"),
    "height": (
        {"text": "a", "task": "text_to_image", "height": 1000, "width": 1024},
        ValueError,
        "`height` must be a positive multiple of 32, got 1000; the nearest is 992",
    ),
    "width": (
        {"text": "a", "task": "text_to_image", "height": 1024, "width": 1020},
        ValueError,
        "`width` must be a positive multiple of 32, got 1020; the nearest is 1024",
    ),
    "zero": ({"text": "a", "task": "text_to_image", "height": 0, "width": 32}, ValueError, "`height`.*nearest is 32"),
    "negative": (
        {"text": "a", "task": "text_to_image", "height": 32, "width": -64},
        ValueError,
        "`width`.*-64.*nearest is 32",
    ),
    "float": (
        {"text": "a", "task": "text_to_image", "height": 64.0, "width": 64},
        TypeError,
        "`height` must be a whole",
    ),
    "bool": (
        {"text": "a", "task": "text_to_image", "height": 32, "width": True},
        TypeError,
        "`width` must be a whole",
    ),
    "one side": (
        {"text": "a", "task": "text_to_image", "height": 64},
        ValueError,
        "`height` and `width` must be given",
    ),
    "no reserved token": (
        {"text": "a", "task": "text_to_image", "height": 2048, "width": 32},
        ValueError,
        "`height` may be at most 2016, got 2048: this model draws at most",
    ),
    "thinking too": (
        {"text": "a", "task": "thinking", "height": 33, "width": 32},
        ValueError,
        "`height`.*nearest is 32",
    ),
    "height of an answer": ({"text": "a", "task": "understanding", "height": 32}, ValueError, "`height` and `width`"),
    "too many codes": (
        {"text": "a", "task": "text_to_image", "height": 2016, "width": 2016},
        ValueError,
        "`height` and `width`.*3969 image codes overrun.*2048 positions.*height=1408, width=1408 would fit",
    ),
    "prompt too long": ({"text": "word " * 3000}, ValueError, "`text`.*`max_position_embeddings`.*at most 2048"),
    "prompt leaves no room": (
        {"text": "word " * 3000, "task": "text_to_image"},
        ValueError,
        "`text`.*at most 1024 tokens",
    ),
    "pictures too large": (
        {"images": [Image.new("RGB", (1500, 800))] * 3, "text": "a", "task": "understanding"},
        ValueError,
        "`images` make a prompt of .* tokens",
    ),
    "grid without a name": (
        {"images": Image.new("RGB", (640, 150)), "text": "a", "task": "editing"},
        ValueError,
        "`images`: .* 640 x 150.*16 x 64 codes.*up to 63.*reserved_token_64.*cropped to .* x 150 it fits",
    ),
    "picture for text_to_image": (
        {"images": Image.new("RGB", (64, 64)), "text": "a", "task": "text_to_image"},
        ValueError,
        "`images` cannot be given with task 'text_to_image'",
    ),
    "editing nothing": ({"text": "a", "task": "editing"}, ValueError, "`images` is missing"),
    "editing half a batch": (
        {"images": [[Image.new("RGB", (64, 64))], []], "text": ["a", "b"], "task": "editing"},
        ValueError,
        "`images` is missing",
    ),
    "different grids": (
        {"images": [Image.new("RGB", (64, 64)), Image.new("RGB", (96, 64))], "text": ["a", "b"], "task": "editing"}
        | {"resize_mode": None},
        ValueError,
        r"different grids \(4 x 4, 4 x 6\).*one by one",
    ),
    "half a character": (
        {"text": "a \ud83d b", "task": "understanding"},
        ValueError,
        "`text`.*at 2 is a lone surrogate",
    ),
    "half a thought": (
        {"text": "a", "task": "thinking", "thinking_text": "\ud83d"},
        ValueError,
        "`thinking_text`.*lone surrogate",
    ),
    "text holds None": ({"text": ["a", None], "task": "understanding"}, TypeError, "`text` must be a string"),
    "fewer pictures": (
        {"images": Image.new("RGB", (64, 64)), "text": "<|image|><|image|>"},
        ValueError,
        r"`images`: 1 were given for 2 <\|image\|>",
    ),
    "no pictures": ({"text": "<|image|>a"}, ValueError, r"`images`: 0 were given for 1 <\|image\|>"),
    "more pictures": (
        {"images": [Image.new("RGB", (64, 64))] * 3, "text": ["<|image|>", "<|image|>"]},
        ValueError,
        "`images`: 3 were given for 2",
    ),
    "wrong order of pictures": (
        {"images": [[Image.new("RGB", (64, 64))], []], "text": ["a", "<|image|>"]},
        ValueError,
        "`images`: 1 were given for 0",
    ),
    "lists and texts": (
        {"images": [[Image.new("RGB", (64, 64))]], "text": ["<|image|>", "b"]},
        ValueError,
        "`images` has 1 lists of images for 2 texts",
    ),
    "whose picture": (
        {"images": [Image.new("RGB", (64, 64))] * 3, "text": ["a", "b"], "task": "understanding"},
        ValueError,
        "`images` has 3 images for 2 texts",
    ),
    "mixed nesting": (
        {"images": [[Image.new("RGB", (64, 64))], Image.new("RGB", (64, 64))], "text": ["a", "b"]},
        ValueError,
        "`images` must be one list of images",
    ),
    "no picture at all": ({"images": 3, "text": "<|image|>"}, TypeError, "`images` must be PIL images"),
    "unreadable": (
        {"images": "no/such.png", "text": "<|image|>"},
        ValueError,
        "`images`: 'no/such.png' is no existing",
    ),
    "odd size": (
        {"images": Image.new("RGB", (70, 64)), "text": "a", "task": "editing", "resize_mode": None},
        ValueError,
        "multiples of 32, got 70 x 64; the nearest valid size is 64 x 64",
    ),
    "size rule": (
        {"images": Image.new("RGB", (64, 64)), "text": "a", "task": "editing", "resize_mode": "fit"},
        ValueError,
        "`resize_mode` must be one of",
    ),
    "thoughts elsewhere": (
        {"text": "a", "task": "text_to_image", "thinking_text": "b"},
        ValueError,
        "`thinking_text` belongs to the task 'thinking'",
    ),
    "thoughts of fewer": (
        {"text": ["a", "b"], "task": "thinking", "thinking_text": ["c"]},
        ValueError,
        "`thinking_text` has 1 entries for 2 texts",
    ),
    "thoughts of another kind": (
        {"text": "a", "task": "thinking", "thinking_text": 3},
        TypeError,
        "`thinking_text` must",
    ),
    "right padding": ({"text": "a", "padding_side": "right"}, ValueError, "`padding_side` must be 'left'"),
    "right padding, nested": (
        {"text": "a", "text_kwargs": {"padding_side": "right"}},
        ValueError,
        "`padding_side` must be 'left'",
    ),
    "truncation": (
        {"images": Image.new("RGB", (128, 128)), "text": "<|image|>", "truncation": True, "max_length": 10},
        ValueError,
        "`truncation` to `max_length` would cut into an image",
    ),
    "video": ({"text": "a", "videos": [1]}, ValueError, "`videos`"),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_calls_are_refused(processor, case):
    kwargs, error, message = BAD_CALLS[case]
    with pytest.raises(error, match=message):
        processor(**kwargs)


def test_bad_calls_are_refused_before_any_image_is_processed(processor, monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("a picture was processed")

    monkeypatch.setattr(LLaDAUniImageProcessor, "_preprocess_image_like_inputs", fail)
    for case in ("pictures too large", "grid without a name", "fewer pictures", "different grids", "odd size"):
        kwargs, error, message = BAD_CALLS[case]
        with pytest.raises(error, match=message):
            processor(**kwargs)


def test_the_sizes_that_errors_name_are_valid(processor, official_tiny):
    processor(text="a", task="text_to_image", height=1408, width=1408)
    with pytest.raises(ValueError, match="would fit"):
        processor(text="a", task="text_to_image", height=1440, width=1440)
    with pytest.raises(ValueError) as caught:
        processor(images=Image.new("RGB", (640, 150)), text="a", task="editing")
    width = int(str(caught.value).split("cropped to ")[1].split(" x ")[0])
    unlimited = make_processor(official_tiny, max_position_embeddings=None)
    inputs = unlimited(images=Image.new("RGB", (width, 150)), text="a", task="editing")
    assert max(inputs["grid"]) <= 63
    with pytest.raises(ValueError, match="up to 63 only"):
        unlimited(images=Image.new("RGB", (width + 1, 150)), text="a", task="editing")


def test_bad_headers_are_refused(processor):
    with pytest.raises(ValueError, match="`input_ids`: row 0 holds no <role>ASSISTANT</role>"):
        processor.add_image_header([[1, 2, 3]], height=64, width=64)
    with pytest.raises(ValueError, match="`height`.*nearest is 64"):
        processor.add_image_header([[1, 2, 3]], height=65, width=64)


def test_bad_chats_are_refused(processor):
    for messages in ([], [[]]):
        with pytest.raises(ValueError, match="`conversation` is empty"):
            processor.apply_chat_template(messages)
    with pytest.raises(Exception, match="Roles must be 'user' or 'assistant'.*tool"):
        processor.apply_chat_template([{"role": "tool", "content": "a"}])
    for content, error, message in (
        (None, ValueError, "is missing"),
        (3, TypeError, "must be a string or a list"),
        (["a"], TypeError, "must be a string or a list"),
        ([[[["a"]]]], TypeError, "must be a string or a list"),
        ([{"type": "text", "text": None}], TypeError, "'text'` must be a string.*None"),
        ([{"type": "text"}], TypeError, "'text'` must be a string.*None"),
        ("\udc00", ValueError, "lone surrogate"),
    ):
        with pytest.raises(error, match=rf"`conversation\[1\]\['content'\].*{message}"):
            processor.apply_chat_template([{"role": "system", "content": "a"}, {"role": "user", "content": content}])
    for messages in ("hello", {"role": "user", "content": "a"}, ["hello"], [[["hello"]]]):
        with pytest.raises(TypeError, match="`conversation` must be a list of messages"):
            processor.apply_chat_template(messages)
    with pytest.raises(Exception, match="type 'text' or 'image', got 'video'"):
        processor.apply_chat_template([{"role": "user", "content": [{"type": "video", "video": "a"}]}])
    with pytest.raises(ValueError, match="`images`: 0 were given for 1"):
        chat(processor, [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a"}]}])


def test_a_tokenizer_without_the_tokens_is_refused(processor):
    from tokenizers import Tokenizer, models

    other = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, "[UNK]")))
    other.unk_token = "[UNK]"
    with pytest.raises(ValueError, match=r"`tokenizer` has no token <\|image\|>"):
        LLaDAUniProcessor(LLaDAUniImageProcessor(), other)
    with pytest.raises(TypeError, match="image_processor"):
        LLaDAUniProcessor(processor.tokenizer, LLaDAUniImageProcessor())


def test_a_batch_needs_a_pad_token(official_tiny):
    processor = make_processor(official_tiny)
    processor.tokenizer.pad_token = None
    assert processor(text="a")["input_ids"].shape == (1, 1)
    with pytest.raises(ValueError, match="does not have a padding token"):
        processor(text=["a", "a b"])


# Images that are given as codes


def test_codes_stand_where_those_of_an_image_would(processor):
    codes = [torch.arange(6).view(2, 3), torch.arange(100, 104).view(2, 2)]
    for task in ("understanding", "editing", "interleaved"):
        inputs = processor(text=["a cat", "two of them"], image_codes=[codes[:1], codes], task=task)
        ids = unpadded(inputs, 0)
        start = ids.index(processor.begin_of_image_token_id) + 1
        header = ids_of(processor, "<|image|><|reserved_token_2|><|reserved_token_3|><boi>")
        assert ids[start - 4 : start + 6] == header + [OFFSET + code for code in range(6)]
        assert [token - OFFSET for token in unpadded(inputs, 1) if token >= OFFSET] == [*range(6), *range(100, 104)]
        assert "pixel_values" not in inputs and processor.image_token_id not in inputs["input_ids"]
        assert inputs.get("grid") == ((2, 3) if task == "editing" else None)
        if task == "editing":
            assert [t - OFFSET for t in unpadded(inputs, 0, "negative_") if t >= OFFSET] == [*range(6)]
            assert not any(token >= OFFSET for token in unpadded(inputs, 0, "negative_image_"))
    finished = processor(text="what is <|image|>?", image_codes=codes[1], return_mm_token_type_ids=True)
    assert [token for token in finished["input_ids"][0].tolist() if token >= OFFSET] == list(range(612, 616))
    assert int(finished["mm_token_type_ids"].sum()) == 4


@pytest.mark.parametrize(
    "arguments, error, words",
    [
        ({"image_codes": [[0, 1]]}, TypeError, "`image_codes`.*int"),
        ({"image_codes": torch.zeros(2, 2)}, ValueError, "`image_codes`.*float32"),
        ({"image_codes": torch.zeros(4, dtype=torch.long)}, ValueError, r"`image_codes`.*\(4,\)"),
        ({"image_codes": torch.zeros(0, 2, dtype=torch.long)}, ValueError, r"`image_codes`.*\(0, 2\)"),
        ({"image_codes": torch.full((2, 2), 256)}, ValueError, "`image_codes`.*0..255.*256"),
        ({"image_codes": torch.full((2, 2), -1)}, ValueError, "`image_codes`.*-1"),
        ({"image_codes": torch.zeros(1, 5000, dtype=torch.long)}, ValueError, "`image_codes` of 1 x 5000"),
        ({"image_codes": torch.zeros(2, 2, dtype=torch.long), "images": picture()}, ValueError, "give one of them"),
        ({"image_codes": [torch.zeros(2, 2).long()], "text": ["a", "b"]}, ValueError, "`image_codes` has 1 images"),
        ({"image_codes": torch.zeros(2, 2, dtype=torch.long), "text": None}, ValueError, "`text` is missing"),
        ({"image_codes": torch.zeros(2, 2, dtype=torch.long), "task": "text_to_image"}, ValueError, "`image_codes`"),
    ],
)
def test_bad_codes(processor, arguments, error, words):
    with pytest.raises(error, match=words):
        processor(**{"text": "what is this?", "task": "understanding", **arguments})
