"""`llada-uni evaluate`, as a stranger types it, with the emoji model and models and data of his own."""

import json
from pathlib import Path

import PIL.Image
import pytest
import torch
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, PreTrainedTokenizerFast

from diffusers_llada_uni import embedded_checkpoint
from llada_uni.commands.evaluate_runs import table_of
from llada_uni.image_files import open_image
from transformers_llada_uni.evaluation import completion_likelihood, evaluate_visual_question_answering
from transformers_llada_uni.evaluation.visual_question_answering import SHORT_ANSWER


@pytest.fixture
def run(run_command, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return run_command


def write_rows(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def results_of(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> str:
    """A tiny CLIP in the place of OpenAI's."""
    folder = tmp_path_factory.mktemp("clip")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(embedded_checkpoint("emoji") / "processor")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": len(tokenizer), "max_position_embeddings": 64}
    torch.manual_seed(0)
    config = CLIPConfig(
        text_config=text, vision_config={**sizes, "image_size": 32, "patch_size": 16}, projection_dim=8
    )
    CLIPModel(config).save_pretrained(folder)
    size = {"height": 32, "width": 32}
    image_processor = CLIPImageProcessor(size=size, crop_size=size, do_center_crop=False)
    CLIPProcessor(image_processor, tokenizer).save_pretrained(folder)
    return str(folder)


def test_images_and_their_scores(run, clip, tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    (tmp_path / "my_metrics.py").write_text(
        "def redness(prompts, images):\n    return [image.getpixel((0, 0))[0] / 255 for image in images]\n"
    )
    for color in ("red", "blue"):
        (tmp_path / "reference").mkdir(exist_ok=True)
        PIL.Image.new("RGB", (32, 32), color).save(tmp_path / "reference" / f"{color}.png")
    run("draw", "a cat", "-o", "made")
    options = ["--clip", clip, "--reference", "reference", "--features", clip, "--metric", "my_metrics.redness"]
    table = run("evaluate", "images", "-p", "prompts.txt", "-o", "made", *options).stdout
    assert [line.split()[0] for line in table.splitlines()] == ["redness", "clip_score", "frechet_distance", "images"]
    written = results_of(tmp_path / "made")
    assert len(written["results"]["clip_score"]["scores"]) == written["results"]["images"] == 2
    assert written["model"] == "emoji" and written["settings"] == {"num_steps_per_block": 8}
    assert f"{written['results']['clip_score']['mean']:.4f}" in table
    # What `draw` had made was not made again, and neither is anything now.
    assert len((tmp_path / "made" / "manifest.jsonl").read_text().splitlines()) == 2
    again = run("evaluate", "images", "-p", "prompts.txt", "-o", "made", "--clip", clip, "--json").stdout
    assert json.loads(again)["results"]["clip_score"] == written["results"]["clip_score"]
    assert len((tmp_path / "made" / "manifest.jsonl").read_text().splitlines()) == 2


def test_questions(run, pipe, tmp_path, monkeypatch):
    PIL.Image.new("RGB", (64, 64), "red").save(tmp_path / "red.png")
    rows = [{"image": "red.png", "question": "What is this?", "answers": ["red"]}] * 2
    rows += [{"image": "red.png", "question": "Is it a cat?", "answers": ["no", "no", "yes"]}]
    data, arguments = write_rows(tmp_path / "rows.jsonl", rows), ["-o", "out", "--max-new-tokens", "8"]
    shown = [{**row, "image": open_image(str(tmp_path / "red.png"))} for row in rows]
    wanted = evaluate_visual_question_answering(
        pipe.model, pipe.processor, shown, max_new_tokens=8, show_progress_bar=False
    )
    table = run("evaluate", "questions", data, *arguments).stdout
    assert table.splitlines() == [f"accuracy   {wanted['accuracy']:.4f}", "questions  3"]
    entries = [json.loads(line) for line in (tmp_path / "out" / "manifest.jsonl").read_text().splitlines()]
    assert [entry["answer"] for entry in entries] == wanted["predictions"][1:]
    # Goes on: nothing is asked again.
    monkeypatch.setattr(type(pipe.model), "generate", None)
    assert run("evaluate", "questions", data, *arguments).stdout == table


def test_several_answers_in_the_cell_of_a_table(run, pipe, tmp_path):
    PIL.Image.new("RGB", (64, 64), "red").save(tmp_path / "red.png")
    cells = ['"[""a"", ""b"", ""[c""]"', '"[2, {""answer"": ""two""}]"']
    lines = [f"red.png,What is this {number}?,{cell}\n" for number, cell in enumerate(cells)]
    (tmp_path / "rows.csv").write_text("".join(["image,question,answers\n", *lines]))
    run("evaluate", "questions", str(tmp_path / "rows.csv"), "-o", "out", "--max-new-tokens", "8")
    entries = [json.loads(line) for line in (tmp_path / "out" / "manifest.jsonl").read_text().splitlines()]
    assert [entry["answers"] for entry in entries] == [["a", "b", "[c"], ["2", "two"]]


def test_answers_of_a_table_are_numbers_or_no_list(run, tmp_path):
    PIL.Image.new("RGB", (64, 64), "red").save(tmp_path / "red.png")
    (tmp_path / "rows.csv").write_text("image,question,answers\nred.png,How many?,2\n")
    run("evaluate", "questions", str(tmp_path / "rows.csv"), "-o", "out", "--max-new-tokens", "8")
    (entry,) = [json.loads(line) for line in (tmp_path / "out" / "manifest.jsonl").read_text().splitlines()]
    assert entry["answers"] == ["2"]
    loads = len(run.loads)
    (tmp_path / "rows.csv").write_text("image,question,answers\nred.png,What is this?,\"['yes', 'no']\"\n")
    told = run("evaluate", "questions", str(tmp_path / "rows.csv"), "-o", "other", code=2).stderr
    assert "`data`, row 1: `answers` must be" in told and "['yes', 'no']" in told
    assert len(run.loads) == loads and not (tmp_path / "other").exists()


def test_what_questions_are_asked_with(run, tmp_path):
    """The manifest and the results show the whole prompt; the line after a question is VQAv2's, another, or none."""
    PIL.Image.new("RGB", (64, 64), "red").save(tmp_path / "red.png")
    rows = [{"image": "red.png", "question": "What is this?", "answers": ["red"]}]
    data, prompts, published = write_rows(tmp_path / "rows.jsonl", rows), [], SHORT_ANSWER.partition("\n")[2]
    for instruction in (published, "", "In {question} words."):
        options = [] if instruction == published else ["--instruction", instruction]
        run("evaluate", "questions", data, "-o", "out", "--max-new-tokens", "8", *options)
        assert results_of(tmp_path / "out")["instruction"] == instruction
        prompts.append("What is this?" + f"\n{instruction}" * bool(instruction))
    entries = [json.loads(line) for line in (tmp_path / "out" / "manifest.jsonl").read_text().splitlines()]
    assert [entry["prompt"] for entry in entries] == prompts


def test_likelihood(run, pipe, tmp_path, monkeypatch):
    turns = [{"role": role, "content": word} for role, word in zip(["user", "assistant"] * 2, "abcd", strict=True)]
    data = write_rows(tmp_path / "rows.jsonl", [{"messages": turns}, {"messages": turns[:2]}])
    table = run("evaluate", "likelihood", data, "-o", "out", "--block-length", "1", "--num-samples", "1").stdout
    results = results_of(tmp_path / "out")["results"]
    assert [line.split()[0] for line in table.splitlines()] == list(results)
    assert results["completions"] == 3 and results["perplexity"] > 1
    entries = [json.loads(line) for line in (tmp_path / "out" / "manifest.jsonl").read_text().splitlines()]
    # By hand: the first answer, after its question
    prompt = pipe.processor.apply_chat_template(turns[:1], tokenize=True, return_dict=True, add_generation_prompt=True)
    answer = pipe.processor.tokenizer("b<|role_end|>")["input_ids"]
    bound = completion_likelihood(
        pipe.model, [prompt["input_ids"][0].tolist()], [answer], block_length=1, num_samples=1, batch_size=1
    )
    first = next(entry for entry in entries if entry["completion"] == "b<|role_end|>")
    assert first["tokens"] == len(answer)
    assert first["log_likelihood"] == pytest.approx(float(bound.log_likelihoods[0]), rel=1e-4)
    monkeypatch.setattr("transformers_llada_uni.evaluation.completion_likelihood", None)
    assert (
        run("evaluate", "likelihood", data, "-o", "out", "--block-length", "1", "--num-samples", "1").stdout == table
    )


def test_tasks_of_lm_eval(run, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval")
    data = write_rows(tmp_path / "rows.jsonl", [{"question": "Sky: is", "choices": [" blue", " green"], "gold": 0}])
    task = {
        "task": "colours",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": data}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{gold}}",
    }
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "colours.yaml").write_text(json.dumps(task))  # JSON is YAML
    arguments = ["colours", "--include-path", "tasks", "-o", "out", "--num-samples", "2", "--device", "cpu"]
    table = run("evaluate", "lm-eval", *arguments).stdout
    results = results_of(tmp_path / "out")["results"]
    assert results["colours"]["acc,none"] in (0.0, 1.0) and "colours acc,none" in table
    adapter = str(embedded_checkpoint("emoji") / "adapter")
    found = json.loads(run("evaluate", "lm-eval", *arguments, "-m", adapter, "--json").stdout)
    assert found["model"] == adapter and found["results"]["colours"]["acc,none"] in (0.0, 1.0)
    run("evaluate", "lm-eval", *arguments)
    from transformers_llada_uni.evaluation.lm_eval_model import LLaDAUniLM

    monkeypatch.setattr(LLaDAUniLM, "_likelihoods", None)  # goes on: nothing is scored again
    assert json.loads(run("evaluate", "lm-eval", *arguments, "--json").stdout)["results"] == results


def test_a_table():
    results = {"a": {"mean": 0.5, "scores": [0, 1]}, "long name": 3, "word": "not a number"}
    assert table_of(results) == ["a mean     0.5000", "long name  3"]


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["images", "-p", "prompts.txt"], "what to score by"),
        (["images", "-p", "prompts.txt", "--reference", "."], "`--reference` and `--features`"),
        (["images", "-p", "rows.jsonl", "--metric", "json.dumps"], "here `--seed` holds"),
        (["images", "-p", "prompts.txt", "--metric", "sharpness"], "`metric`: 'sharpness' is no path"),
        (["images", "-p", "prompts.txt", "--metric", "json.sharpness"], "has no function 'sharpness'"),
        (["images", "-p", "prompts.txt", "--metric", "no_such.module"], "no_such"),
        (["images", "-p", "prompts.txt", *["--metric", "json.dumps"] * 2], "another score of the name 'dumps'"),
        (["images", "-p", "prompts.txt", "--metric", "mine.images"], "another score of the name 'images'"),
        (["images", "-p", "prompts.txt", "--clip", "no/such/model"], "`clip` 'no/such/model' cannot be loaded: "),
        (["images", "-p", "prompts.txt", "--reference", ".", "--features", "x"], "there are no images"),
        (["questions", "none.jsonl"], "none.jsonl"),
        (["questions", "rows.jsonl", "--split", "test"], "`split`"),
        (["likelihood", "empty.jsonl"], "empty.jsonl"),
        (["images", "-p", "prompts.txt", "--clip", str(embedded_checkpoint("emoji"))], "`clip` '"),
        (["lm-eval", "x"], "lm-eval knows no x"),
        (["lm-eval", "x", "--include-path", "none"], "`include_path` 'none' is no folder"),
    ],
)
def test_a_mistake_is_a_sentence(run, tmp_path, monkeypatch, arguments, words):
    if arguments[0] == "lm-eval":  # half a minute for its own tasks
        tasks = pytest.importorskip("lm_eval.tasks")
        monkeypatch.setattr(tasks.TaskManager, "all_tasks", [])
        monkeypatch.setattr(tasks.TaskManager, "__init__", lambda *args, **settings: None)
    (tmp_path / "prompts.txt").write_text("a cat\n")
    (tmp_path / "empty.jsonl").write_text("")
    write_rows(tmp_path / "rows.jsonl", [{"prompt": "a cat", "seed": 1}])
    result = run("evaluate", *arguments, code=2)
    told = [line for line in result.stderr.splitlines() if line.startswith("llada-uni: ")]
    assert len(told) == 1 and words in told[0] and "Traceback" not in result.stderr
    assert not run.loads


@pytest.mark.parametrize("row", [{"question": "a"}, {"image": "none.png", "question": "a", "answers": ["b"]}])
def test_a_row_without_its_image(run, tmp_path, row):
    data = write_rows(tmp_path / "rows.jsonl", [row])
    assert "image" in run("evaluate", "questions", data, code=2).stderr
    assert not run.loads and not (tmp_path / "evaluation").exists()
