"""
Visual question answering: VQAv2's accuracy as a metric of `evaluate`, and the loop that lets a model answer.

The file can be given to `evaluate.load` as it is; nothing is downloaded.
"""

import re
from collections.abc import Iterable, Mapping, Sequence, Sized
from typing import Any

import datasets
import evaluate
import torch
from tqdm.auto import tqdm

from transformers_llada_uni.input_checks import check_integer


CITATION = """\
@inproceedings{VQA,
  author = {Antol, Stanislaw and Agrawal, Aishwarya and Lu, Jiasen and Mitchell, Margaret and Batra, Dhruv and
            Zitnick, C. Lawrence and Parikh, Devi},
  title = {{VQA}: Visual Question Answering},
  booktitle = {International Conference on Computer Vision},
  year = {2015},
}"""

ANSWERS_TO_AGREE_WITH = 3
SHORT_ANSWER = "{question}\nAnswer the question using a single word or phrase."

_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBER_OF_WORD = {word: str(number) for number, word in enumerate(_NUMBERS)} | {"none": "0"}
_ARTICLES = {"a", "an", "the"}
_APOSTROPHES = re.compile("['\u2018\u2019]")
_THOUSANDS_SEPARATOR = re.compile(r"(?<=\d),(?=\d)")
_PUNCTUATION = re.compile(r"[;/\[\]{}\"()=+\\_\-><@`,?!]")
_PERIOD = re.compile(r"\.(?!\d)")  # not that of a decimal number


def normalize_answer(answer: str) -> str:
    """
    An answer as it is compared: lower case, number words as digits, without articles, periods, commas and what
    else VQA's evaluation counts as punctuation.

    This does what VQA's evaluation means to do, to the model's answers and to people's alike. Apostrophes are dropped
    where that restores them from a list of contractions: `dont` and `don't` are one word either way.
    """
    text = _APOSTROPHES.sub("", answer.lower())
    text = _THOUSANDS_SEPARATOR.sub("", text)
    text = _PERIOD.sub("", _PUNCTUATION.sub(" ", text))
    words = [_NUMBER_OF_WORD.get(word, word) for word in text.split()]
    return " ".join(word for word in words if word not in _ARTICLES)


def visual_question_answering_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """
    Accuracy of one answer: `min(matches / 3, 1)` among the answers of all people but one, averaged over who is left
    out (VQA, arXiv 1505.00468, section 3; VQAv2's official evaluation). Where there is one answer only, whether it is
    the same.

    Raises:
        ValueError: if there are no `answers`.
    """
    if len(answers) == 0:
        raise ValueError("`answers` is empty: there is nothing to compare the prediction with.")
    given = normalize_answer(prediction)
    matches = [normalize_answer(answer) == given for answer in answers]
    if len(matches) == 1:
        return float(matches[0])
    total = sum(matches)
    return sum(min((total - match) / ANSWERS_TO_AGREE_WITH, 1.0) for match in matches) / len(matches)


class VisualQuestionAnsweringAccuracy(evaluate.Metric):
    """
    `compute(predictions=[...], references=[[...], ...])` gives `{"accuracy": ...}`, 0 to 1, the mean of
    [`visual_question_answering_accuracy`]. Predictions are texts, references the list of all people's answers.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Accuracy of short answers against those of several people, as in VQAv2.",
            citation=CITATION,
            inputs_description="predictions: list of str. references: list of lists of str.",
            features=datasets.Features(
                {
                    "predictions": datasets.Value("string"),
                    "references": datasets.Sequence(datasets.Value("string")),
                }
            ),
        )

    def _compute(self, predictions: list[str], references: list[list[str]]) -> dict[str, float]:
        accuracies = [visual_question_answering_accuracy(*row) for row in zip(predictions, references, strict=True)]
        return {"accuracy": sum(accuracies) / len(accuracies)}


def evaluate_visual_question_answering(
    model: Any,
    processor: Any,
    dataset: Iterable[Mapping[str, Any]],
    *,
    batch_size: int = 8,
    prompt_template: str = SHORT_ANSWER,
    max_new_tokens: int = 32,
    show_progress_bar: bool = True,
    **generate_kwargs: Any,
) -> dict[str, Any]:
    r"""
    Lets `model` answer the questions of `dataset`, and scores the answers.

    Args:
        model ([`LLaDAUniForConditionalGeneration`]): Or what has its `generate`.
        processor ([`LLaDAUniProcessor`]): Its processor.
        dataset (iterable of `{"image", "question", "answers"}`): An image (or list of images), a question, and the
            answers of people: strings or numbers, or VQAv2's `{"answer": ...}`; one, or a list of them. A
            `datasets.Dataset`, streamed or not, or a list.
        batch_size (`int`, defaults to 8): Questions answered together. Does not change the answers.
        prompt_template (`str`): What is asked, with `{question}` in it.
        max_new_tokens (`int`, defaults to 32): Longest answer.
        show_progress_bar (`bool`, defaults to `True`): Show a bar that counts questions.
        **generate_kwargs: For `generate`.

    Returns:
        `accuracy` (`float`, 0 to 1), `predictions` (`list[str]`) and `accuracies` (`list[float]`), in the order of the
        dataset.

    Raises:
        ValueError, TypeError: if the dataset is empty, `batch_size` is no number of at least 1, a row lacks a column
            or has no answers, or `prompt_template` has no `{question}`.
    """
    check_integer("batch_size", batch_size, 1)
    if "{question}" not in prompt_template:
        raise ValueError(f"`prompt_template` must hold {{question}}, got {prompt_template!r}.")
    predictions: list[str] = []
    accuracies: list[float] = []
    total = len(dataset) if isinstance(dataset, Sized) else None
    with tqdm(total=total, unit="question", disable=not show_progress_bar) as progress:
        for rows in _batches(dataset, batch_size):
            inputs = processor(
                images=[_images(row["image"]) for row in rows],
                text=[prompt_template.replace("{question}", row["question"]) for row in rows],
                task="understanding",
            ).to(model.device)
            with torch.no_grad():
                sequences = model.generate(**inputs, max_new_tokens=max_new_tokens, **generate_kwargs)
            texts = processor.post_process_image_text_to_text(sequences[:, inputs["input_ids"].shape[1] :])
            for row, text in zip(rows, texts, strict=True):
                predictions.append(text.strip())
                accuracies.append(visual_question_answering_accuracy(text, row["answers"]))
            progress.update(len(rows))
    if not predictions:
        raise ValueError("`dataset` is empty.")
    return {
        "accuracy": sum(accuracies) / len(accuracies),
        "predictions": predictions,
        "accuracies": accuracies,
    }


def _batches(dataset: Iterable[Mapping[str, Any]], batch_size: int) -> Iterable[list[Mapping[str, Any]]]:
    rows: list[Mapping[str, Any]] = []
    for number, row in enumerate(dataset):
        if missing := [name for name in ("image", "question", "answers") if row.get(name) is None]:
            raise ValueError(f"Row {number} of `dataset` has no {', '.join(f'`{name}`' for name in missing)}.")
        answers = answers_of(row["answers"])
        if answers is None:
            raise ValueError(
                f"Row {number} of `dataset`: `answers` must be texts, numbers or {{'answer': text}}, one or a list of "
                f"them, got {row['answers']!r:.80}."
            )
        if len(answers) == 0:
            raise ValueError(f"Row {number} of `dataset` has an empty list of `answers`.")
        rows.append({**row, "answers": answers})
        if len(rows) == batch_size:
            yield rows
            rows = []
    if rows:
        yield rows


def _images(image: Any) -> list[Any]:
    return list(image) if isinstance(image, (list, tuple)) else [image]


def answers_of(answers: Any) -> list[str] | None:
    """People's answers as texts, from one or a list of texts, numbers or VQAv2's `{"answer": ...}`; else `None`."""
    if isinstance(answers, str) or not isinstance(answers, Sequence):
        answers = [answers]
    answers = [answer.get("answer") if isinstance(answer, Mapping) else answer for answer in answers]
    is_answer = [isinstance(answer, str | int | float) and not isinstance(answer, bool) for answer in answers]
    return [str(answer) for answer in answers] if all(is_answer) else None


__all__ = [
    "VisualQuestionAnsweringAccuracy",
    "evaluate_visual_question_answering",
    "normalize_answer",
    "visual_question_answering_accuracy",
]
