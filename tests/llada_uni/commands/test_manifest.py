"""A folder of results: nothing twice, nothing half."""

import json
import os

import PIL.Image
import pytest

from llada_uni.commands.manifest import Manifest, slug


RED, BLUE = PIL.Image.new("RGB", (4, 4), "red"), PIL.Image.new("RGB", (4, 4), "blue")


def lines(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]


def test_an_entry_is_found_again(tmp_path):
    manifest, request = Manifest(tmp_path / "new" / "folder"), {"prompt": "A red, Apple!", "seed": 1}
    assert manifest.find(request) is None
    entry = manifest.add(request, RED, 0.5)
    assert entry["file"] == "a-red-apple.png" and entry["seconds"] == 0.5
    assert PIL.Image.open(manifest.folder / entry["file"]).getpixel((0, 0)) == (255, 0, 0)
    assert Manifest(manifest.folder).find(request) == entry == lines(manifest.folder)[0]
    assert manifest.find({**request, "seed": 2}) is None


def test_names_do_not_collide(tmp_path):
    (tmp_path / "a-cat.png").write_bytes(b"of the user")
    manifest = Manifest(tmp_path)
    files = [manifest.add({"prompt": "a cat", "seed": seed}, BLUE, 0)["file"] for seed in range(2)]
    assert files == ["a-cat-2.png", "a-cat-3.png"] and (tmp_path / "a-cat.png").read_bytes() == b"of the user"


def test_a_file_that_is_gone_is_made_again(tmp_path):
    manifest, request = Manifest(tmp_path), {"prompt": "a cat"}
    (tmp_path / manifest.add(request, RED, 0)["file"]).unlink()
    assert Manifest(tmp_path).find(request) is None


def test_a_run_that_was_killed(tmp_path):
    Manifest(tmp_path).add({"prompt": "a cat"}, RED, 0)
    with (tmp_path / "manifest.jsonl").open("a") as file:
        file.write('{"prompt": "a do')
    (tmp_path / ".4194305.a-dog.png.partial").write_bytes(b"half")  # of a process that cannot be
    manifest = Manifest(tmp_path)
    assert not list(tmp_path.glob(".*.partial"))
    manifest.add({"prompt": "a dog"}, BLUE, 0)
    again = Manifest(tmp_path)
    assert again.find({"prompt": "a cat"}) and again.find({"prompt": "a dog"})


def test_separators_of_lines_in_a_prompt(tmp_path):
    request = {"prompt": "a\u2028b\x85c 🍎"}
    Manifest(tmp_path).add(request, RED, 0)
    assert Manifest(tmp_path).find(request)


def test_a_manifest_that_is_damaged(tmp_path):
    Manifest(tmp_path).add({"prompt": "a cat"}, RED, 0)
    with (tmp_path / "manifest.jsonl").open("ab") as file:
        file.write(b"\xff\x00\n[]\n")
    assert Manifest(tmp_path).find({"prompt": "a cat"})


def test_two_runs_in_one_folder(tmp_path):
    runs = Manifest(tmp_path), Manifest(tmp_path)
    files = [run.add({"prompt": "a cat", "seed": seed}, BLUE, 0)["file"] for seed in range(2) for run in runs]
    assert files == ["a-cat.png", "a-cat-2.png", "a-cat-3.png", "a-cat-4.png"] and len(lines(tmp_path)) == 4


def test_a_name_that_another_run_takes_at_this_moment(tmp_path, monkeypatch):
    link = os.link

    def late(partial, path):
        if path.name == "a-cat.png":
            path.write_bytes(b"of another")
        link(partial, path)

    monkeypatch.setattr("os.link", late)
    assert Manifest(tmp_path).add({"prompt": "a cat"}, RED, 0)["file"] == "a-cat-2.png"
    assert (tmp_path / "a-cat.png").read_bytes() == b"of another"


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda *args: False)
    with pytest.raises(PermissionError, match="written"):
        Manifest(tmp_path)


def test_an_image_that_cannot_be_saved_leaves_nothing(tmp_path):
    class Broken:
        def save(self, path, format):
            path.write_bytes(b"half")
            raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        Manifest(tmp_path).add({"prompt": "a cat"}, Broken(), 0)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "text, name",
    [
        ("𠀀" * 99, "𠀀" * 60),  # four bytes each
        ("Ein Kätzchen?", "ein-kätzchen"),
        ("../../etc", "etc"),
        ("猫", "猫"),
        ("!!!", "image"),
        ("a" * 99, "a" * 60),
    ],
)
def test_names_of_prompts(tmp_path, text, name):
    assert slug(text) == name
    assert (tmp_path / Manifest(tmp_path).add({"prompt": text}, RED, 0)["file"]).stem == name
