"""Images of prompts, on the disk and resumed, and their scores."""

import functools

import evaluate
import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_llada_uni import LLaDAUniPipeline
from diffusers_llada_uni.evaluation import evaluate_text_to_image, generate_images, score_images


class Painter:
    """Stands for a pipeline: images that show the prompt's length and the generator's first number."""

    def __init__(self, stop_after=None, weight=0, finish=list):
        self.num_made, self.stop_after, self.weight, self.finish = 0, stop_after, weight, finish

    def __getstate__(self):
        return self.weight  # what is made depends on nothing else

    def __call__(self, prompt, generator, shade=0, **kwargs):
        images = []
        for text, one in zip(prompt, generator, strict=True):
            if self.num_made == self.stop_after:
                raise KeyboardInterrupt
            noise = int(torch.randint(256, (), generator=one))
            images.append(Image.new("RGB", (4, 4), (len(text), noise, shade)))
            self.num_made += 1
        return self.finish(images)


def draw_with(module, prompt, generator):
    return Painter()(prompt, generator)


def pixels(images):
    return [image.getpixel((0, 0)) for image in images]


class TestTextToImage:
    PROMPTS = ["a", "bb", "ccc"]

    def test_seeds_belong_to_the_image(self, tmp_path):
        runs = [
            pixels(
                generate_images(
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
        assert len({green for _, green, _ in runs[0]}) == 2  # of two seeds
        assert {blue for _, _, blue in runs[0]} == {7}
        other = generate_images(Painter(), self.PROMPTS, tmp_path / "other", seed=1, show_progress_bar=False)
        assert pixels(other) != runs[0][::2]

    def test_goes_on_where_it_was_stopped(self, tmp_path):
        expected = pixels(generate_images(Painter(), self.PROMPTS, tmp_path / "whole", show_progress_bar=False))
        folder = tmp_path / "stopped"
        with pytest.raises(KeyboardInterrupt):
            generate_images(Painter(stop_after=2), self.PROMPTS, folder, show_progress_bar=False)
        assert sorted(path.name for path in folder.glob("*.png")) == ["a.png", "bb.png"]
        painter = Painter()
        assert pixels(generate_images(painter, self.PROMPTS, folder, show_progress_bar=False)) == expected
        assert painter.num_made == 1
        generate_images(painter, self.PROMPTS, folder, show_progress_bar=False)
        assert painter.num_made == 1

    @pytest.mark.parametrize(
        ("before", "after"),
        [
            ({}, {"seed": 1}),
            ({}, {"prompts": ["aa", "bbb", "x"]}),
            ({}, {"shade": 3}),
            ({"shade": 3}, {}),
            ({"image": Image.new("RGB", (2, 2), "red")}, {"image": Image.new("RGB", (2, 2), "blue")}),
            ({"settings": {"dtype": torch.float16}}, {"settings": {"dtype": torch.bfloat16}}),
            ({"pipeline": Painter(weight=1)}, {"pipeline": Painter(weight=2)}),
            ({"pipeline": torch.nn.Linear(1, 1)}, {"pipeline": torch.nn.Linear(1, 1)}),
        ],
    )
    def test_images_of_another_run_are_not_taken_for_ours(self, tmp_path, before, after):
        arguments = {
            "pipeline": Painter(),
            "prompts": self.PROMPTS,
            "show_progress_bar": False,
            "output_dir": tmp_path,
        }
        if isinstance(before.get("pipeline"), torch.nn.Module):
            before, after = ({"pipeline": functools.partial(draw_with, run["pipeline"])} for run in (before, after))
        first = generate_images(**(arguments | before))
        assert generate_images(**(arguments | before)).paths == first.paths
        assert not set(generate_images(**(arguments | after)).paths) & set(first.paths)

    def test_images_of_the_user_stay(self, tmp_path):
        Image.new("RGB", (2, 2)).save(tmp_path / "a.png")
        assert generate_images(Painter(), ["a"], tmp_path).paths == [tmp_path / "a-2.png"]
        assert Image.open(tmp_path / "a.png").size == (2, 2)

    def test_scores_and_results(self, tmp_path):
        def brightness(prompts, images):
            return [len(prompt) + image.getpixel((0, 0))[2] for prompt, image in zip(prompts, images, strict=True)]

        results = evaluate_text_to_image(
            Painter(),
            self.PROMPTS,
            tmp_path,
            {"brightness": brightness},
            num_images_per_prompt=2,
            metric_batch_size=4,
            show_progress_bar=False,
            shade=10,
            reference_images=[Image.new("RGB", (1, 1))],
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

        images = [Image.new("RGB", (width, 1)) for width in (1, 2, 3)]
        assert score_images(Widths(), self.PROMPTS, images, batch_size=2) == {"agree": True}

    def test_pipeline(self, converted_dir, tmp_path):
        pipeline = LLaDAUniPipeline.from_pretrained(converted_dir)
        pipeline.set_progress_bar_config(disable=True)
        settings = {"height": 64, "width": 64, "num_inference_steps": 2, "show_progress_bar": False}
        runs = [
            generate_images(
                pipeline, ["a cat", "a dog"], tmp_path / str(batch_size), batch_size=batch_size, **settings
            )
            for batch_size in (1, 2)
        ]
        for alone, together in zip(*runs, strict=True):
            assert alone.size == together.size == (64, 64)
            difference = np.abs(np.asarray(alone, dtype=int) - np.asarray(together, dtype=int))
            assert difference.max() <= 2
        assert runs[0][0].tobytes() != runs[0][1].tobytes()

    def test_several_images_of_a_prompt_are_sampled(self, converted_dir, tmp_path):
        """As by `num_images_per_prompt` of the pipeline: greedy codes would be the same ones."""
        pipeline, codes = LLaDAUniPipeline.from_pretrained(converted_dir), []
        pipeline.set_progress_bar_config(disable=True)
        decode = pipeline._decode
        pipeline._decode = lambda rows, *args: codes.extend(rows) or decode(rows, *args)
        settings = {"height": 64, "width": 64, "num_inference_steps": 1}
        generate_images(
            pipeline, ["a cat"], tmp_path, num_images_per_prompt=2, batch_size=2, show_progress_bar=False, **settings
        )
        assert not torch.equal(*codes)
        generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
        pipeline("a cat", num_images_per_prompt=2, generator=generators, **settings)
        assert torch.equal(codes[0], codes[2]) and torch.equal(codes[1], codes[3])

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
            ({"pipeline": lambda **kwargs: []}, "`pipeline` gave 0 images for 1"),
            ({"pipeline": 3}, "`pipeline` must be callable"),
        ],
    )
    def test_bad_input(self, tmp_path, arguments, message):
        settings = {"pipeline": Painter(), "prompts": ["a"], "output_dir": tmp_path, "show_progress_bar": False}
        with pytest.raises((ValueError, TypeError), match=message):
            generate_images(**(settings | arguments))

    def test_bad_metrics(self, tmp_path):
        with pytest.raises(ValueError, match="go together"):
            evaluate_text_to_image(Painter(), ["a"], tmp_path, {}, distances={"a": len})
        with pytest.raises(TypeError, match="`clip`"):
            evaluate_text_to_image(Painter(), ["a"], tmp_path, {"clip": 3})
        with pytest.raises(ValueError, match="as many, got 2 and 1"):
            score_images(len, ["a", "b"], [Image.new("RGB", (1, 1))])
        with pytest.raises(ValueError, match="gave 1 scores for 2"):
            score_images(lambda prompts, images: [1.0], ["a", "b"], [Image.new("RGB", (1, 1))] * 2)


def test_an_image_that_changes_under_its_name_is_edited_anew(tmp_path):
    def pipeline(prompt, generator, image):
        return [image.resize((2, 2)) for _ in prompt]

    file, found = tmp_path / "photo.png", []
    for color in ("red", "blue", "blue"):
        Image.new("RGB", (4, 4), color).save(file)
        (image,) = generate_images(pipeline, ["a"], tmp_path / "made", image=str(file), show_progress_bar=False)
        found.append(image.getpixel((0, 0)))
    assert found == [(255, 0, 0), (0, 0, 255), (0, 0, 255)]
    assert len((tmp_path / "made" / "manifest.jsonl").read_text().splitlines()) == 2
