"""A folder of results: nothing twice, nothing half."""

import json
import multiprocessing
import os
import resource
import signal
import time
from pathlib import Path

import PIL.Image
import pytest

from diffusers_llada_uni.evaluation import manifest as module
from diffusers_llada_uni.evaluation.manifest import Manifest, slug, whole_file


RED, BLUE = PIL.Image.new("RGB", (4, 4), "red"), PIL.Image.new("RGB", (4, 4), "blue")


def lines(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]


def add(manifest, request, result=RED) -> dict:
    [(_, entry, _)] = manifest.complete([request], lambda numbers: [result])
    return entry


def test_an_entry_is_found_again(tmp_path):
    manifest, request = Manifest(tmp_path / "new" / "folder"), {"prompt": "A red, Apple!", "seed": 1}
    assert manifest.find(request) is None
    entry = add(manifest, request)
    assert entry["file"] == "a-red-apple.png" and entry["seconds"] >= 0
    assert PIL.Image.open(manifest.folder / entry["file"]).getpixel((0, 0)) == (255, 0, 0)
    assert Manifest(manifest.folder).find(request) == entry == lines(manifest.folder)[0]
    assert manifest.find({**request, "seed": 2}) is None
    assert {path.name for path in manifest.folder.iterdir()} == {"manifest.jsonl", "a-red-apple.png"}


def test_results_that_are_no_images(tmp_path):
    entry = add(Manifest(tmp_path), {"prompt": "1 + 1"}, {"answer": "2"})
    assert entry["answer"] == "2" and "file" not in entry
    assert Manifest(tmp_path).find({"prompt": "1 + 1"}) == entry


def test_what_only_names_a_thing_makes_no_difference(tmp_path):
    request = {"prompt": "a", "images": ["a.png"], "images_sha256": ["1"], "model": "emoji", "model_fingerprint": "2"}
    add(Manifest(tmp_path), request)
    assert Manifest(tmp_path).find({**request, "images": ["../a.png"], "model": "/path/to/emoji"})
    assert not Manifest(tmp_path).find({**request, "model_fingerprint": "3"})


def test_equal_requests_have_one_result(tmp_path):
    batches = []

    def make(numbers):
        batches.append(numbers)
        return [RED] * len(numbers)

    requests = [{"prompt": prompt} for prompt in ("a", "b", "a", "A", "c", "b")]
    manifest = Manifest(tmp_path)
    add(manifest, requests[4])
    told = [(number, entry["file"], is_new) for number, entry, is_new in manifest.complete(requests, make, 2)]
    assert batches == [[0, 1], [3]]
    assert told == [
        (4, "c.png", False), (0, "a.png", True), (2, "a.png", False), (1, "b.png", True), (5, "b.png", False),
        (3, "a-2.png", True),
    ]  # fmt: skip


def test_names_do_not_collide(tmp_path):
    (tmp_path / "a-cat.png").write_bytes(b"of the user")
    manifest = Manifest(tmp_path)
    files = [add(manifest, {"prompt": "a cat", "seed": seed})["file"] for seed in range(2)]
    assert files == ["a-cat-2.png", "a-cat-3.png"] and (tmp_path / "a-cat.png").read_bytes() == b"of the user"


def test_a_file_that_is_gone_is_made_again(tmp_path):
    request = {"prompt": "a cat"}
    (tmp_path / add(Manifest(tmp_path), request)["file"]).unlink()
    assert Manifest(tmp_path).find(request) is None


def test_a_name_that_was_free_again_is_of_who_took_it_last(tmp_path):
    first, second = {"prompt": "a cat", "seed": 0}, {"prompt": "a cat", "seed": 1}
    (tmp_path / add(Manifest(tmp_path), first)["file"]).unlink()
    assert add(Manifest(tmp_path), second, BLUE)["file"] == "a-cat.png"
    manifest = Manifest(tmp_path)
    assert manifest.find(first) is None and manifest.find(second)["seed"] == 1
    assert add(manifest, first)["file"] == "a-cat-2.png"
    assert Manifest(tmp_path).find(first)["file"] == "a-cat-2.png" and Manifest(tmp_path).find(second) is not None


def test_a_run_that_was_killed(tmp_path):
    add(Manifest(tmp_path), {"prompt": "a cat"})
    with (tmp_path / "manifest.jsonl").open("a") as file:
        file.write('{"prompt": "a do')
    (tmp_path / f".{Manifest.key({'prompt': 'a dog'})}.partial").write_bytes(b"half")
    manifest = Manifest(tmp_path)
    assert not list(tmp_path.glob(".*.partial"))
    add(manifest, {"prompt": "a dog"})
    again = Manifest(tmp_path)
    assert again.find({"prompt": "a cat"}) and again.find({"prompt": "a dog"})


def test_a_run_that_was_killed_before_it_wrote_the_line(tmp_path):
    partial = tmp_path / f".{Manifest.key({'prompt': 'a cat'})}.partial"
    RED.save(partial, format="PNG")
    os.link(partial, tmp_path / "a-cat.png")
    assert add(Manifest(tmp_path), {"prompt": "a cat"})["file"] == "a-cat.png"
    assert len(lines(tmp_path)) == 1 and not list(tmp_path.glob("*-2.png"))


def test_what_others_write_into_the_folder_stays(tmp_path):
    (tmp_path / ".out.0123abcd.partial").mkdir()  # such as a conversion
    (tmp_path / ".movie.partial").write_bytes(b"half")
    add(Manifest(tmp_path), {"prompt": "a cat"})
    assert (tmp_path / ".out.0123abcd.partial").is_dir() and (tmp_path / ".movie.partial").is_file()


def test_separators_of_lines_in_a_prompt(tmp_path):
    request = {"prompt": "a\u2028b\x85c 🍎 \udcff"}
    add(Manifest(tmp_path), request)
    assert Manifest(tmp_path).find(request)


def test_a_manifest_that_is_damaged(tmp_path):
    add(Manifest(tmp_path), {"prompt": "a cat"})
    with (tmp_path / "manifest.jsonl").open("ab") as file:
        file.write(b'\xff\x00\n[]\n{"key": []}\n{"key": "a", "file": [1]}\n')
    assert Manifest(tmp_path).find({"prompt": "a cat"})


def test_a_name_that_another_run_takes_at_this_moment(tmp_path, monkeypatch):
    link = os.link

    def late(partial, path):
        if path.name == "a-cat.png":
            path.write_bytes(b"of another")
        link(partial, path)

    monkeypatch.setattr("os.link", late)
    assert add(Manifest(tmp_path), {"prompt": "a cat"})["file"] == "a-cat-2.png"
    assert (tmp_path / "a-cat.png").read_bytes() == b"of another"


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda *args: False)
    with pytest.raises(PermissionError, match="written"):
        Manifest(tmp_path)


def fill_the_disk(folder, size):
    """In a process of its own: files may have `size` bytes."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    manifest = Manifest(folder)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    noise = PIL.Image.frombytes("RGB", (40, 40), os.urandom(4800))
    add(manifest, {"prompt": "a dog", "notes": "" if size < 4000 else "long" * 8000}, noise)


@pytest.mark.parametrize("size", [1000, 6000], ids=["no room for the image", "no room for its line"])
def test_a_disk_that_is_full_leaves_nothing(tmp_path, size):
    add(Manifest(tmp_path), {"prompt": "a cat"})
    process = multiprocessing.get_context("fork").Process(target=fill_the_disk, args=(tmp_path, size))
    process.start()
    process.join(60)
    assert process.exitcode == 1
    assert {path.name for path in tmp_path.iterdir()} == {"manifest.jsonl", "a-cat.png"} and len(lines(tmp_path)) == 1


REQUESTS = [{"prompt": f"image {number}"} for number in range(12)]


def work(folder, begun, seconds):
    def make(numbers):
        begun.put(numbers)
        time.sleep(seconds)
        return [RED] * len(numbers)

    return list(Manifest(folder).complete(REQUESTS, make, 2))


def begin(folder, seconds=0.02):
    context = multiprocessing.get_context("fork")
    begun = context.Queue()
    process = context.Process(target=work, args=(folder, begun, seconds))
    process.start()
    return process, begun


def test_processes_share_the_work_of_a_folder(tmp_path):
    processes = [begin(tmp_path)[0] for _ in range(3)]
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert sorted(entry["prompt"] for entry in lines(tmp_path)) == sorted(entry["prompt"] for entry in REQUESTS)
    assert len(list(tmp_path.iterdir())) == 13


def test_who_holds_work_and_is_killed_blocks_nobody(tmp_path):
    holder, begun = begin(tmp_path, seconds=600)
    assert begun.get(timeout=60) == [0, 1]
    other, _ = begin(tmp_path)
    deadline = time.monotonic() + 60
    while not (tmp_path / "manifest.jsonl").exists() or len(lines(tmp_path)) < 10:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert other.is_alive()  # it waits for the two that the holder has claimed
    os.kill(holder.pid, signal.SIGKILL)
    other.join(60)
    assert other.exitcode == 0 and len(lines(tmp_path)) == 12 and len(list(tmp_path.iterdir())) == 13


def test_what_another_has_made_meanwhile(tmp_path):
    manifest, made = Manifest(tmp_path), []

    def make(numbers):
        if not made:
            made.append(list(Manifest(tmp_path).complete(REQUESTS[4:], lambda numbers: [BLUE] * len(numbers))))
        return [RED] * len(numbers)

    told = {number: is_new for number, _, is_new in manifest.complete(REQUESTS, make, 4)}
    assert [number for number in told if told[number]] == [0, 1, 2, 3] and len(told) == 12
    assert len(lines(tmp_path)) == 12


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_work_that_fails_leaves_no_claim(tmp_path, error):
    def make(numbers):
        raise error

    with pytest.raises(error):
        list(Manifest(tmp_path).complete(REQUESTS, make, 4))
    assert not list(Path(tmp_path).iterdir())


@pytest.mark.parametrize(
    "text, name",
    [
        ("𠀀" * 99, "𠀀" * 60),  # four bytes each
        ("Ein Kätzchen?", "ein-kätzchen"),
        ("../../etc", "etc"),
        ("猫", "猫"),
        ("!!!", "image"),
        ("🍎", "image"),
        ("a" * 99, "a" * 60),
        ("CON", "con-image"),
        ("LPT1", "lpt1-image"),
    ],
)
def test_names_of_prompts(tmp_path, text, name):
    assert slug(text) == name
    assert Path(add(Manifest(tmp_path), {"prompt": text})["file"]).stem == name


def test_no_file_is_open_when_it_gets_its_place_on_windows(tmp_path, monkeypatch):
    were_open: list[bool] = []

    def noting(move):
        def note_and_move(source, target):
            open_files = [os.path.realpath(file) for file in Path("/proc/self/fd").iterdir()]
            were_open.append(os.path.realpath(source) in open_files)
            move(source, target)

        return note_and_move

    monkeypatch.setattr(module, "fcntl", None)
    for name in ("link", "replace"):
        monkeypatch.setattr(os, name, noting(getattr(os, name)))
    add(Manifest(tmp_path), {"prompt": "a"})
    with whole_file(tmp_path / "results.json") as temporary:
        temporary.write_text("{}")
    assert were_open == [False, False]
    assert {path.name for path in tmp_path.iterdir()} == {"a.png", "manifest.jsonl", "results.json"}
