"""What a user types into a conversation."""

from pathlib import Path

import PIL.Image
import pytest

from llada_uni.commands.talk import converse, paths_of


@pytest.fixture
def photo(tmp_path, monkeypatch) -> Path:
    path = tmp_path / "my photo (1) é.png"
    PIL.Image.new("RGB", (4, 4), "red").save(path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return path


@pytest.mark.parametrize(
    "typed",
    [
        "{path}",
        "  {path}  ",
        "'{path}'",
        '"{path}"',
        "{escaped}",
        "{uri}",
        "'{uri}'",
        "FILE://localhost{uri_path}",
        "~/{name}",
        "'~/{name}'",
        "{name}",
    ],
)
def test_paths_as_they_are_typed_and_dropped(photo, typed):
    uri = photo.as_uri()
    words = {
        "path": photo,
        "name": photo.name,
        "escaped": "".join(f"\\{character}" if character in " ()" else character for character in str(photo)),
        "uri": uri,
        "uri_path": uri.removeprefix("file://"),
    }
    (path,) = paths_of(typed.format(**words))
    assert Path(path).samefile(photo)


def test_several_files_and_none(photo):
    other = photo.with_name("b.png")
    other.write_bytes(photo.read_bytes())
    assert paths_of(f"'{photo}' b.png") == [str(photo), "b.png"]
    assert paths_of("it's not there.png") == ["it's not there.png"]
    assert paths_of("not there.png") == ["not there.png"]


@pytest.fixture
def said(monkeypatch):
    """What the model is told; each answer is the number of the question."""
    told = []

    def stream_answer(pipe, messages, max_new_tokens, **settings):
        told.append(messages)
        question = messages[-1]["content"]
        yield f"answer {len(told)}"
        if question == "long":
            raise KeyboardInterrupt
        if question == "too long":
            raise ValueError("it is too long")
        yield "."

    monkeypatch.setattr("llada_uni.answers.stream_answer", stream_answer)
    return told


def converse_with(lines) -> str:
    written = []
    converse(None, lines, written.append)
    return "".join(written)


def test_images_go_before_the_next_words(said, photo):
    other = photo.with_name("b.png")
    other.write_bytes(photo.read_bytes())
    lines = [
        f"/image {photo.name}",
        str(other),
        "what?",
        f"/image {photo.name} no",
        "and now?",
        "/what",
        "/help",
        "/quit",
    ]
    written = converse_with([*lines, "more"])
    assert [part["type"] for part in said[0][0]["content"]] == ["image", "image", "text"]
    assert said[1][2] == {"role": "user", "content": "and now?"}
    assert "no file" in written and written.count("/image PATH") == 2 and len(said) == 2


def test_a_mistake_ends_a_conversation_that_nobody_types(said, photo):
    written = []
    for lines, words in (
        (["/image none.png\n", "what?\n"], "there is no file none.png"),
        (["/image\n", "what?\n"], "`/image` needs the path"),
        (["too long\n", "more\n"], "it is too long"),
    ):
        with pytest.raises(ValueError, match=words):
            converse(None, lines, written.append, is_typed=False)
    assert len(said) == 1  # the first of the last
    assert "`/image` needs the path" in converse_with(["/image"])


def test_a_byte_order_mark_is_no_word(said, photo):
    converse(None, [f"\ufeff/image {photo}\n", "what?\n"], lambda text: None, is_typed=False)
    assert [part["type"] for part in said[0][0]["content"]] == ["image", "text"]


def test_new_begins_again_and_an_answer_that_is_stopped_is_kept(said):
    written = converse_with(["long\n", "more\n", "too long\n", "more\n", "/new\n", "again\n", "\n"])
    assert written == "answer 1\nanswer 2.\nanswer 3it is too long\nanswer 4.\nanswer 5.\n"
    assert [message["content"] for message in said[3]] == ["long", "answer 1", "more", "answer 2.", "more"]
    assert said[4] == [{"role": "user", "content": "again"}]
