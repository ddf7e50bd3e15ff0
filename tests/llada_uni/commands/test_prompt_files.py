"""Files of prompts, as people write them."""

import csv
import io
import json

import pyarrow
import pyarrow.parquet
import pytest

from llada_uni.commands.prompt_files import PromptRow, read_prompts, requests_of


ROWS = [
    {"prompt": "a red apple", "seed": 3},
    {"prompt": "make it green", "image": "apple.png"},
    {"prompt": "both", "image": ["a.png", "b.png"], "mask": "m.png"},
]


def wanted(folder) -> list[PromptRow]:
    return [
        PromptRow("a red apple", seed=3),
        PromptRow("make it green", (f"{folder}/apple.png",)),
        PromptRow("both", (f"{folder}/a.png", f"{folder}/b.png"), f"{folder}/m.png"),
    ]


def test_lines_of_text(tmp_path):
    path = tmp_path / "prompts.txt"
    text = "\ufeffa red apple\r\n \r\n  eine Kätzchen, 'so'  \n🍎\ra\x85b\u2028c"
    path.write_bytes(text.encode())
    prompts = ["a red apple", "eine Kätzchen, 'so'", "🍎", "a\x85b\u2028c"]
    assert read_prompts(str(path)) == [PromptRow(prompt) for prompt in prompts]


def test_jsonl(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    assert read_prompts(str(path)) == wanted(tmp_path)
    path.write_text(json.dumps({"prompt": "a\u2028b"}, ensure_ascii=False), encoding="utf-8")
    assert read_prompts(str(path)) == [PromptRow("a\u2028b")]


def test_csv(tmp_path):
    path = tmp_path / "prompts.csv"
    path.write_text('prompt,image,seed\n"a, red\napple",,3\nmake it green,apple.png,\n')
    assert read_prompts(str(path)) == [PromptRow("a, red\napple", seed=3), wanted(tmp_path)[1]]


@pytest.mark.parametrize("delimiter", ",;\t")
def test_csv_of_spreadsheets(tmp_path, delimiter):
    path, rows = tmp_path / "prompts.csv", [["prompt", "seed"], ["a cat, a dog; 2", "3"]]
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows(rows)
    assert read_prompts(str(path)) == [PromptRow("a cat, a dog; 2", seed=3)]


def test_json(tmp_path):
    path = tmp_path / "prompts.json"
    path.write_text(json.dumps(["a cat", {"prompt": "a dog", "seed": 1}], indent=2))
    assert read_prompts(str(path)) == [PromptRow("a cat"), PromptRow("a dog", seed=1)]


def test_a_long_prompt(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("long " * 20_000)
    assert read_prompts(str(path)) == [PromptRow(("long " * 20_000).strip())]


def test_parquet(tmp_path):
    path = tmp_path / "prompts.parquet"
    rows = [{"prompt": "a red apple", "image": None, "seed": 3.0}, {"prompt": "x", "image": ["a.png"], "seed": None}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    assert read_prompts(str(path)) == [PromptRow("a red apple", seed=3), PromptRow("x", (f"{tmp_path}/a.png",))]


def test_blank_rows_of_a_spreadsheet(tmp_path):
    path = tmp_path / "prompts.csv"
    path.write_text("prompt;seed\na cat;3\n;\na dog;\n\n")
    assert read_prompts(str(path)) == [PromptRow("a cat", seed=3), PromptRow("a dog")]


def test_a_prompt_and_a_file_of_prompts(tmp_path):
    with pytest.raises(ValueError, match="Give a prompt or `--prompts`, and not both"):
        requests_of("draw", "a cat", str(tmp_path / "prompts.txt"))


def test_an_image_that_is_missing_is_told_with_its_row(tmp_path):
    path = tmp_path / "prompts.csv"
    path.write_text("prompt,image\nwhat?,none.png\n")
    with pytest.raises(ValueError, match="prompts.csv, row 1: `image`: there is no file"):
        requests_of("ask", None, str(path))


@pytest.mark.parametrize("header", ["prompt;seed", "seed,prompt", '"prompt",image'])
def test_a_table_from_standard_input(monkeypatch, header):
    delimiter = ";" if ";" in header else ","
    rows = [["", "a cat"], ["", "a dog"]] if header.startswith("seed") else [["a cat", ""], ["a dog", ""]]
    text = "\n".join([header, *map(delimiter.join, rows)])
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    assert read_prompts("-") == [PromptRow("a cat"), PromptRow("a dog")]


@pytest.mark.parametrize("text", ["a cat\na dog\n", '{"prompt": "a cat"}\n{"prompt": "a dog"}\n'])
def test_standard_input(monkeypatch, text):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xef\xbb\xbf" + text.encode())))
    assert read_prompts("-") == [PromptRow("a cat"), PromptRow("a dog")]


@pytest.mark.parametrize("content, words", [(b"a \xff", "is no text in UTF-8"), (b"\n", "holds no prompts")])
def test_standard_input_that_cannot_be_read(monkeypatch, content, words):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))
    with pytest.raises(ValueError, match=f"standard input {words}"):
        read_prompts("-")


@pytest.mark.parametrize(
    "name, text, words",
    [
        ("p.txt", "\n\n", "p.txt holds no prompts"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": }\n', "p.jsonl, row 2 is no JSON"),
        ("p.jsonl", '{"text": "a"}\n', "p.jsonl, row 1 has `text`; known are prompt"),
        ("p.jsonl", '{"seed": 1}\n', "p.jsonl, row 1 has no `prompt`"),
        ("p.jsonl", '{"prompt": 3}\n', "p.jsonl, row 1: `prompt` must be a text, got 3"),
        ("p.csv", "prompt,seed\na,1\n,\nb,x\n", "p.csv, row 3: `seed`"),
        ("p.csv", "prompt,seed\n,\n", "p.csv holds no prompts"),
        ("p.jsonl", "[1]\n", "p.jsonl, row 1 must be an object"),
        ("p.jsonl", '{"prompt": "a", "seed": "x"}\n', "p.jsonl, row 1: `seed`"),
        ("p.jsonl", '{"prompt": "a", "image": [3]}\n', "p.jsonl, row 1: `image`"),
        ("p.jsonl", '{"prompt": "a", "mask": 3}\n', "p.jsonl, row 1: `mask`"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": " "}\n', "p.jsonl, row 2 has no `prompt`"),
        ("p.jsonl", '{"prompt": "\\ud83d"}\n', "p.jsonl, row 1: `prompt` holds half a character"),
        ("p.jsonl", '{"prompt": "a", "seed": -1}\n', "p.jsonl, row 1: `seed`"),
        ("p.jsonl", '{"prompt": "a", "seed": 1.5}\n', "p.jsonl, row 1: `seed`"),
        ("p.jsonl", '{"prompt": "a", "seed": true}\n', "p.jsonl, row 1: `seed`"),
        ("p.jsonl", '{"prompt": "a", "seed": 9223372036854775808}\n', "p.jsonl, row 1: `seed`"),
        ("p.csv", "caption\na cat\n", "p.csv, row 1 has `caption`"),
        ("p.csv", "prompt\na cat, a dog\n", "p.csv, row 1 has more cells"),
        ("p.csv", "prompt\n" + "a" * 200_000, "p.csv is no CSV"),
        ("p.txt", "a k\xe4tzchen".encode("latin-1"), "p.txt is no text in UTF-8"),
        ("p.jsonl", "a cat".encode("utf-16"), "p.jsonl is no text in UTF-8"),
        ("p.parquet", "a cat", "p.parquet|Parquet"),
        ("p.json", '{"prompt": "a"}', "p.json must be a list"),
        ("p.json", "[" * 100_000, "p.json is no JSON"),
        ("p.jsonl", '{"prompt": "a", "image": {"x": 1}}\n', "p.jsonl, row 1: `image`"),
    ],
)
def test_what_cannot_be_read(tmp_path, name, text, words):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=words):
        read_prompts(str(path))
