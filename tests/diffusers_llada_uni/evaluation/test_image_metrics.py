"""CLIP score and Frechet distance, by hand."""

import math

import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

from diffusers_llada_uni.evaluation import CLIPScore, FrechetDistance, frechet_distance


class TestImageMetrics:
    @pytest.fixture(scope="class")
    def clip(self, tmp_path_factory):
        torch.manual_seed(0)
        vocabulary = {letter + end: 0 for letter in "abcdefgh" for end in ("", "</w>")}
        vocabulary = {token: index for index, token in enumerate([*vocabulary, "<|startoftext|>", "<|endoftext|>"])}
        tokenizer = CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=8)
        processor = CLIPProcessor(CLIPImageProcessor(size=16, crop_size=16), tokenizer)
        text = {
            "vocab_size": len(vocabulary),
            "max_position_embeddings": 8,
            "eos_token_id": vocabulary["<|endoftext|>"],
        }
        text |= {"bos_token_id": vocabulary["<|startoftext|>"]}
        sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        config = CLIPConfig(
            text_config=text | sizes, vision_config={"image_size": 16, "patch_size": 8} | sizes, projection_dim=8
        )
        folder = tmp_path_factory.mktemp("clip")
        CLIPModel(config).save_pretrained(folder)
        processor.save_pretrained(folder)
        return folder

    def test_clip_score_by_hand(self, clip):
        prompts = ["a", "b c d", "a b c d e f g h a b c d"]  # the last is longer than the model reads
        images = [Image.new("RGB", (20, 30), colour) for colour in ("red", "green", "blue")]
        images[1] = images[1].convert("RGBA")
        scores = CLIPScore(str(clip))(prompts, images)
        model, processor = CLIPModel.from_pretrained(clip), CLIPProcessor.from_pretrained(clip)
        for prompt, image, score in zip(prompts, images, scores, strict=True):
            inputs = processor(
                text=[prompt], images=[image.convert("RGB")], return_tensors="pt", truncation=True, padding=True
            )
            with torch.no_grad():
                cosine = model(**inputs).logits_per_image / model.logit_scale.exp()
            assert score == pytest.approx(max(100 * float(cosine), 0.0), abs=1e-3)
        assert CLIPScore(model, processor)(prompts, images) == pytest.approx(scores)

    def test_clip_score_refuses(self, clip):
        with pytest.raises(ValueError, match="`processor` is needed"):
            CLIPScore(CLIPModel.from_pretrained(clip))
        with pytest.raises(ValueError, match="`prompts` are 2, but `images` are 1"):
            CLIPScore(str(clip))(["a", "b"], [Image.new("RGB", (8, 8))])

    def test_frechet_distance_by_hand(self):
        # Uncorrelated dimensions: |m - m'|^2 + sum (s - s')^2
        square = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
        scale, other, shift = torch.tensor([2.0, 3.0]), torch.tensor([5.0, 1.0]), torch.tensor([0.5, -2.0])
        deviation = (4 / 3) ** 0.5
        expected = float(shift.square().sum() + ((scale - other) * deviation).square().sum())
        assert frechet_distance(square * scale, square * other + shift) == pytest.approx(expected)
        # A rotation of both changes nothing, but makes the dimensions depend on one another.
        rotation = torch.tensor([[0.6, -0.8], [0.8, 0.6]])
        rotated = [features @ rotation for features in (square * scale, square * other + shift)]
        assert frechet_distance(*rotated) == pytest.approx(expected, rel=1e-5)
        assert frechet_distance(rotated[0], rotated[0]) == pytest.approx(0.0, abs=1e-6)

    def test_frechet_distance_of_few_samples(self):
        # Singular covariances, as with fewer images than features, must not give NaN.
        features = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
        assert math.isfinite(frechet_distance(features, features + 1))
        assert frechet_distance(features, features + 1) == pytest.approx(32.0, rel=1e-4)

    def test_frechet_distance_of_images(self):
        def mean_colour(images):
            return torch.tensor([image.resize((1, 1)).getpixel((0, 0)) for image in images]).float()

        first = [Image.new("RGB", (4, 4), (red, 0, 0)) for red in (10, 20, 30)]
        second = [Image.new("L", (4, 4), 0).convert("RGB"), *first[:2]]
        for batch_size in (1, 2, 16):
            distance = FrechetDistance(mean_colour, batch_size)(first, second)
            assert distance == pytest.approx(100.0)  # means 20 and 10, the same variance

    def test_bad_input(self):
        with pytest.raises(ValueError, match="`features` must be"):
            frechet_distance(torch.zeros(1, 2), torch.zeros(2, 2))
        with pytest.raises(ValueError, match="2 dimensions, but `reference_features` 3"):
            frechet_distance(torch.zeros(2, 2), torch.zeros(2, 3))
        with pytest.raises(TypeError, match="`extract_features`"):
            FrechetDistance(None)
        with pytest.raises(ValueError, match="`batch_size`"):
            FrechetDistance(len, batch_size=0)
