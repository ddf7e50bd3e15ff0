"""VQAv2's accuracy by hand, and the loop that lets a model answer."""

import evaluate
import pytest
from PIL import Image

from transformers_llada_uni import LLaDAUniForConditionalGeneration, LLaDAUniProcessor
from transformers_llada_uni.evaluation import (
    VisualQuestionAnsweringAccuracy,
    evaluate_visual_question_answering,
    normalize_answer,
    visual_question_answering_accuracy,
)
from transformers_llada_uni.evaluation import visual_question_answering as vqa_module


class TestVisualQuestionAnswering:
    @pytest.mark.parametrize(
        "answer, normal",
        [
            ("Yes.", "yes"),
            ("The  Two dogs", "2 dogs"),
            ("a man's hat", "mans hat"),
            ("don't", "dont"),
            ("10,000", "10000"),
            ("3.5 feet", "3.5 feet"),
            ("red,white and blue", "red white and blue"),
            ("None", "0"),
            ("left/right?", "left right"),
            ("U.S.A.", "usa"),
            ("Yes!", "yes"),
            ("t-shirt", "t shirt"),
            ("{12:30}", "12:30"),
        ],
    )
    def test_normal_form(self, answer, normal):
        assert normalize_answer(answer) == normal

    @pytest.mark.parametrize("matches, expected", [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
    def test_accuracy_by_hand(self, matches, expected):
        # With m of 10 people agreeing, m times one of them is left out: (m min((m-1)/3, 1) + (10-m) min(m/3, 1)) / 10
        answers = ["Two"] * matches + ["three"] * (10 - matches)
        assert visual_question_answering_accuracy("2.", answers) == pytest.approx(expected)

    def test_single_answer_is_compared(self):
        assert visual_question_answering_accuracy("The cat", ["cat"]) == 1.0
        assert visual_question_answering_accuracy("dog", ["cat"]) == 0.0
        with pytest.raises(ValueError, match="`answers` is empty"):
            visual_question_answering_accuracy("dog", [])

    @pytest.mark.parametrize("load", ["class", "file"])
    def test_is_a_metric_of_evaluate(self, load, tmp_path, monkeypatch):
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        if load == "class":
            metric = VisualQuestionAnsweringAccuracy()
        else:
            metric = evaluate.load(vqa_module.__file__, cache_dir=str(tmp_path))
        references = [["cat"] * 2 + ["dog"] * 8, ["2"]]
        assert metric.compute(predictions=["a cat", "two"], references=references) == {"accuracy": pytest.approx(0.8)}
        metric.add_batch(predictions=["a cat"], references=references[:1])
        metric.add_batch(predictions=["3"], references=references[1:])
        assert metric.compute() == {"accuracy": pytest.approx(0.3)}

    @pytest.mark.parametrize(
        "answers, texts",
        [("two", ["two"]), (2, ["2"]), ([2, "two", {"answer": 3}], ["2", "two", "3"]), ((1.5,), ["1.5"]), ([], [])],
    )
    def test_answers_are_one_or_several(self, answers, texts):
        assert vqa_module.answers_of(answers) == texts

    @pytest.fixture(scope="class")
    def parts(self, converted_dir):
        model = LLaDAUniForConditionalGeneration.from_pretrained(converted_dir / "model").eval()
        return model, LLaDAUniProcessor.from_pretrained(converted_dir / "processor")

    @staticmethod
    def dataset():
        pictures = [Image.new("RGB", size, colour) for size, colour in (((64, 64), "red"), ((96, 64), "blue"))]
        return [
            {"image": pictures[0], "question": "What colour?", "answers": ["red"] * 10},
            {"image": pictures[1], "question": "What colour is it here?", "answers": [{"answer": "blue"}] * 10},
            {"image": pictures, "question": "Are they one?", "answers": ["no"]},
        ]

    def test_answers_are_those_of_generate(self, parts):
        model, processor = parts
        dataset = self.dataset()
        settings = {"max_new_tokens": 8, "num_steps_per_block": 4}
        by_hand = []
        for row in dataset:
            pictures = row["image"] if isinstance(row["image"], list) else [row["image"]]
            inputs = processor(images=[pictures], text=[row["question"] + "?!"], task="understanding")
            new = model.generate(**inputs, **settings)[0, inputs["input_ids"].shape[1] :]
            by_hand.append(processor.post_process_image_text_to_text(new[None])[0].strip())
        dataset[1]["answers"] = [{"answer": by_hand[1]}] * 3 + [{"answer": "else"}] * 7
        for batch_size in (1, 2, 8):
            results = evaluate_visual_question_answering(
                model,
                processor,
                iter(dataset) if batch_size == 2 else dataset,
                batch_size=batch_size,
                prompt_template="{question}?!",
                show_progress_bar=False,
                **settings,
            )
            assert results["predictions"] == by_hand
            assert results["accuracies"][1] == pytest.approx(0.9)
            assert results["accuracy"] == pytest.approx(sum(results["accuracies"]) / 3)

    @pytest.mark.parametrize(
        "arguments, message",
        [
            ({"dataset": []}, "`dataset` is empty"),
            ({"dataset": [{"image": 1, "question": "what"}]}, "Row 0 of `dataset` has no `answers`"),
            ({"dataset": [{"image": 1, "question": "what", "answers": []}]}, "Row 0 of `dataset` has an empty list"),
            ({"dataset": [{"image": 1, "question": "what", "answers": [True]}]}, "Row 0 .*: `answers` must be texts"),
            ({"dataset": [{"image": 1, "question": "what", "answers": [{"text": "a"}]}]}, "`answers` must be texts"),
            ({"batch_size": 0}, "`batch_size`"),
            ({"prompt_template": "what?"}, "`prompt_template`"),
        ],
    )
    def test_bad_input(self, parts, arguments, message):
        with pytest.raises(ValueError, match=message):
            evaluate_visual_question_answering(*parts, **({"dataset": self.dataset()} | arguments))
