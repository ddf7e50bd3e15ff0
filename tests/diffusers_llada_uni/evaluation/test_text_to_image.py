"""Pictures of prompts, on the disk and resumed, and their scores."""

import functools
import os
import re
import time

import evaluate
import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_llada_uni import LLaDAUniPipeline
from diffusers_llada_uni.evaluation import evaluate_text_to_image, generate_pictures, score_pictures


class Painter:
    """Stands for a pipeline: pictures that show the prompt's length and the generator's first number."""

    def __init__(self, stop_after=None, weight=0, finish=list):
        self.num_made, self.stop_after, self.weight, self.finish = 0, stop_after, weight, finish

    def __getstate__(self):
        return self.weight  # what is made depends on nothing else

    def __call__(self, prompt, generator, shade=0, **kwargs):
        pictures = []
        for text, one in zip(prompt, generator, strict=True):
            if self.num_made == self.stop_after:
                raise KeyboardInterrupt
            noise = int(torch.randint(256, (), generator=one))
            pictures.append(Image.new("RGB", (4, 4), (len(text), noise, shade)))
            self.num_made += 1
        return self.finish(pictures)


def draw_with(module, prompt, generator):
    return Painter()(prompt, generator)


def pixels(pictures):
    return [picture.getpixel((0, 0)) for picture in pictures]


class TestTextToImage:
    PROMPTS = ["a", "bb", "ccc"]

    def test_seeds_belong_to_the_picture(self, tmp_path):
        runs = [
            pixels(
                generate_pictures(
                    Painter(),
                    self.PROMPTS,
                    tmp_path / str(batch_size),
                    num_images_per_prompt=2,
                    batch_size=batch_size,
                    show_progress_bar=False,
                    shade=7,
                )
            )
            for batch_size in (1, 4)
        ]
        assert runs[0] == runs[1]
        assert [red for red, _, _ in runs[0]] == [1, 1, 2, 2, 3, 3]
        assert len({green for _, green, _ in runs[0]}) == 6
        assert {blue for _, _, blue in runs[0]} == {7}
        other = generate_pictures(Painter(), self.PROMPTS, tmp_path / "other", seed=1, show_progress_bar=False)
        assert pixels(other) != runs[0][::2]

    def test_goes_on_where_it_was_stopped(self, tmp_path):
        expected = pixels(generate_pictures(Painter(), self.PROMPTS, tmp_path / "whole", show_progress_bar=False))
        folder = tmp_path / "stopped"
        with pytest.raises(KeyboardInterrupt):
            generate_pictures(Painter(stop_after=2), self.PROMPTS, folder, show_progress_bar=False)
        assert sorted(path.name for path in folder.glob("*.png")) == ["00000-00.png", "00001-00.png"]
        painter = Painter()
        assert pixels(generate_pictures(painter, self.PROMPTS, folder, show_progress_bar=False)) == expected
        assert painter.num_made == 1
        generate_pictures(painter, self.PROMPTS, folder, show_progress_bar=False)
        assert painter.num_made == 1

    def test_what_a_killed_run_was_writing_is_removed(self, tmp_path):
        generate_pictures(Painter(), self.PROMPTS, tmp_path, show_progress_bar=False)
        dead, alive = (tmp_path / f".00000-00.png.{name}.partial" for name in ("dead", "alive"))
        for path, age in ((dead, 3600), (alive, 1)):
            path.write_bytes(b"half a picture")
            os.utime(path, (time.time() - age, time.time() - age))
        generate_pictures(Painter(), self.PROMPTS, tmp_path, show_progress_bar=False)
        assert not dead.exists() and alive.exists()

    @pytest.mark.parametrize("at_once", ["while a picture is drawn", "while a picture is written"])
    def test_two_runs_on_one_folder(self, tmp_path, at_once):
        """The other run begins and ends in the middle of ours."""
        settings = {"show_progress_bar": False}
        expected = pixels(generate_pictures(Painter(), self.PROMPTS, tmp_path / "alone", **settings))
        others = []

        def run_the_other():
            if not others:
                others.append(Painter())
                generate_pictures(others[0], self.PROMPTS, tmp_path / "shared", **settings)

        class InterruptedPicture:
            def __init__(self, picture):
                self.picture = picture

            def save(self, path, format):
                self.picture.save(path, format=format)
                run_the_other()

        def finish(pictures):
            if at_once == "while a picture is written":
                return [InterruptedPicture(picture) for picture in pictures]
            run_the_other()
            return pictures

        ours = Painter(finish=finish)
        assert pixels(generate_pictures(ours, self.PROMPTS, tmp_path / "shared", **settings)) == expected
        assert ours.num_made == 1 and others[0].num_made == 3
        assert {path.suffix for path in (tmp_path / "shared").iterdir()} == {".png", ".json"}

    @pytest.mark.parametrize(
        ("before", "after", "name"),
        [
            ({}, {"seed": 1}, "seed"),
            ({}, {"prompts": ["a", "bb", "x"]}, "prompts"),
            ({}, {"shade": 3}, "pipeline_kwargs['shade']"),
            ({"shade": 3}, {}, "pipeline_kwargs['shade']"),
            (
                {"image": Image.new("RGB", (2, 2), "red")},
                {"image": Image.new("RGB", (2, 2), "blue")},
                "pipeline_kwargs['image']",
            ),
            (
                {"settings": {"dtype": torch.float16}},
                {"settings": {"dtype": torch.bfloat16}},
                "pipeline_kwargs['settings']",
            ),
            ({"pipeline": Painter(weight=1)}, {"pipeline": Painter(weight=2)}, "pipeline"),
            ({"pipeline": torch.nn.Linear(1, 1)}, {"pipeline": torch.nn.Linear(1, 1)}, "pipeline"),
        ],
    )
    def test_refuses_the_pictures_of_another_run(self, tmp_path, before, after, name):
        arguments = {
            "pipeline": Painter(),
            "prompts": self.PROMPTS,
            "show_progress_bar": False,
            "output_dir": tmp_path,
        }
        if isinstance(before.get("pipeline"), torch.nn.Module):
            before, after = ({"pipeline": functools.partial(draw_with, run["pipeline"])} for run in (before, after))
        generate_pictures(**(arguments | before))
        generate_pictures(**(arguments | before))
        with pytest.raises(ValueError, match=re.escape(f"its {name} differ")):
            generate_pictures(**(arguments | after))

    def test_refuses_unknown_pictures(self, tmp_path):
        Image.new("RGB", (2, 2)).save(tmp_path / "holiday.png")
        with pytest.raises(ValueError, match="holds pictures, but no settings.json"):
            generate_pictures(Painter(), self.PROMPTS, tmp_path)

    def test_scores_and_results(self, tmp_path):
        def brightness(prompts, pictures):
            return [
                len(prompt) + picture.getpixel((0, 0))[2] for prompt, picture in zip(prompts, pictures, strict=True)
            ]

        results = evaluate_text_to_image(
            Painter(),
            self.PROMPTS,
            tmp_path,
            {"brightness": brightness},
            num_images_per_prompt=2,
            metric_batch_size=4,
            show_progress_bar=False,
            shade=10,
            reference_pictures=[Image.new("RGB", (1, 1))],
            distances={"count": lambda made, references: len(made) - len(references)},
        )
        assert results["brightness"] == {"mean": 12.0, "scores": [11.0, 11.0, 12.0, 12.0, 13.0, 13.0]}
        assert results["count"] == 5.0
        assert (tmp_path / "results.json").exists()

    def test_scores_by_a_metric_of_evaluate(self):
        datasets = pytest.importorskip("datasets")

        class Widths(evaluate.Metric):
            def _info(self):
                features = {"predictions": datasets.Image(), "references": datasets.Value("string")}
                return evaluate.MetricInfo(description="", citation="", features=datasets.Features(features))

            def _compute(self, predictions, references):
                return {
                    "agree": all(image.width == len(text) for image, text in zip(predictions, references, strict=True))
                }

        pictures = [Image.new("RGB", (width, 1)) for width in (1, 2, 3)]
        assert score_pictures(Widths(), self.PROMPTS, pictures, batch_size=2) == {"agree": True}

    def test_pipeline(self, converted_dir, tmp_path):
        pipeline = LLaDAUniPipeline.from_pretrained(converted_dir)
        pipeline.set_progress_bar_config(disable=True)
        settings = {"height": 64, "width": 64, "num_inference_steps": 2, "show_progress_bar": False}
        runs = [
            generate_pictures(
                pipeline, ["a cat", "a dog"], tmp_path / str(batch_size), batch_size=batch_size, **settings
            )
            for batch_size in (1, 2)
        ]
        for alone, together in zip(*runs, strict=True):
            assert alone.size == together.size == (64, 64)
            difference = np.abs(np.asarray(alone, dtype=int) - np.asarray(together, dtype=int))
            assert difference.max() <= 2
        assert runs[0][0].tobytes() != runs[0][1].tobytes()

    @pytest.mark.parametrize(
        "arguments, message",
        [
            ({"prompts": "a cat"}, "`prompts`"),
            ({"prompts": []}, "`prompts`"),
            ({"prompts": ["a", ""]}, "`prompts` must hold texts, got '' in row 1"),
            ({"num_images_per_prompt": 0}, "`num_images_per_prompt`"),
            ({"batch_size": 0}, "`batch_size`"),
            ({"seed": -1}, "`seed`"),
            ({"generator": None}, "`generator` is set"),
            ({"pipeline": lambda **kwargs: []}, "`pipeline` gave 0 pictures for 1"),
            ({"pipeline": 3}, "`pipeline` must be callable"),
        ],
    )
    def test_bad_input(self, tmp_path, arguments, message):
        settings = {"pipeline": Painter(), "prompts": ["a"], "output_dir": tmp_path, "show_progress_bar": False}
        with pytest.raises((ValueError, TypeError), match=message):
            generate_pictures(**(settings | arguments))

    def test_bad_metrics(self, tmp_path):
        with pytest.raises(ValueError, match="go together"):
            evaluate_text_to_image(Painter(), ["a"], tmp_path, {}, distances={"a": len})
        with pytest.raises(TypeError, match="`clip`"):
            evaluate_text_to_image(Painter(), ["a"], tmp_path, {"clip": 3})
        with pytest.raises(ValueError, match="as many, got 2 and 1"):
            score_pictures(len, ["a", "b"], [Image.new("RGB", (1, 1))])
        with pytest.raises(ValueError, match="gave 1 scores for 2"):
            score_pictures(lambda prompts, pictures: [1.0], ["a", "b"], [Image.new("RGB", (1, 1))] * 2)
