"""Rows of every format become the ids that the processor writes for inference."""

import itertools

import pytest
import torch
from datasets import Dataset, Features, Image, IterableDataset, List, Value, concatenate_datasets, load_from_disk
from PIL import Image as PILImage
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import pack_dataset

from transformers_llada_uni.generation.canvas import Canvas
from transformers_llada_uni.image_places import image_header
from transformers_llada_uni.training import (
    encode_images,
    mix_datasets,
    prepare_dataset,
    prepare_preference_dataset,
    prepare_prompts,
)
from transformers_llada_uni.training.data.image_files import versions_of_image_files
from transformers_llada_uni.user_words import encode_words


BLOCK = 8
NO_DROPOUT = {"caption_dropout": 0.0, "image_dropout": 0.0, "block_length": BLOCK}


@pytest.fixture(scope="module")
def processor(converted_dir):
    return AutoProcessor.from_pretrained(converted_dir / "processor")


@pytest.fixture(scope="module")
def model(converted_dir):
    return AutoModelForImageTextToText.from_pretrained(converted_dir / "model")


def picture(seed=0, size=(96, 64)):
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randint(0, 256, (4, 6, 3), generator=generator, dtype=torch.uint8)
    return PILImage.fromarray(noise.numpy()).resize(size)


def codes_of(model, processor, image, rule):
    inputs = processor.image_processor([image], resize_mode=rule, return_tensors="pt")
    (grid,) = model.get_image_codes(inputs["pixel_values"], inputs["image_grid_thw"])
    return grid


def prompt_of(row):
    return [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label == -100]


def answer_of(row):
    return [label for label in row["labels"] if label != -100]


def with_codes(processor, model, inputs):
    """The processor's ids with the codes of its images in their places."""
    images = inputs["pixel_values"], inputs["image_grid_thw"]
    return model.model.place_images({"input_ids": inputs["input_ids"]}, *images)["input_ids"][0].tolist()


def closed(processor, prompt, answer):
    """An answer with the end tokens that fill its last block."""
    end = processor.tokenizer.eos_token_id
    filled = answer + [end]
    return filled + [end] * (-(len(prompt) + len(filled)) % BLOCK)


CHAT = [
    {"role": "user", "content": "What is this?"},
    {"role": "assistant", "content": "A cat."},
    {"role": "user", "content": "Which colour?"},
    {"role": "assistant", "content": "Black."},
]


def test_text_is_learnt_whole(processor):
    row = prepare_dataset(Dataset.from_dict({"text": ["a long story"]}), processor, **NO_DROPOUT)[0]
    ids = processor.tokenizer("a long story", add_special_tokens=False)["input_ids"]
    assert row["input_ids"] == row["labels"] == closed(processor, [], ids)
    assert len(row["input_ids"]) % BLOCK == 0


def test_long_text_is_cut_into_pieces(processor):
    text = "one two three four five six seven " * 5
    dataset = prepare_dataset(Dataset.from_dict({"text": [text]}), processor, max_length=20, **NO_DROPOUT)
    ids = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    joined = [token for row in dataset for token in row["input_ids"]]
    assert joined == closed(processor, [], ids)
    assert [len(row["input_ids"]) for row in dataset][:-1] == [16] * (len(dataset) - 1)


def test_every_answer_of_a_chat_is_learnt_after_the_prompt_of_inference(processor):
    row = prepare_dataset(Dataset.from_dict({"messages": [CHAT]}), processor, **NO_DROPOUT)[0]
    positions = 0
    for turn in (1, 3):
        prompt = processor.apply_chat_template(
            CHAT[:turn], add_generation_prompt=True, tokenize=True, return_dict=True
        )["input_ids"]
        prompt = prompt[0].tolist() if hasattr(prompt[0], "tolist") else prompt[0]
        assert row["input_ids"][: len(prompt)] == prompt
        answer = processor.tokenizer(CHAT[turn]["content"] + "<|role_end|>", add_special_tokens=False)["input_ids"]
        assert row["labels"][len(prompt) : len(prompt) + len(answer)] == answer
        assert row["labels"][positions : len(prompt)] == [-100] * (len(prompt) - positions)
        positions = len(prompt) + len(answer)
    end = processor.tokenizer.eos_token_id
    assert set(row["labels"][positions:]) == {end} and len(row["labels"]) % BLOCK == 0


TEXT_TEMPLATE = (
    "{%- set names = {'system': 'SYSTEM', 'user': 'HUMAN', 'assistant': 'ASSISTANT'} -%}"
    "{%- for message in messages -%}<role>{{ names[message.role] }}</role>{{ message.content }}<|role_end|>"
    "{%- endfor -%}{%- if add_generation_prompt -%}<role>ASSISTANT</role>{%- endif -%}"
)


@pytest.fixture
def text_processor(converted_dir):
    """A processor whose tokenizer writes chats without images in a way of its own, as the released one does."""
    processor = AutoProcessor.from_pretrained(converted_dir / "processor")
    processor.tokenizer.chat_template = TEXT_TEMPLATE
    return processor


def in_parts(chat):
    return [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in chat]


@pytest.mark.parametrize("chat", [CHAT, in_parts(CHAT)])
def test_a_tokenizer_alone_writes_its_own_template(text_processor, chat):
    tokenizer = text_processor.tokenizer
    turns = ["<role>HUMAN</role>What is this?<|role_end|><role>ASSISTANT</role>", "A cat.<|role_end|>"]
    turns += ["<role>HUMAN</role>Which colour?<|role_end|><role>ASSISTANT</role>", "Black.<|role_end|>"]
    turns = [tokenizer(turn, add_special_tokens=False)["input_ids"] for turn in turns]
    dataset = Dataset.from_dict({"messages": [chat]})
    for either in (tokenizer, text_processor):
        row = prepare_dataset(dataset, either, **NO_DROPOUT)[0]
        length = sum(map(len, turns))
        assert row["input_ids"] == closed(text_processor, [], sum(turns, []))
        assert row["labels"][:length] == [-100] * len(turns[0]) + turns[1] + [-100] * len(turns[2]) + turns[3]
    preferences = {"prompt": [chat[:1]], "chosen": [chat[1:2]], "rejected": [chat[3:]]}
    row = prepare_preference_dataset(Dataset.from_dict(preferences), tokenizer, block_length=BLOCK)[0]
    assert row["prompt_ids"] == turns[0] and row["chosen_ids"] == closed(text_processor, turns[0], turns[1])
    assert prepare_prompts(Dataset.from_dict({"prompt": [chat[:3]]}), tokenizer)[0]["prompt_ids"] == sum(turns[:3], [])


def test_one_image_decides_the_template_of_a_chat(text_processor, model):
    """Also of the turns before it, as when a model is asked with all of them."""
    chat = in_parts(CHAT)
    chat[2]["content"].insert(0, {"type": "image", "image": picture()})
    row = prepare_dataset(Dataset.from_dict({"messages": [chat]}), text_processor, model=model, **NO_DROPOUT)[0]
    inputs = text_processor.apply_chat_template(chat[:3], add_generation_prompt=True, tokenize=True, return_dict=True)
    prompt = with_codes(text_processor, model, inputs)
    assert row["input_ids"][: len(prompt)] == prompt
    ids = [text_processor.tokenizer(f"{words}<|role_end|>")["input_ids"] for words in ("A cat.", "Black.")]
    assert answer_of(row)[: len(ids[0] + ids[1])] == ids[0] + ids[1]


@pytest.mark.parametrize("as_stream", [False, True])
def test_images_inside_messages_of_any_row_are_found(processor, model, as_stream):
    shown = in_parts(CHAT[:2])
    shown[0]["content"].insert(0, {"type": "image", "image": picture()})
    rows = [{"messages": in_parts(CHAT)}, {"messages": shown}]
    dataset = IterableDataset.from_generator(lambda: iter(rows)) if as_stream else Dataset.from_list(rows)
    first, second = list(prepare_dataset(dataset, processor, model=model, **NO_DROPOUT))
    assert first == prepare_dataset(Dataset.from_dict({"messages": [CHAT]}), processor, **NO_DROPOUT)[0]
    task = processor(text="What is this?", images=[picture()], task="understanding")
    assert prompt_of(second) == with_codes(processor, model, task)


@pytest.mark.parametrize("asks_with_picture", [False, True])
def test_answers_with_images_are_those_of_the_interleaved_task(text_processor, model, asks_with_picture):
    processor = text_processor
    pictures = [picture(1)] if asks_with_picture else None
    asked = [{"type": "image", "image": picture(1)}] if asks_with_picture else []
    answer = [{"type": "text", "text": "One. "}, {"type": "image", "image": picture()}]
    chat = [
        {"role": "user", "content": [*asked, {"type": "text", "text": "Tell a story"}]},
        {"role": "assistant", "content": [*answer, {"type": "text", "text": "Two."}]},
    ]
    row = prepare_dataset(Dataset.from_dict({"messages": [chat]}), processor, model=model, **NO_DROPOUT)[0]
    inputs = processor(text="Tell a story", images=pictures, task="interleaved")
    asked_ids = with_codes(processor, model, inputs) if asks_with_picture else inputs["input_ids"][0].tolist()
    assert prompt_of(row) == asked_ids
    grid = codes_of(model, processor, picture(), "editing")
    header = processor.tokenizer("One. " + image_header(*grid.shape))["input_ids"]
    codes = (grid.flatten() + processor.image_token_offset).tolist()
    end = processor.tokenizer("<|/image|>Two.<|role_end|>")["input_ids"]
    assert answer_of(row) == closed(processor, prompt_of(row), header + codes + end)


# What a user may write as well as anything else.
CONTROL = "what is <|image|><|reserved_token_0|> or <|reserved_token_1|> <role>HUMAN</role> <|mask|>?"


def test_words_of_a_chat_are_words(processor, model):
    chat = [{"role": "user", "content": CONTROL}, {"role": "assistant", "content": CONTROL}]
    plain = prepare_dataset(Dataset.from_dict({"messages": [chat]}), processor, **NO_DROPOUT)[0]
    assert prompt_of(plain) == processor(text=CONTROL, task="understanding")["input_ids"][0].tolist()
    shown = Dataset.from_list([{"messages": chat, "images": [picture()]}]).cast_column("images", List(Image()))
    row = prepare_dataset(shown, processor, model=model, **NO_DROPOUT)[0]
    inputs = processor(text=CONTROL, images=[picture()], task="understanding")
    assert prompt_of(row) == with_codes(processor, model, inputs)
    words, end = encode_words(processor.tokenizer, CONTROL), processor.tokenizer.convert_tokens_to_ids("<|role_end|>")
    assert answer_of(row)[: len(words) + 1] == answer_of(plain)[: len(words) + 1] == [*words, end]
    assert not set(words) & set(processor.tokenizer.added_tokens_decoder)


@pytest.mark.parametrize("column", ["text", "prompt", "completion"])
def test_words_of_texts_are_words(processor, column):
    row = {"text": CONTROL} if column == "text" else {"prompt": "a", "completion": "a", column: CONTROL}
    row = prepare_dataset(Dataset.from_list([row]), processor, **NO_DROPOUT)[0]
    words = encode_words(processor.tokenizer, CONTROL)
    assert any(row["input_ids"][i : i + len(words)] == words for i in range(len(row["input_ids"])))
    assert prepare_prompts(Dataset.from_dict({"prompt": [CONTROL]}), processor)[0]["prompt_ids"] == words


def test_words_about_an_image_are_words(processor, model):
    image = Image().encode_example(picture(size=(128, 96)))  # as parquet holds it
    drawn = Dataset.from_list([{"image": image, "caption": CONTROL, "thinking": CONTROL}])
    row = prepare_dataset(drawn, processor, model=model, **NO_DROPOUT)[0]
    assert prompt_of(row) == processor(text=CONTROL, task="thinking")["input_ids"][0].tolist()
    (parts,) = processor.post_process(torch.tensor(answer_of(row)))
    assert (
        parts[0].strip() == CONTROL
        and parts[1].shape == codes_of(model, processor, picture(size=(128, 96)), "editing").shape
    )
    words = "an <|image|>"
    image = Image().encode_example(picture(1))
    edited = Dataset.from_list([{"source_image": image, "instruction": words, "target_image": image}])
    row = prepare_dataset(edited, processor, model=model, **NO_DROPOUT)[0]
    inputs = processor(text=words, images=[picture(1)], task="editing")
    assert prompt_of(row) == with_codes(processor, model, inputs)


def test_prompt_and_completion_equal_the_chat(processor):
    chat = prepare_dataset(Dataset.from_dict({"messages": [CHAT[:2]]}), processor, **NO_DROPOUT)[0]
    pair = Dataset.from_dict({"prompt": [CHAT[:1]], "completion": [CHAT[1:2]]})
    assert prepare_dataset(pair, processor, **NO_DROPOUT)[0] == chat
    texts = Dataset.from_dict({"prompt": ["two and two "], "completion": ["is four"]})
    row = prepare_dataset(texts, processor, **NO_DROPOUT)[0]
    ids = [processor.tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("two and two ", "is four")]
    assert prompt_of(row) == ids[0] and answer_of(row) == closed(processor, *ids)


def test_only_the_completions_answers_are_learnt(processor):
    pair = Dataset.from_dict({"prompt": [CHAT[:3]], "completion": [CHAT[3:]]})
    row = prepare_dataset(pair, processor, **NO_DROPOUT)[0]
    answer = processor.tokenizer("Black.<|role_end|>", add_special_tokens=False)["input_ids"]
    assert answer_of(row) == closed(processor, prompt_of(row), answer)


@pytest.mark.parametrize("with_parts", [False, True])
def test_images_of_a_chat_are_those_of_inference(processor, model, with_parts):
    words = "What is this?"
    chat = [{"role": "user", "content": words}, CHAT[1]]
    if with_parts:
        chat = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in chat]
        chat[0]["content"].insert(0, {"type": "image"})
    dataset = Dataset.from_dict({"messages": [chat], "images": [[picture()]]}).cast_column("images", List(Image()))
    row = prepare_dataset(dataset, processor, model=model, **NO_DROPOUT)[0]
    asked = [{"role": "user", "content": [{"type": "image", "image": picture()}, {"type": "text", "text": words}]}]
    inputs = processor.apply_chat_template(asked, add_generation_prompt=True, tokenize=True, return_dict=True)
    assert prompt_of(row) == with_codes(processor, model, inputs)
    task = processor(text=words, images=[picture()], task="understanding")
    assert prompt_of(row) == with_codes(processor, model, task)


def test_an_answers_image_is_learnt_with_its_header(processor, model):
    content = [{"type": "text", "text": "Here: "}, {"type": "image"}]
    asked = [{"type": "text", "text": "Draw."}]
    chat = [{"role": "user", "content": asked}, {"role": "assistant", "content": content}]
    dataset = Dataset.from_dict({"messages": [chat], "image": [picture()]}).cast_column("image", Image())
    row = prepare_dataset(dataset, processor, model=model, **NO_DROPOUT)[0]
    grid = codes_of(model, processor, picture(), "editing")
    (parts,) = processor.post_process(torch.tensor(answer_of(row)))
    assert parts[0].strip() == "Here:" and torch.equal(parts[1], grid)


def test_text_to_image_is_the_prompt_of_inference_and_the_codes(processor, model):
    image = picture(size=(128, 96))
    dataset = Dataset.from_dict({"image": [image], "caption": ["a cat"]}).cast_column("image", Image())
    row = prepare_dataset(dataset, processor, model=model, **NO_DROPOUT)[0]
    grid = codes_of(model, processor, image, "editing")
    inputs = processor(text="a cat", task="text_to_image", height=32 * grid.shape[0], width=32 * grid.shape[1])
    assert prompt_of(row) == inputs["input_ids"][0].tolist()
    answer = [*(grid.flatten() + processor.image_token_offset).tolist(), processor.image_end_token_id]
    assert answer_of(row) == closed(processor, prompt_of(row), answer)


def test_thoughts_are_learnt_before_the_image(processor, model):
    image = picture(size=(128, 96))
    columns = {"image": [image], "caption": ["a cat"], "thinking": ["It is black."]}
    dataset = Dataset.from_dict(columns).cast_column("image", Image())
    row = prepare_dataset(dataset, processor, model=model, **NO_DROPOUT)[0]
    assert prompt_of(row) == processor(text="a cat", task="thinking")["input_ids"][0].tolist()
    grid = codes_of(model, processor, image, "editing")
    (parts,) = processor.post_process(torch.tensor(answer_of(row)))
    assert parts[0].strip() == "It is black." and torch.equal(parts[1], grid)


def editing_dataset():
    columns = {"source_image": [picture(1)], "instruction": ["make it red"], "target_image": [picture(2)]}
    dataset = Dataset.from_dict(columns)
    return dataset.cast_column("source_image", Image()).cast_column("target_image", Image())


@pytest.mark.parametrize(
    ("dropout", "name"),
    [
        ({"caption_dropout": 0.0, "image_dropout": 0.0}, "input_ids"),
        ({"caption_dropout": 1.0, "image_dropout": 0.0}, "negative_input_ids"),
        ({"caption_dropout": 0.0, "image_dropout": 1.0}, "negative_image_input_ids"),
        ({"caption_dropout": 1.0, "image_dropout": 1.0}, "negative_input_ids"),
    ],
)
def test_editing_and_its_dropout_are_the_branches_of_inference(processor, model, dropout, name):
    row = prepare_dataset(editing_dataset(), processor, model=model, block_length=BLOCK, **dropout)[0]
    inputs = processor(text="make it red", images=[picture(1)], task="editing")
    mask = inputs[name.replace("input_ids", "attention_mask")][0].bool()
    expected = {"input_ids": inputs[name][0][mask][None]}
    if name != "negative_image_input_ids":
        pictures = {key: inputs[key] for key in ("pixel_values", "image_grid_thw")}
        expected["input_ids"] = torch.tensor([with_codes(processor, model, {**expected, **pictures})])
    assert prompt_of(row) == expected["input_ids"][0].tolist()
    target = codes_of(model, processor, picture(2), "editing").flatten() + processor.image_token_offset
    assert answer_of(row)[: target.numel() + 1] == [*target.tolist(), processor.image_end_token_id]


def test_dropped_captions_are_the_unconditional_branch(processor, model):
    dataset = Dataset.from_dict({"image": [picture()], "caption": ["a cat"]}).cast_column("image", Image())
    row = prepare_dataset(dataset, processor, model=model, block_length=BLOCK, caption_dropout=1.0)[0]
    grid = codes_of(model, processor, picture(), "editing")
    inputs = processor(text="a cat", task="text_to_image", height=32 * grid.shape[0], width=32 * grid.shape[1])
    mask = inputs["negative_attention_mask"][0].bool()
    assert prompt_of(row) == inputs["negative_input_ids"][0][mask].tolist()


def test_dropout_is_drawn_from_the_seed(processor, model):
    encoded = encode_images(
        Dataset.from_dict({"image": [picture()], "caption": ["a cat"]}).cast_column("image", Image()), model, processor
    )
    many = concatenate_datasets([encoded] * 200)

    def drops(seed):
        rows = prepare_dataset(many, processor, block_length=BLOCK, caption_dropout=0.3, seed=seed)
        lengths = [len(prompt_of(row)) for row in rows]
        return [length != min(lengths) for length in lengths]

    first = drops(0)
    assert first == drops(0) and first != drops(1)
    assert 40 <= min(sum(first), 200 - sum(first)) <= 80


def test_encoding_is_cached_and_depends_on_the_tokenizer(processor, model, monkeypatch, tmp_path):
    dataset = Dataset.from_dict({"image": [picture(7)], "caption": ["a dog"]}).cast_column("image", Image())
    dataset.save_to_disk(tmp_path)
    dataset = load_from_disk(tmp_path)  # data in memory are not cached
    first = encode_images(dataset, model, processor)
    assert first.column_names == ["caption", "image_codes"]
    with monkeypatch.context() as patch:
        patch.setattr(type(model), "get_image_codes", None)  # not called again
        assert encode_images(dataset, model, processor)[0] == first[0]
    codebook = model.model.vqmodel.quantize.embedding.weight
    old = codebook.detach().clone()
    try:
        codebook.data = codebook.data.flip(0)
        assert encode_images(dataset, model, processor)[0] != first[0]
    finally:
        codebook.data = old
    assert encode_images(first, model, processor) is first


@pytest.mark.parametrize("wrap", [str, lambda path: {"path": path, "bytes": None}], ids=["path", "file"])
def test_an_image_that_changes_under_its_name_is_encoded_anew(processor, model, tmp_path, wrap):
    file = tmp_path / "dog.png"
    picture(7).save(file)
    rows = {"image": [wrap(str(file))], "caption": ["a dog"]}
    Dataset.from_dict(rows).save_to_disk(tmp_path / "rows")
    first = encode_images(load_from_disk(tmp_path / "rows"), model, processor)
    assert encode_images(load_from_disk(tmp_path / "rows"), model, processor)[0] == first[0]
    picture(8).save(file)
    assert encode_images(load_from_disk(tmp_path / "rows"), model, processor)[0] != first[0]


def test_files_of_images_are_found_wherever_they_stand(tmp_path):
    for name in "abcd":
        (tmp_path / name).write_text(name)
    a, b, c, d = (str(tmp_path / name) for name in "abcd")
    message = [{"role": "user", "content": [{"type": "image", "image": b, "text": None}, {"type": "text", "text": d}]}]
    rows = Dataset.from_dict(
        {"image": [{"path": a, "bytes": None}], "images": [[c, "https://x/y.png"]], "messages": [message], "text": [d]}
    )
    held = Dataset.from_dict({"image": [{"path": a, "bytes": b"held"}]})
    assert [path for path, _, _ in versions_of_image_files(rows)] == [a, b, c]
    assert versions_of_image_files(held) == []


def test_streaming_gives_the_same_rows(processor, model):
    dataset = Dataset.from_dict({"image": [picture(), picture(3)], "caption": ["a cat", "a dog"]})
    dataset = dataset.cast_column("image", Image())
    settings = {"block_length": BLOCK, "max_length": 4096, "model": model}
    whole = prepare_dataset(dataset, processor, **settings)
    streamed = prepare_dataset(dataset.to_iterable_dataset(), processor, **settings)
    assert isinstance(streamed, IterableDataset)
    assert [row["input_ids"] for row in streamed] == whole["input_ids"][:]


def test_packed_documents_begin_at_blocks(processor):
    dataset = Dataset.from_dict({"text": [f"story number {i} " * (i % 4 + 1) for i in range(12)]})
    packed = pack_dataset(prepare_dataset(dataset, processor, max_length=64, **NO_DROPOUT), 64, "bfd")
    assert len(packed) < 12
    for lengths in packed["seq_lengths"]:
        assert all(length % BLOCK == 0 for length in lengths)


def test_preferences(processor):
    columns = {"prompt": [CHAT[:1]], "chosen": [CHAT[1:2]], "rejected": [[{**CHAT[1], "content": "A dog, I think."}]]}
    row = prepare_preference_dataset(Dataset.from_dict(columns), processor, block_length=BLOCK)[0]
    for name, words in (("chosen", "A cat."), ("rejected", "A dog, I think.")):
        chat = [CHAT[0], {**CHAT[1], "content": words}]
        single = prepare_dataset(Dataset.from_dict({"messages": [chat]}), processor, **NO_DROPOUT)[0]
        assert row["prompt_ids"] + row[f"{name}_ids"] == single["input_ids"]
        assert row[f"{name}_ids"] == answer_of(single)


def test_preferences_between_images(processor, model):
    asked = in_parts([{"role": "user", "content": "Draw."}])
    drawn = [[{"role": "assistant", "content": [{"type": "image", "image": picture(seed)}]}] for seed in (1, 2)]
    columns = {"prompt": [asked], "chosen": [drawn[0]], "rejected": [drawn[1]]}
    row = prepare_preference_dataset(Dataset.from_dict(columns), processor, block_length=BLOCK, model=model)[0]
    for name, seed in (("chosen", 1), ("rejected", 2)):
        grid = codes_of(model, processor, picture(seed), "editing")
        (parts,) = processor.post_process(torch.tensor(row[f"{name}_ids"]))
        assert torch.equal(parts[0], grid)
    columns["rejected"] = [in_parts([{"role": "assistant", "content": "No."}])]
    with pytest.raises(ValueError, match="Row 0: `chosen` and `rejected`"):
        prepare_preference_dataset(Dataset.from_dict(columns), processor, block_length=BLOCK, model=model)


def test_prompts_keep_their_columns(processor):
    dataset = Dataset.from_dict({"prompt": [CHAT[:1]], "solution": ["cat"], "caption": ["of a reward"]})
    row = prepare_prompts(dataset, processor)[0]
    inputs = processor.apply_chat_template(CHAT[:1], add_generation_prompt=True, tokenize=True, return_dict=True)
    assert row["prompt_ids"] == torch.as_tensor(inputs["input_ids"])[0].tolist()
    assert (row["solution"], row["caption"]) == ("cat", "of a reward")


def test_prompts_with_images(processor, model):
    asked = in_parts(CHAT[:1])
    asked[0]["content"].insert(0, {"type": "image", "image": picture()})
    dataset = Dataset.from_dict({"prompt": [asked]})
    inputs = processor(text="What is this?", images=[picture()], task="understanding")
    endless = IterableDataset.from_generator(lambda: itertools.repeat({"prompt": asked}), features=dataset.features)
    for either in (dataset, dataset.to_iterable_dataset(), endless):
        row = next(iter(prepare_prompts(either, processor, model=model)))
        assert row["prompt_ids"] == with_codes(processor, model, inputs)
    with pytest.raises(ValueError, match="Row 0: .*`model`"):
        prepare_prompts(dataset, processor)
    with pytest.raises(ValueError, match="Row 0: .*`model`"):
        answered = dataset.add_column("completion", [in_parts(CHAT[1:2])])
        prepare_dataset(answered, processor, **NO_DROPOUT)


def test_a_text_beside_a_image_is_its_caption(processor, model):
    dataset = Dataset.from_dict({"image": [picture()], "text": ["a cat"]}).cast_column("image", Image())
    expected = prepare_dataset(dataset.rename_column("text", "caption"), processor, model=model, **NO_DROPOUT)[0]
    assert prepare_dataset(dataset, processor, model=model, **NO_DROPOUT)[0] == expected
    assert prepare_dataset(encode_images(dataset, model, processor), processor, **NO_DROPOUT)[0] == expected


def test_codes_fill_the_last_block_and_are_followed_by_what_closes_the_image(processor, model, monkeypatch):
    """
    `generate_image_codes` allows only codes in the columns after an image, too, and cuts them off. What is learnt
    there is the end of the image; prompt and codes stand in the same columns.
    """
    lay_out, canvases = Canvas.lay_out.__func__, []
    monkeypatch.setattr(
        Canvas, "lay_out", classmethod(lambda cls, *args: canvases.append(lay_out(cls, *args)) or canvases[-1])
    )
    dataset = Dataset.from_dict({"caption": ["a cat"], "image_codes": [[{"grid": [3, 3], "codes": [*range(9)]}]]})
    row = prepare_dataset(dataset, processor, **NO_DROPOUT)[0]
    inputs = processor(text="a cat", task="text_to_image", height=96, width=96)
    model.generate_image_codes(**inputs, block_length=BLOCK, guidance_scale=1.0)
    ids, start, stop = canvases[0].ids[0, 0], int(canvases[0].prompt_end), int(canvases[0].end)
    assert row["input_ids"][:start] == ids[:start].tolist()
    assert row["labels"][start:stop] == [processor.image_token_offset + code for code in range(9)]
    assert len(ids) > stop and (ids[stop:] >= processor.image_token_offset).all()
    assert row["labels"][stop] == processor.image_end_token_id
    assert set(row["labels"][stop + 1 :]) == {processor.tokenizer.eos_token_id}


def test_long_rows_are_left_out_and_counted(processor, caplog):
    chats = [CHAT, [CHAT[0], {**CHAT[1], "content": "very " * 200}]]
    with caplog.at_level("WARNING"):
        rows = prepare_dataset(Dataset.from_dict({"messages": chats}), processor, max_length=96, **NO_DROPOUT)
    assert len(rows) == 1 and "1 of 2 rows" in caplog.text


def test_mixed_datasets_have_their_shares():
    parts = {name: Dataset.from_dict({"input_ids": [[i]] * 300}) for i, name in enumerate("ab")}
    mixed = mix_datasets(parts, {"a": 3.0, "b": 1.0}, seed=0)
    counts = [sum(row["input_ids"] == [i] for row in mixed) for i in range(2)]
    assert counts[0] / counts[1] == pytest.approx(3, rel=0.2)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"question": ["?"]}, "no example"),
        ({"text": [""]}, "Row 0: `text`"),
        ({"text": ["good", "  "]}, "Row 1: `text`"),
        ({"messages": [[]]}, "Row 0: `messages`"),
        ({"messages": [[{"role": "user", "content": "hi"}]]}, "Row 0: .*'assistant'"),
        ({"messages": [[{"role": "assistant", "content": "hi"}]]}, "Row 0: the first message"),
        ({"messages": [[{"role": "robot", "content": "hi"}]]}, r"Row 0: `messages\[0\]`"),
        ({"messages": [[{"role": "user", "content": [{"type": "video"}]}]]}, "Row 0: .*content"),
        ({"prompt": [[CHAT[1]]], "completion": [[CHAT[1]]]}, "Row 0: `prompt`"),
        ({"prompt": [[CHAT[0]]], "completion": [[CHAT[0]]]}, "Row 0: `completion`"),
        ({"prompt": ["a"], "chosen": ["b"], "rejected": ["c"]}, "'preference'"),
        ({"caption": ["a cat"], "image_codes": [[]]}, "Row 0: `image_codes`"),
        ({"caption": ["a cat"], "image_codes": [[[1, 2]]]}, "Row 0: `image_codes`.*grid"),
        ({"caption": ["a cat"], "image_codes": [[{"grid": [2, 2], "codes": [0]}]]}, "Row 0: `image_codes`.*grid"),
        (
            {"caption": ["a"] * 2, "image_codes": [[{"grid": [1, 1], "codes": [code]}] for code in (255, 256)]},
            r"Row 1: `image_codes` must lie in 0\.\.255, got 256",
        ),
        (
            {"messages": [CHAT], "image_codes": [[{"grid": [1, 2], "codes": [0, -1]}]]},
            r"Row 0: `image_codes` must lie in 0\.\.255, got -1",
        ),
        (
            {"messages": [CHAT], "image_codes": [[{"grid": [1, 64], "codes": [0] * 64}]]},
            "Row 0: `image_codes` of 1 x 64: the tokenizer has numbers up to 63",
        ),
        ({"messages": [CHAT], "image_codes": [[{"grid": [1, 2], "codes": [0]}]]}, "Row 0: `image_codes`.*grid"),
        ({"image": [None], "caption": ["a cat"]}, "Row 0: `image` is missing"),
        ({"image": ["/nowhere.png"], "caption": ["a cat"]}, "Row 0: its images"),
        (
            {"image": [{"bytes": b"no image", "path": None}], "caption": ["a cat"]},
            "Row 0: its images .* cannot identify",
        ),
        ({"prompt": [None], "completion": ["a"]}, "Row 0: `prompt` must be a text or a list of messages, got None"),
        ({"text": ["a"], "images": [["/nowhere.png"]]}, "Row 0: a `text` has no place"),
        ({"prompt": ["a"], "completion": ["b"], "image_codes": [[{"grid": [1, 1], "codes": [0]}]]}, "Row 0: .*place"),
        ({"text": ["one two three"], "max_length": 4}, "max_length"),
        ({"messages": [CHAT], "max_length": 8}, "`max_length` .8."),
        ({"text": ["a"], "caption_dropout": 1.5}, "caption_dropout"),
        ({"text": ["a"], "block_length": 0}, "block_length"),
    ],
)
def test_rows_that_do_not_fit_are_refused(processor, model, columns, message):
    columns = dict(columns)
    settings = {**NO_DROPOUT, **{name: columns.pop(name) for name in [*NO_DROPOUT, "max_length"] if name in columns}}
    with pytest.raises(ValueError, match=message):
        prepare_dataset(Dataset.from_dict(columns), processor, model=model, **settings)


def test_images_without_a_model_are_refused(processor):
    with pytest.raises(ValueError, match="`model`"):
        prepare_dataset(editing_dataset(), processor, **NO_DROPOUT)


def test_images_that_do_not_fit_the_places_are_refused(processor, model):
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "hm?"}]}, CHAT[1]]
    features = Features(
        {
            "messages": List(
                {"role": Value("string"), "content": List({"type": Value("string"), "text": Value("string")})}
            ),
            "images": List(Image()),
        }
    )
    chat[1] = {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]}
    for images in ([], [picture(), picture(1)]):
        dataset = Dataset.from_dict({"messages": [chat], "images": [images]}, features=features)
        with pytest.raises(ValueError, match="Row 0: .*images"):
            prepare_dataset(dataset, processor, model=model, **NO_DROPOUT)


def test_edits_must_keep_the_shape(processor, model):
    dataset = Dataset.from_dict(
        {"source_image": [picture(1)], "instruction": ["crop"], "target_image": [picture(2, (64, 192))]}
    )
    dataset = dataset.cast_column("source_image", Image()).cast_column("target_image", Image())
    with pytest.raises(ValueError, match="Row 0: `target_image`"):
        prepare_dataset(dataset, processor, model=model, **NO_DROPOUT)
