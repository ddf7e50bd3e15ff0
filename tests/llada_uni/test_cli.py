"""The command, as a stranger types it."""

import importlib.util
import json
import shlex
import signal
import socket
import subprocess
import sys

import PIL.Image
import pytest
import torch
import typer.core
import uvicorn

from diffusers_llada_uni import LLaDAUniPipeline
from diffusers_llada_uni.code_decoding import UPSCALES
from llada_uni.cli import app
from llada_uni.commands.images import Upscale
from llada_uni.commands.talk import HELP
from llada_uni.image_files import open_image
from llada_uni.serving.http_server import HTTPServer


@pytest.fixture
def run(run_command):
    return run_command


def pixels(path) -> bytes:
    return PIL.Image.open(path).tobytes()


def test_draw_once(run, tmp_path):
    assert "images/a-red-apple.png" in run("draw", "a red apple").stdout
    assert PIL.Image.open(tmp_path / "images" / "a-red-apple.png").size == (64, 64)
    before = (tmp_path / "images" / "manifest.jsonl").read_text()
    assert "was there" in run("draw", "a red apple").stdout
    assert (tmp_path / "images" / "manifest.jsonl").read_text() == before


def test_draw_a_file_of_prompts(run, tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    result = run("draw", "--prompts", "prompts.txt", "-n", "2", "--json", "-o", "out", "--batch-size", "3")
    entries = [json.loads(line) for line in result.stdout.splitlines()]
    assert [(entry["prompt"], entry["seed"]) for entry in entries] == [
        ("a cat", 0), ("a cat", 1), ("a dog", 0), ("a dog", 1),
    ]  # fmt: skip
    assert len({pixels(tmp_path / "out" / entry["file"]) for entry in entries}) == 4
    assert len((tmp_path / "out" / "manifest.jsonl").read_text().splitlines()) == 4


def test_what_is_rarely_set_reaches_the_pipeline(run, pipe, monkeypatch, tmp_path):
    call, seen = type(pipe).__call__, []
    monkeypatch.setattr(type(pipe), "__call__", lambda self, **given: seen.append(given) or call(self, **given))
    run("draw", "a cat", "--num-candidates", "2", "--temperature", "3", "--upscale", "1")
    run("draw", "a cat", "--thinking", "--max-thinking-tokens", "8", "--temperature", "0")
    run("draw", "a cat")
    assert seen[0]["num_candidates"] == 2 and seen[0]["upscale"] == 1
    assert seen[0]["generation_kwargs"] == {"do_sample": True, "temperature": 3.0}
    assert seen[1]["thinking_kwargs"] == {"max_new_tokens": 8}
    assert seen[1]["generation_kwargs"] == {"do_sample": False}
    assert not {"num_candidates", "upscale", "generation_kwargs", "thinking_kwargs"} & set(seen[2])
    assert "`--num-candidates`" in run("draw", "a cat", "--num-candidates", "2", "--temperature", "0", code=2).stderr


def test_an_interrupted_run_goes_on(run, pipe, monkeypatch, tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat\na dog\na cow\n")
    call, prompts = type(pipe).__call__, []

    def interrupted(self, prompt, **settings):
        prompts.append(prompt)
        if prompt == ["a dog"] and len(prompts) == 2:
            raise KeyboardInterrupt
        return call(self, prompt, **settings)

    monkeypatch.setattr(type(pipe), "__call__", interrupted)
    run("draw", "-p", "prompts.txt", "--batch-size", "1", code=130)
    result = run("draw", "-p", "prompts.txt", "--batch-size", "1")
    assert prompts == [["a cat"], ["a dog"], ["a dog"], ["a cow"]] and "was there" in result.stdout


def test_edit_fill_encode_decode_ask(run, tmp_path):
    run("draw", "a red apple", "-o", ".")
    run("edit", "make it green", "-i", "a-red-apple.png")
    mask = PIL.Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 32, 64))
    mask.save(tmp_path / "mask.png")
    run("fill", "a red apple", "-i", "a-red-apple.png", "--mask", "mask.png")
    assert {path.name for path in (tmp_path / "images").iterdir()} == {
        "manifest.jsonl", "make-it-green.png", "a-red-apple.png",
    }  # fmt: skip
    codes = run("encode", "a-red-apple.png").stdout
    entry = json.loads(codes)
    assert len(entry["codes"]) == entry["grid"][0] * entry["grid"][1]
    (tmp_path / "codes.jsonl").write_text(codes)
    assert "decoded/a-red-apple.png" in run("decode", "codes.jsonl", "-o", "decoded").stdout
    run("decode", "codes.jsonl", "-o", "large", "--upscale", "3")
    sides = [PIL.Image.open(tmp_path / folder / "a-red-apple.png").width for folder in ("decoded", "large")]
    assert sides == [64, 96]
    answer = json.loads(run("ask", "What is this?", "-i", "a-red-apple.png", "--json").stdout)
    assert answer["answer"] == run("ask", "What is this?", "-i", "a-red-apple.png").stdout.rstrip("\n") != ""


def test_an_image_that_has_changed_is_edited_anew(run, tmp_path):
    source = tmp_path / "source.png"
    PIL.Image.new("RGB", (64, 64), "red").save(source)
    assert "was there" not in run("edit", "make it green", "-i", "source.png").stdout
    assert "was there" in run("edit", "make it green", "-i", "source.png").stdout
    PIL.Image.new("RGB", (64, 64), "blue").save(source)
    assert "make-it-green-2.png" in run("edit", "make it green", "-i", "source.png").stdout


def test_questions_have_seeds_of_their_own(run, tmp_path):
    rows = [{"prompt": "What is this?", "seed": seed} for seed in (1, 2, 1)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    result = run("ask", "-p", "rows.jsonl", "--temperature", "3", "--max-new-tokens", "16", "--json")
    answers = [json.loads(line)["answer"] for line in result.stdout.splitlines()]
    assert answers[0] == answers[2] != answers[1]


def test_a_photograph_is_turned_upright(tmp_path):
    image, exif = PIL.Image.new("RGB", (6, 4)), PIL.Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "photo.jpg", exif=exif)
    assert open_image(str(tmp_path / "photo.jpg")).size == (4, 6)


def test_a_conversation_that_has_become_too_long(run):
    assert "positions" in run("chat", "--max-new-tokens", "4", input="word " * 2000 + "\nhello\n", code=2).stderr


def test_chat(run, pipe):
    expected = pipe.chat([{"role": "user", "content": "hello"}], max_new_tokens=16)
    result = run("chat", "--max-new-tokens", "16", input="\ufeffhello\n/new\n\nhello\n/what\n/quit\nhello\n")
    said = result.stdout.splitlines()
    assert said[:2] == [expected, expected]
    assert said[2].startswith("/image PATH") and len(said) == 2 + len(HELP.splitlines())
    result = run("chat", "--max-new-tokens", "16", input="hello\n/image nothing.png\nhello\n", code=2)
    assert result.stdout == f"{expected}\n" and "there is no file nothing.png" in result.stderr


def test_prompts_and_codes_that_cannot_be_drawn_are_told_before_the_first_is(run, tmp_path):
    (tmp_path / "long.txt").write_text("a cat\n" + "word " * 2000 + "\na dog\n")
    assert "Prompt 2 ('word word" in run("draw", "-p", "long.txt", code=2).stderr
    codes = {"grid": [4, 4], "codes": [1] * 16}
    rows = [codes, {**codes, "codes": [99_999] * 16}]
    (tmp_path / "codes.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8-sig")
    assert "Image 2: `codes` must lie in 0..1023, got 99999" in run("decode", "codes.jsonl", code=2).stderr
    assert not list(tmp_path.rglob("*.png"))


def test_a_story_of_nothing(run, pipe, monkeypatch, tmp_path):
    monkeypatch.setattr(pipe, "interleave", lambda *args, **settings: [])
    result = run("story", "tell me", "-o", "told", code=1)
    assert "the model has told nothing" in result.stderr and not result.stdout and not (tmp_path / "told").exists()


@pytest.mark.parametrize("page", ["md", "html"])
def test_story(run, tmp_path, page):
    path = run("story", "Tell a story about a cat.", "-f", page, "--max-images", "1").stdout.strip()
    text = (tmp_path / path).read_text()
    assert "Tell a story about a cat" in text
    assert "`--output` names another" in run("story", "another", code=2).stderr


def test_info(run):
    described = json.loads(run("info", "--json").stdout)
    assert described["components"]["model"]["class"] == "LLaDAUniForConditionalGeneration"
    assert described["components"]["model"]["parameters"] > 9e6
    assert any("main memory" in line for line in described["advice"])
    assert "vae" in run("info").stdout and not run.loads


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["draw"], "Give a prompt"),
        (["draw", "a", "-p", "b.txt"], "Give a prompt"),
        (["draw", "a", "--size", "large"], "`size`"),
        (["draw", "a", "-m", "no/such/folder"], "`model` 'no/such/folder'"),
        (["draw", "a", "--size", "²x²"], "`size`"),
        (["draw", "a", "-o", "/dev/null"], "/dev/null"),
        (["draw", "-p", "none.txt"], "`none.txt`: there is no such file"),
        (["draw", "-p", "model"], "`model`: this is a folder, and no file."),
        (["decode", "model"], "`model`: this is a folder, and no file."),
        (["edit", "make it red", "-i", "model"], "`image`: model is a folder"),
        (["draw", "a", "-m", "Emoji"], "Did you mean `emoji`?"),
        (["draw", "a", "-m", "adapter"], "is an adapter (LoRA)"),
        (["serve", "--host", "0.0.0.0"], "`--api-key`"),
        (["serve", "--host", "::"], "`--no-api-key`"),
        (["serve", "--host", ""], "`--no-api-key`"),
        (["serve", "--api-key", "secret", "--no-api-key"], "exclude each other"),
        (["edit", "make it red", "-i", "broken.png"], "broken.png is no image"),
        (["edit", "-p", "rows.jsonl", "-i", "small.png"], "`--image` and `--mask` are for one prompt"),
        (["fill", "a", "-i", "small.png", "--mask", "large.png"], "must be as large as the image, 4 x 4"),
        (["ask", "-p", "rows.jsonl"], "`mask` is for `fill`"),
        (["ask", "-p", "rows.jsonl", "-i", "small.png"], "`--image` and `--mask` are for one question"),
        (["story", "a", "-o", "/dev/null/story"], "/dev/null"),
        (["decode", "broken.png"], "broken.png, line 1"),
        (["decode", "negative.jsonl"], "negative.jsonl, line 1"),
        (["info", "model"], "model.safetensors is damaged"),
        (["serve", "--api-key", ""], "`api_key`"),
        (["edit", "make it red"], "`image` is missing"),
        (["edit", "make it red", "-i", "none.png"], "no file none.png"),
        (["fill", "a cat", "-i", "none.png"], "`mask` is missing"),
        (["ask"], "Give a question"),
        (["ask", "what?", "-i", "none.png"], "no file none.png"),
        (["decode", "none.jsonl"], "`none.jsonl`: there is no such file"),
        (["info", "none"], "`model` 'none'"),
        (["consolidate", "none", "out"], "`checkpoint`"),
        (["convert", "none", "out"], "The source none is not a folder"),
        (["convert", "model", "model"], "exists already"),
        (["convert", "model", "out"], "model_type"),
        (["convert", "model", "out", "--decoder", "x"], "`decoder` must be one of"),
        (["convert", "model", "out", "--dtype", "x"], "`dtype` must be one of"),
        (["decode", "huge.jsonl"], "huge.jsonl, line 1"),
    ],
)
def test_a_mistake_is_a_sentence(run, tmp_path, arguments, words):
    (tmp_path / "broken.png").write_bytes(b"\xff\n")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "image": "small.png", "mask": "small.png"}\n')
    (tmp_path / "negative.jsonl").write_text('{"grid": [-1, -2], "codes": [0, 0]}\n')
    (tmp_path / "huge.jsonl").write_text(f'{{"grid": [1, 1], "codes": [{10**30}]}}\n')
    (tmp_path / "model").mkdir()
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"half")
    for name, side in (("small.png", 4), ("large.png", 8)):
        PIL.Image.new("RGB", (side, side)).save(tmp_path / name)
    result = run(*arguments, code=2)
    assert words in result.stderr and "Traceback" not in result.stderr and len(result.stderr.splitlines()) == 1
    assert not run.loads


@pytest.mark.parametrize(
    "arguments, hint",
    [
        (["draw", "a", "red", "apple"], 'draw "a red apple"`'),
        (["ask", "What is this?", "photo.png"], "`--image photo.png`"),
        (["story", "a", "cat"], 'story "a cat"`'),
        (["-m", "emoji", "draw", "a"], "`llada-uni draw -m ...`"),
        (["--model=emoji", "draw", "a"], "`llada-uni draw --model ...`"),
    ],
)
def test_what_is_typed_otherwise_than_it_is_meant(run, arguments, hint):
    assert hint in run(*arguments, code=2).stderr


def test_what_a_server_lacks_is_told_before_a_model_is_loaded(run, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        told = run("serve", "--port", str(taken.getsockname()[1]), code=2).stderr
    assert "ddress already in use" in told and "Traceback" not in told and not run.loads
    told = run("serve", "--host", "no host", "--no-api-key", code=2).stderr
    assert "llada-uni: `host` 'no host' is no address of this machine: " in told and not run.loads
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "transformers_llada_uni.optional_dependencies.find_spec",
        lambda name: None if name == "uvicorn" else find(name),
    )
    assert '`uvicorn` not installed: pip install "llada-uni[serve]"' in run("serve", code=2).stderr
    assert not run.loads


def test_a_second_signal_waits_for_nobody(monkeypatch):
    ends = []
    monkeypatch.setattr("os._exit", ends.append)
    server = HTTPServer(uvicorn.Config(None))
    server.handle_exit(signal.SIGTERM, None)
    assert server.should_exit and not ends
    server.handle_exit(signal.SIGTERM, None)
    assert ends == [128 + signal.SIGTERM]


@pytest.mark.parametrize(
    "host, options, is_served",
    [
        ("localhost", [], True),
        ("::1", [], True),
        ("[::1]", [], True),
        ("127.0.0.2", [], True),
        ("0.0.0.0", ["--no-api-key"], True),
    ]
    + [("0.0.0.0", ["--api-key", "secret"], True), ("192.168.0.2", [], False), ("my-host", [], False)],
)
def test_the_network_is_not_let_in_without_a_key(run, monkeypatch, host, options, is_served):
    served = []
    monkeypatch.setattr("llada_uni.commands.serve.run_server", lambda pipe, host, *_, **settings: served.append(host))
    monkeypatch.setattr("llada_uni.commands.serve.check_can_listen", lambda *_: None)
    run("serve", "--host", host, *options, code=0 if is_served else 2)
    assert served == [host.strip("[]")] * is_served and len(run.loads) == is_served


MISTAKES = """
import sys
from llada_uni.cli import main
for words in WORDS:
    try:
        main(words)
        sys.exit(f"{words} is no mistake")
    except SystemExit as end:
        if end.code != 2 or "torch" in sys.modules:
            sys.exit(f"{words}: {end.code}, torch {'torch' in sys.modules}")
"""


def test_mistakes_are_told_before_torch_is_imported(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "broken.png").write_bytes(b"\xff\n")
    PIL.Image.new("RGB", (4, 4)).save(tmp_path / "small.png")
    words = [
        ["draw", "a", "-m", "Emoji"],
        ["draw", "-p", "none.txt"],
        ["decode", "broken.png"],
        ["encode", "none.png"],
    ]
    words += [["edit", "a", "-i", image] for image in ("none.png", "folder", "broken.png")]
    words += [["fill", "a", "-i", "small.png", "--mask", mask] for mask in ("none.png", "folder")]
    words += [["ask", "a", "-i", "none.png"], ["ask", "a", "-m", "folder"], ["chat", "-m", "folder"]]
    words += [
        ["draw", "a", "--max-thinking-tokens", "5"],
        ["story", " "],
        ["story", "\ud800"],
        ["story", "a", "--size", "64"],
    ]
    words += [["draw", "a", "--num-candidates", "2", "--temperature", "0"]]
    words += [["fill", "a", "-i", "small.png", "--mask", "small.png", "--num-candidates", "2", "--temperature", "0"]]
    words += [["story", "a", "-i", "none.png"], ["story", "a", "-m", "folder"], ["story", "a", "-o", "folder"]]
    words += [
        ["convert", "none", "out"],
        ["convert", "folder", "folder"],
        ["convert", "folder", "out", "--dtype", "x"],
    ]
    words += [["serve", "--host", "0.0.0.0"], ["serve", "-m", "folder"], ["draw", "a", "--size", "large"]]
    words += [
        ["evaluate", *task, "-m", "folder"] for task in (["questions", "x"], ["likelihood", "x"], ["lm-eval", "x"])
    ]
    code = MISTAKES.replace("WORDS", repr(words))
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert len([line for line in done.stderr.splitlines() if line.startswith("llada-uni: ")]) == len(words)


def test_help_comes_at_once():
    code = "import sys; from llada_uni.cli import app; print('torch' in sys.modules, 'transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def commands_of(group, name="llada-uni"):
    yield name, group
    for word, command in getattr(group, "commands", {}).items():
        yield from commands_of(command, f"{name} {word}")


def test_every_command_and_option_is_explained():
    """A command says what it does, in a line that the list of them has room for; each of its options what it is."""
    commands = dict(commands_of(typer.main.get_command(app)))
    assert len(commands) > 25
    for name, command in commands.items():
        assert command.help, name
        if isinstance(command, typer.core.TyperGroup):  # a line that is cut ends in dots
            listed = command.get_help(typer.Context(command, info_name=name)).partition("Commands:")[2]
            assert listed and "..." not in listed, listed
        for parameter in command.params:
            assert getattr(parameter, "help", None), f"{name} {parameter.name}"
    for name in ("draw", "edit", "fill", "ask"):
        (prompts,) = (option for option in commands[f"llada-uni {name}"].params if option.name == "prompts")
        assert "Text has one in each line; JSON, JSONL, CSV and parquet" in prompts.help
    (upscale,) = Upscale.__metadata__
    assert tuple(range(upscale.min, upscale.max + 1)) == UPSCALES


@pytest.mark.parametrize("command", [[], ["evaluate"], ["train"]])
def test_a_command_alone_shows_its_help(run, command):
    assert "Commands:" in run(*command, code=2).output


def test_memory_that_does_not_suffice(run, monkeypatch):
    def draw(self, **settings):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(LLaDAUniPipeline, "__call__", draw)
    assert "memory does not suffice" in run("draw", "a", code=2).stderr


def test_an_image_that_is_too_large_is_refused_in_words_of_its_size(run):
    assert run("draw", "a", "--size", "64x4096", code=2).stderr.endswith("this model draws at most 192 x 192.\n")


def test_errors_of_ours_keep_their_traceback(run, monkeypatch):
    def draw(self, **settings):
        raise RuntimeError("a tensor does not fit")

    monkeypatch.setattr(LLaDAUniPipeline, "__call__", draw)
    assert isinstance(run("draw", "a", code=1).exception, RuntimeError)


CLOSED = """
import os, sys
from llada_uni import cli, pipeline_loading
from llada_uni.cli import main
for words in (["draw", "a cat"], ["draw", "-p", "-"], ["info"], ["chat"]):
    try:
        main(words)
        print(words, 0, file=LOG)
    except SystemExit as end:
        print(words, end.code, file=LOG)
"""


def test_streams_that_are_closed(tmp_path):
    """`llada-uni ... <&- >&- 2>&-`: nothing is asked of them, and no file that is opened takes their place."""
    code = f"LOG = open('log.txt', 'w')\n{CLOSED}"
    command = f"{shlex.quote(sys.executable)} -c {shlex.quote(code)} <&- >&- 2>&-"
    assert subprocess.run(["bash", "-c", command], cwd=tmp_path, timeout=300).returncode == 0
    assert [line.split()[-1] for line in (tmp_path / "log.txt").read_text().splitlines()] == ["0", "2", "0", "0"]
    assert PIL.Image.open(tmp_path / "images" / "a-cat.png").size == (64, 64)
    assert {path.name for path in (tmp_path / "images").iterdir()} == {"a-cat.png", "manifest.jsonl"}


def test_a_reader_that_goes(tmp_path):
    """`llada-uni ... | head -1`"""
    (tmp_path / "prompts.txt").write_text("a cat\na dog\na cow\n")
    command = (
        f"set -o pipefail; {shlex.quote(sys.executable)} -m llada_uni.cli draw -p prompts.txt --batch-size 1 | true"
    )
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and "Traceback" not in done.stderr
