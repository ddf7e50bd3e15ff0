"""Datasets by every kind of name; splits that are meant, and those that are not there."""

import gzip
import json
import shutil

import pytest
from datasets import Dataset, DatasetDict, IterableDataset
from PIL import Image

from transformers_llada_uni.training.data.dataset_loading import load_training_dataset, only_dataset, split_of


ROWS = [{"text": "one"}, {"text": "two"}]
JSON_LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working directory, with rows in files of every kind."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("data", "data/deep", "train-and-test"):
        (tmp_path / name).mkdir()
    (tmp_path / "rows.jsonl").write_text(JSON_LINES)
    (tmp_path / "data" / "rows.jsonl").write_text(JSON_LINES)
    (tmp_path / "data" / "deep" / "rows.jsonl").write_text(JSON_LINES)
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(JSON_LINES.encode()))
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    (tmp_path / "rows.csv").write_text("text\none\ntwo\n")
    Dataset.from_list(ROWS).to_parquet(tmp_path / "rows.parquet")
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    DatasetDict(train=Dataset.from_list(ROWS), test=Dataset.from_list(ROWS[:1])).save_to_disk(
        tmp_path / "saved-splits"
    )
    for name in ("train", "test"):
        (tmp_path / "train-and-test" / f"{name}.jsonl").write_text(JSON_LINES)
    (tmp_path / "broken.jsonl").write_text('{"text": "one"}\n{"text": \n')
    return tmp_path


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("rows.jsonl", {"train": 2}),
        ("./rows.jsonl", {"train": 2}),
        ("{folder}/rows.json", {"train": 2}),
        ("rows.jsonl.gz", {"train": 2}),
        ("rows.csv", {"train": 2}),
        ("rows.parquet", {"train": 2}),
        ("data/rows.jsonl", {"train": 2}),
        ("data/*.jsonl", {"train": 2}),
        ("data/**/*.jsonl", {"train": 4}),
        ("{folder}/*/rows.jsonl", {"train": 2}),
        ("train-and-test", {"train": 2, "test": 2}),
        ("saved", {"train": 2}),
        ("saved-splits", {"train": 2, "test": 1}),
    ],
)
def test_files_and_folders_are_read(folder, name, sizes):
    data = load_training_dataset(name.format(folder=folder))
    assert {split: len(rows) for split, rows in data.items()} == sizes
    assert data["train"][:2]["text"] == ["one", "two"]


def test_images_with_captions_are_images_whatever_lies_beside_them(folder):
    """`datasets` alone would read the texts, as there are as many of them."""
    (folder / "images").mkdir()
    for name, color in (("a.jpg", "red"), ("b.png", "blue")):
        Image.new("RGB", (8, 8), color).save(folder / "images" / name)
        (folder / "images" / name).with_suffix(".txt").write_text("old words")
    lines = [json.dumps({"file_name": name, "caption": name}) for name in ("a.jpg", "b.png")]
    (folder / "images" / "metadata.jsonl").write_text("\n".join(lines))
    rows = load_training_dataset("images")["train"]
    assert sorted(rows.column_names) == ["caption", "image"] and sorted(rows["caption"]) == ["a.jpg", "b.png"]


def test_files_are_streamed(folder):
    data = load_training_dataset("rows.jsonl", streaming=True)
    assert isinstance(data["train"], IterableDataset) and list(data["train"]) == ROWS


@pytest.mark.parametrize(
    ("name", "settings", "error", "message"),
    [
        ("row.jsonl", {}, FileNotFoundError, "there is no file 'row.jsonl'"),
        ("data/row.parquet", {}, FileNotFoundError, "there is no file 'data/row.parquet'"),
        ("nothing/*.jsonl", {}, FileNotFoundError, r"there is no file 'nothing/\*.jsonl'"),
        ("./nothing", {}, FileNotFoundError, "there is no folder './nothing'"),
        ("a/folder/deep", {}, FileNotFoundError, "there is no folder 'a/folder/deep'"),
        ("broken.jsonl", {}, ValueError, "'broken.jsonl' cannot be read: JSON parse error: .* in row 1"),
        ("saved", {"streaming": True}, ValueError, "`streaming`: 'saved'"),
    ],
)
def test_what_is_not_there_is_named(folder, name, settings, error, message):
    with pytest.raises(error, match=message):
        load_training_dataset(name, **settings)


def test_the_only_split_is_taken():
    rows = Dataset.from_list(ROWS)
    assert only_dataset("train_dataset", rows) is rows
    assert only_dataset("train_dataset", DatasetDict(anything=rows)) is rows
    with pytest.raises(ValueError, match=r"`train_dataset` has 2 splits.*train_dataset\['a'\], train_dataset\['b'\]"):
        only_dataset("train_dataset", DatasetDict(a=rows, b=rows))
    with pytest.raises(TypeError, match="`train_dataset` must be a `datasets.Dataset`.*got list"):
        only_dataset("train_dataset", ROWS)


def test_a_split_by_name():
    data = DatasetDict(train=Dataset.from_list(ROWS), valid=Dataset.from_list(ROWS))
    assert split_of(data, "valid", "dataset_test_split") is data["valid"]
    with pytest.raises(ValueError, match="`dataset_test_split`: the data has no split 'test', only 'train', 'valid'"):
        split_of(data, "test", "dataset_test_split")


@pytest.mark.parametrize("streaming", [False, True])
def test_images_with_texts_beside_them(tmp_path, streaming):
    names = ["0.png", "1.PNG", "2.jpg", "deep/a cat.JPEG", "5.webp"]
    (tmp_path / "deep").mkdir()
    for number, name in enumerate(names):
        Image.new("RGB", (90, 40 + number), "red").save(tmp_path / name)
        (tmp_path / name).with_suffix(".txt").write_text(f"ein Stück {number}\n", encoding="utf-8")
    (rows,) = load_training_dataset(str(tmp_path), streaming=streaming).values()
    found = {(row["image"].size[1] - 40, row["caption"]) for row in rows}
    assert found == {(number, f"ein Stück {number}") for number in range(len(names))}

    (tmp_path / ".hidden.png").write_bytes(b"of a program")
    (tmp_path / "0.txt").write_text("ein Stück 0", encoding="utf-8-sig")
    (tmp_path / "test").mkdir()
    for suffix in (".png", ".txt"):
        (tmp_path / f"0{suffix}").rename(tmp_path / "test" / f"0{suffix}")
    splits = load_training_dataset(str(tmp_path), streaming=streaming)
    assert {name: len(list(rows)) for name, rows in splits.items()} == {"train": 4, "test": 1}
    assert next(iter(splits["test"]))["caption"] == "ein Stück 0"

    (tmp_path / "1.txt").write_bytes("Stück".encode("latin-1"))
    with pytest.raises(ValueError, match=r"`dataset_name`: .*1\.txt' is no text in UTF-8"):
        load_training_dataset(str(tmp_path))
    (tmp_path / "1.txt").write_text("one")
    (tmp_path / "2.txt").unlink()
    with pytest.raises(ValueError, match=r"`dataset_name`: .*2\.jpg' has no 2\.txt beside it"):
        load_training_dataset(str(tmp_path))
    shutil.rmtree(tmp_path / "test")
    lines = [json.dumps({"file_name": name, "caption": "one"}) for name in names[1:]]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    assert set(load_training_dataset(str(tmp_path))["train"]["caption"]) == {"one"}
