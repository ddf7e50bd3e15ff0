import copy
import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    pipeline,
)

from tests.common import ModelTesterMixin, assert_is_one_graph
from transformers_llada_uni import (
    LLaDA2MoeConfig,
    LLaDA2MoeForBlockDiffusion,
    LLaDAUniConfig,
    LLaDAUniForConditionalGeneration,
    LLaDAUniModel,
)


def tiny_config() -> LLaDAUniConfig:
    return LLaDAUniConfig(
        text_config=LLaDA2MoeConfig(
            vocab_size=96,
            image_token_offset=64,
            hidden_size=32,
            intermediate_size=48,
            moe_intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            num_experts=8,
            num_experts_per_tok=2,
            n_group=2,
            topk_group=1,
            max_position_embeddings=256,
            initializer_range=0.1,
            mask_token_id=63,
            pad_token_id=62,
            eos_token_id=61,
        ).to_dict(),
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_heads": 2,
            "depth": 2,
            "patch_size": 4,
            "image_size": 16,
            "initializer_range": 0.3,
        },
        vq_config={"num_embeddings": 32, "embed_dim": 8, "latent_channels": 16, "initializer_range": 0.3},
        image_token_id=40,
        image_start_token_id=50,
        image_end_token_id=51,
        begin_of_image_token_id=52,
        grid_token_ids=list(range(40, 50)),
    )


class TestCommon(ModelTesterMixin):
    attention_implementations = ("eager",)
    has_experts = True
    splits_over_devices = True
    supports_gradient_checkpointing = True

    def model(self):
        torch.manual_seed(0)
        return LLaDAUniForConditionalGeneration(tiny_config()).eval()

    def inputs(self):
        """An image of 2 x 3 codes in each row. The rows share one image, so that rows can be taken apart."""
        ids = torch.randint(0, 40, (2, 24), generator=torch.Generator().manual_seed(0))
        ids[:, 5:9] = torch.tensor([50, 42, 43, 52])
        ids[:, 9:15] = torch.arange(64, 70)
        return {"input_ids": ids, "block_length": 8}

    def output(self, outputs):
        return outputs.logits

    def disk_map(self):
        backbone = {f"model.language_model.layers.{layer}": "disk" if layer else "cpu" for layer in range(2)}
        names = ("word_embeddings", "norm", "rotary_emb")
        placed = {f"model.language_model.{name}": "cpu" for name in names}
        return {**backbone, **placed, "model.visual": "disk", "model.vqmodel": "cpu", "lm_head": "cpu"}

    def test_images_are_read_from_offloaded_weights(self, tmp_path):
        model = self.model()
        model.save_pretrained(tmp_path / "model")
        loaded = type(model).from_pretrained(
            tmp_path / "model", device_map=self.disk_map(), offload_folder=tmp_path / "offload"
        )
        pixels, grid = torch.randn(6, 48, generator=torch.Generator().manual_seed(0)), torch.tensor([[1, 2, 3]])
        assert torch.equal(loaded.get_image_codes(pixels, grid)[0], model.get_image_codes(pixels, grid)[0])

    def parameters_without_gradient(self, model):
        """The codebook's choice has no gradient; the tokenizer is trained by itself."""
        return {name for name, _ in model.named_parameters() if name.startswith(("model.visual", "model.vqmodel"))}


@pytest.fixture(scope="module")
def model(converted_dir):
    return AutoModelForImageTextToText.from_pretrained(converted_dir / "model")


@pytest.fixture(scope="module")
def processor(converted_dir):
    return AutoProcessor.from_pretrained(converted_dir / "processor")


@pytest.fixture(scope="module")
def expected(official_tiny):
    return json.loads((official_tiny / "expected" / "generation.json").read_text())


class TestAutoClasses:
    def test_all_of_them(self, converted_dir):
        assert type(AutoModel.from_pretrained(converted_dir / "model")) is LLaDAUniModel
        for auto_class in (AutoModelForImageTextToText, AutoModelForMultimodalLM):
            loaded, info = auto_class.from_pretrained(converted_dir / "model", output_loading_info=True)
            assert type(loaded) is LLaDAUniForConditionalGeneration
            assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert type(AutoProcessor.from_pretrained(converted_dir / "processor")).__name__ == "LLaDAUniProcessor"
        image_processor = AutoImageProcessor.from_pretrained(converted_dir / "processor")
        assert type(image_processor).__name__ == "LLaDAUniImageProcessor"


class TestAgreesWithTheRelease:
    def test_logits_through_the_converted_checkpoint(self, model, official_tiny):
        backbone = load_file(official_tiny / "expected" / "backbone.safetensors")
        with torch.no_grad():
            logits = model(backbone["forward.input_ids"], block_length=8).logits
        torch.testing.assert_close(logits, backbone["forward.logits"], rtol=0, atol=1e-4)

    @pytest.mark.parametrize("index", range(3))
    def test_codes_of_images(self, model, processor, expected, official_tiny, index):
        case = expected["images"][index]
        picture = Image.open(official_tiny / case["file"])
        for rule, resize_mode in (("understand_single", "understanding"), ("edit", "editing")):
            inputs = processor.image_processor(picture, resize_mode=resize_mode, return_tensors="pt")
            codes = model.get_image_codes(inputs["pixel_values"], inputs["image_grid_thw"])
            assert [1, *codes[0].shape] == case[rule]["grid_thw"]
            assert codes[0].flatten().tolist() == case[rule]["token_ids"]

    def test_several_images_at_once(self, model, processor, expected, official_tiny):
        pictures = [Image.open(official_tiny / case["file"]) for case in expected["images"]]
        inputs = processor.image_processor(pictures, return_tensors="pt")
        codes = model.get_image_codes(inputs["pixel_values"], inputs["image_grid_thw"])
        for found, case in zip(codes, expected["images"], strict=True):
            assert found.flatten().tolist() == case["understand_multi"]["token_ids"]

    def test_vision_features(self, model, processor, official_tiny):
        features = load_file(official_tiny / "expected" / "image_tokenizer.safetensors")
        picture = Image.open(official_tiny / "images" / "0.png")
        inputs = processor.image_processor(picture, return_tensors="pt")
        with torch.no_grad():
            found = model.model.visual(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"]).last_hidden_state
        torch.testing.assert_close(found, features["0.understand_single.features"], rtol=0, atol=1e-4)


class TestImageFeatures:
    @torch.no_grad()
    def test_of_several_images(self, model, processor, official_tiny):
        images = [Image.open(official_tiny / "images" / f"{index}.png") for index in range(2)]
        inputs = processor.image_processor(images, return_tensors="pt")
        arguments = inputs["pixel_values"], inputs["image_grid_thw"]
        outputs = model.get_image_features(*arguments, output_hidden_states=True)
        config = model.config.vision_config
        assert outputs.last_hidden_state.shape == (len(arguments[0]), config.hidden_size)
        assert len(outputs.hidden_states) == config.depth + 1
        sizes = [tuple(grid[1:]) for grid in arguments[1].tolist()]
        assert [tuple(features.shape) for features in outputs.pooler_output] == [
            (config.hidden_size, *s) for s in sizes
        ]
        assert torch.equal(outputs.pooler_output[0][:, 0, 1], outputs.last_hidden_state[1])
        assert torch.equal(model.get_image_features(*arguments, return_dict=False)[0], outputs.last_hidden_state)

    def test_they_have_a_gradient(self, model, processor, official_tiny):
        inputs = processor.image_processor(Image.open(official_tiny / "images" / "0.png"), return_tensors="pt")
        (features,) = model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"]).pooler_output
        assert features.requires_grad


class TestBackboneOfACompositeFolder:
    def test_config(self, model, converted_dir):
        config = LLaDA2MoeConfig.from_pretrained(converted_dir / "model")
        assert type(config) is LLaDA2MoeConfig
        assert {**config.to_dict(), "dtype": "float32"} == model.config.text_config.to_dict()

    @torch.no_grad()
    def test_weights_load_and_save(self, model, converted_dir, tmp_path):
        ids = torch.arange(1, 25)[None]
        for folder in (converted_dir / "model", tmp_path):
            loaded, info = LLaDA2MoeForBlockDiffusion.from_pretrained(folder, output_loading_info=True)
            assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
            assert torch.equal(loaded(ids).logits, model(ids).logits)
            loaded.save_pretrained(tmp_path)
        assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "llada2_moe"


@pytest.mark.parametrize("is_masked", [False, True])
def test_forward_is_one_graph(is_masked):
    torch.manual_seed(0)
    model = LLaDAUniForConditionalGeneration(tiny_config()).eval()
    inputs = {"input_ids": torch.randint(0, 40, (2, 24)), "block_length": 8}
    if is_masked:
        inputs["attention_mask"] = torch.ones(2, 24, dtype=torch.long)
    assert_is_one_graph(model, **inputs)


class TestImagesInPrompts:
    def test_pixels_equal_codes(self, model, processor, official_tiny):
        """Open places with pixels, and the codes themselves in their places, are one input."""
        picture = Image.open(official_tiny / "images" / "0.png")
        inputs = processor(images=picture, text="what is this?", task="understanding")
        codes = model.get_image_codes(inputs["pixel_values"], inputs["image_grid_thw"])[0].flatten()
        written = inputs["input_ids"].clone()
        written[written == model.config.image_token_id] = codes + model.config.text_config.image_token_offset
        settings = {"max_new_tokens": 8, "block_length": 8}
        from_pixels = model.generate(**inputs, **settings)
        assert torch.equal(from_pixels, model.generate(written, **settings))
        with torch.no_grad():
            torch.testing.assert_close(model(**inputs).logits, model(written).logits)

    def test_batch_of_unequal_images_equals_singles(self, model, processor, official_tiny):
        pictures = [[Image.open(official_tiny / "images" / f"{index}.png")] for index in range(2)]
        texts = ["what is this?", "name it"]
        settings = {"max_new_tokens": 8, "block_length": 8, "eos_token_id": None}
        together = model.generate(**processor(images=pictures, text=texts, task="understanding"), **settings)
        for row in range(2):
            inputs = processor(images=pictures[row], text=texts[row], task="understanding")
            alone = model.generate(**inputs, **settings)
            assert torch.equal(alone[0, -8:], together[row, -8:])

    def test_places_without_pixels_are_refused(self, model, processor, official_tiny):
        picture = Image.open(official_tiny / "images" / "0.png")
        inputs = processor(images=picture, text="what is this?", task="understanding")
        with pytest.raises(ValueError, match="96 places for image codes, but `pixel_values` has 0 patches"):
            model.generate(inputs["input_ids"])
        with pytest.raises(ValueError, match="`pixel_values` holds 90 patches, but `image_grid_thw` speaks of 96"):
            model.generate(
                inputs["input_ids"], pixel_values=inputs["pixel_values"][:90], image_grid_thw=inputs["image_grid_thw"]
            )

    def test_pipeline_of_transformers(self, model, processor, official_tiny):
        answer = pipeline("image-text-to-text", model=model, processor=processor)
        content = [
            {"type": "image", "image": str(official_tiny / "images" / "0.png")},
            {"type": "text", "text": "what is this?"},
        ]
        messages = [{"role": "user", "content": content}]
        found = answer(text=messages, max_new_tokens=8, return_full_text=False)
        inputs = processor.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
        )
        sequence = model.generate(**inputs, max_new_tokens=8)
        new = sequence[0, inputs["input_ids"].shape[1] :]
        assert found[0]["generated_text"] == processor.post_process_image_text_to_text(new[None])[0]


class Scripted(LLaDAUniForConditionalGeneration):
    """Writes what `script` holds wherever it is asked for text; draws as the real model does."""

    script: list[list[int]]

    def generate(self, input_ids, **kwargs):
        self.text_settings.append(kwargs)
        return torch.cat([input_ids, torch.tensor([self.script.pop(0)])], dim=1)

    def generate_image_codes(self, input_ids, grid, **kwargs):
        self.drawn.append((input_ids, grid, kwargs))
        return super().generate_image_codes(input_ids, grid, **kwargs)


class TestInterleaved:
    @pytest.fixture()
    def scripted(self):
        torch.manual_seed(0)
        model = Scripted(tiny_config()).eval()
        model.text_settings, model.drawn = [], []
        return model

    prompt = torch.tensor([[1, 2, 3]])
    negative = torch.tensor([[1, 9]])
    uncondition = torch.tensor([[7, 8]])

    def test_text_image_text_image_end(self, scripted):
        scripted.script = [[10, 11, 50, 42, 43, 52], [12, 50, 41, 44, 52], [13, 61]]
        sequence = scripted.generate_interleaved(
            self.prompt,
            negative_input_ids=self.negative,
            uncondition_ids=self.uncondition,
            guidance_scale=2.0,
            image_guidance_scale=1.0,
        )[0].tolist()
        (first, first_grid, first_settings), (second, second_grid, second_settings) = scripted.drawn
        assert (first_grid, second_grid) == ((2, 3), (1, 4))
        # what the model writes and what we write around it
        head = [1, 2, 3, 10, 11, 50, 42, 43, 52]
        assert sequence[: len(head)] == head and all(64 <= token < 96 for token in sequence[9:15])
        assert sequence[15:][:6] == [51, 12, 50, 41, 44, 52] and sequence[-3:] == [51, 13, 61]
        # guidance: simple at first, then away from the context without text, and from the text without context
        assert first[0].tolist() == head
        assert first_settings["negative_input_ids"].tolist() == [[1, 9, 50, 42, 43, 52]]
        assert first_settings["image_guidance_scale"] == 0.0
        assert second_settings["negative_input_ids"][0].tolist() == sequence[:16] + [7, 8, 50, 41, 44, 52]
        assert second_settings["negative_image_input_ids"].tolist() == [[1, 9, 12, 50, 41, 44, 52]]
        assert second_settings["image_guidance_scale"] == 1.0
        assert scripted.text_settings[0]["eos_token_id"] == [61, 52]

    def test_stops_at_the_most_images(self, scripted):
        scripted.script = [[10, 50, 42, 43, 52]] * 3
        sequence = scripted.generate_interleaved(self.prompt, max_images=2)
        assert len(scripted.drawn) == 2 and int(sequence[0, -1]) == 51

    def test_one_bar_counts_images_to_its_end(self, scripted, capsys):
        scripted.script = [[10, 50, 42, 43, 52], [61]]  # one image of four
        scripted.generate_interleaved(self.prompt, show_progress_bar=True)
        last = capsys.readouterr().err.strip().split("\r")[-1]
        assert "100%" in last and "4/4" in last

    def test_a_given_grid_replaces_the_header(self, scripted):
        scripted.script = [[10, 50, 42, 43, 52], [61]]
        sequence = scripted.generate_interleaved(self.prompt, grid=(2, 2), max_images=2)[0].tolist()
        assert sequence[3:8] == [10, 50, 42, 42, 52] and sequence[12:] == [51, 61]

    def test_a_broken_header_ends_the_text(self, scripted):
        scripted.script = [[10, 11, 12, 13, 52]]
        assert scripted.generate_interleaved(self.prompt)[0].tolist() == [1, 2, 3, 10, 11, 12, 13]

    def test_a_image_without_room_is_not_begun(self, scripted):
        scripted.config.text_config.max_position_embeddings = 40
        scripted.script = [[10, 50, 46, 46, 52]]
        assert scripted.generate_interleaved(self.prompt, max_new_tokens=8)[0].tolist() == [1, 2, 3, 10]


def test_codebook_and_vocabulary_must_fit():
    config = tiny_config().to_dict()
    config["vq_config"]["num_embeddings"] = 16
    with pytest.raises(Exception, match="`vq_config.num_embeddings` is 16, but the backbone's vocabulary has 32"):
        LLaDAUniConfig(**config)


def test_config_survives_a_copy(tmp_path):
    config = tiny_config()
    config.save_pretrained(tmp_path)
    loaded = LLaDAUniConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == copy.deepcopy(config).to_dict()
    assert loaded.text_config.mask_token_id == 63
