"""Re-masking: what a block doubts is found anew. Against a literal loop, and on a model that has learnt something."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from diffusers_llada_uni import embedded_checkpoint
from tests.transformers_llada_uni.generation.planted_errors import planted_errors
from tests.transformers_llada_uni.generation.property_cases import tiny_backbone
from transformers_llada_uni.generation.continuous_batch import ContinuousBatch
from transformers_llada_uni.generation.sampling import commit_schedule
from transformers_llada_uni.generation.token_remasking import shares_of_best


BLOCK_LENGTH = 8
FIXTURES = Path(__file__).parents[2] / "fixtures" / "emoji"
SETTINGS = {"max_new_tokens": 20, "block_length": BLOCK_LENGTH, "eos_token_id": [], "num_steps_per_block": 3}
REMASKING = {"remasking_threshold": 0.5, "max_remasking_rounds": 2}


@pytest.fixture(scope="module")
def model():
    return tiny_backbone()


class TestRule:
    @pytest.mark.parametrize("use_cache", [True, False])
    def test_equals_the_literal_loop(self, model, use_cache):
        generator, num_doubted, num_changed = torch.Generator().manual_seed(0), 0, 0
        for length, threshold, rounds, num_steps in ((3, 0.3, 1, 4), (8, 0.9, 3, 3), (13, 1.0, 2, 8)):
            prompt = torch.randint(0, 60, (1, length), generator=generator)
            settings = {"threshold": 0.2, "remasking_threshold": threshold, "max_remasking_rounds": rounds}
            settings = SETTINGS | settings | {"num_steps_per_block": num_steps, "use_cache": use_cache}
            wanted, doubted = fill_literally(model, prompt[0].tolist(), settings)
            found = model.generate(prompt, **settings)[0].tolist()
            assert found == wanted
            num_doubted += doubted
            plain = settings | {"remasking_threshold": None}
            num_changed += found != model.generate(prompt, **plain)[0].tolist()
        assert num_doubted > 0 and num_changed > 0

    def test_a_row_in_a_batch_equals_the_row_alone(self, model):
        draw = torch.Generator().manual_seed(1)
        prompts = [torch.randint(0, 60, (length,), generator=draw) for length in (4, 11, 7)]
        settings = SETTINGS | REMASKING | {"do_sample": True, "threshold": 0.1}
        width = max(map(len, prompts))
        input_ids = torch.stack([torch.nn.functional.pad(prompt, (width - len(prompt), 0)) for prompt in prompts])
        attention_mask = torch.stack([(torch.arange(width) >= width - len(prompt)).long() for prompt in prompts])

        def generators():
            return [torch.Generator().manual_seed(seed) for seed in range(len(prompts))]

        together = model.generate(input_ids, attention_mask, generator=generators(), **settings)
        batch = ContinuousBatch(model, **settings)
        rows = [batch.add(prompt, generator=one) for prompt, one in zip(prompts, generators(), strict=True)]
        while batch.rows:
            batch.step()
        for found, row, prompt, one in zip(together, rows, prompts, generators(), strict=True):
            alone = model.generate(prompt[None], generator=one, **settings)[0, len(prompt) :].tolist()
            assert found[width:].tolist() == row.tokens == alone

    def test_nothing_is_less_than_a_share_of_0(self, model):
        prompt = torch.arange(10)[None]
        plain = model.generate(prompt, **SETTINGS)
        assert torch.equal(model.generate(prompt, remasking_threshold=0.0, **SETTINGS), plain)
        assert not torch.equal(model.generate(prompt, remasking_threshold=1.0, **SETTINGS), plain)

    def test_guided_codes_stay_codes_and_known_ones_stay_known(self, model):
        offset = model.config.image_token_offset
        arguments = {"input_ids": torch.arange(10)[None], "grid": (4, 4), "num_steps_per_block": 2}
        arguments |= {"negative_input_ids": torch.arange(7)[None], "guidance_scale": 2.0, "block_length": 8}
        anew = torch.arange(16)[None] % 3 > 0
        arguments |= {"image_codes": torch.arange(16)[None], "image_codes_mask": anew}
        plain = model.generate_image_codes(**arguments)
        found = model.generate_image_codes(**arguments, **REMASKING)
        assert torch.equal(found, model.generate_image_codes(**arguments, **REMASKING, use_cache=False))
        assert not torch.equal(found, plain)
        assert torch.equal(found[~anew], arguments["image_codes"][~anew])
        assert int(found.min()) >= 0 and int(found.max()) < model.config.vocab_size - offset

    def test_gaps_of_a_prompt_are_checked_and_its_words_are_not(self, model):
        prompt = torch.arange(10, 26)[None]
        prompt[0, [2, 3, 9]] = model.config.mask_token_id
        found = model.generate(prompt, **SETTINGS | {"max_new_tokens": 0}, remasking_threshold=1.0)
        is_word = prompt != model.config.mask_token_id
        assert torch.equal(found[is_word], prompt[is_word])
        assert not bool((found == model.config.mask_token_id).any())

    def test_shares(self):
        logits = torch.tensor([[1.0, 3.0], [2.0, 2.0]])
        shares = shares_of_best(logits, torch.tensor([0, 1]))
        torch.testing.assert_close(shares, torch.tensor([-2.0, 0.0]).exp())

    @pytest.mark.parametrize(
        "settings, message",
        [
            ({"remasking_threshold": 1.5}, "`remasking_threshold`"),
            ({"max_remasking_rounds": 0}, "`max_remasking_rounds`"),
            ({"remasking_threshold": 0.1, "editing_threshold": 0.9}, "takes the place of"),
        ],
    )
    def test_what_cannot_be_had_is_named(self, model, settings, message):
        with pytest.raises(ValueError, match=message):
            model.generate(torch.arange(4)[None], **settings)


def fill_literally(model, prompt: list[int], settings: dict) -> tuple[list[int], int]:
    """The rule over one row with whole forwards, token by token; and how many tokens were doubted."""
    mask_token_id, num_doubted = model.config.mask_token_id, 0
    length = -(-(len(prompt) + settings["max_new_tokens"]) // BLOCK_LENGTH) * BLOCK_LENGTH
    ids = prompt + [mask_token_id] * (length - len(prompt))
    num_steps = settings["num_steps_per_block"]

    def predict(stop: int) -> torch.Tensor:
        with torch.no_grad():
            logits = model(torch.tensor([ids[:stop]]), block_length=BLOCK_LENGTH).logits[0]
        logits[:, mask_token_id] = float("-inf")
        return logits

    def fill(start: int, counts: list[int]) -> None:
        for count in counts:
            masks = [column for column in range(start, start + BLOCK_LENGTH) if ids[column] == mask_token_id]
            if not masks:
                return
            best = predict(start + BLOCK_LENGTH).softmax(dim=-1).max(dim=-1)
            probabilities, tokens = best.values.tolist(), best.indices.tolist()
            chosen = [column for column in masks if probabilities[column] > settings["threshold"]]
            if len(chosen) < min(count, len(masks)):
                chosen = sorted(masks, key=lambda column: -probabilities[column])[:count]
            for column in chosen:
                ids[column] = tokens[column]

    for start in range(len(prompt) // BLOCK_LENGTH * BLOCK_LENGTH, length, BLOCK_LENGTH):
        stop = start + BLOCK_LENGTH
        generated = range(max(start, len(prompt)), stop)
        fill(start, commit_schedule(BLOCK_LENGTH, num_steps))
        for _ in range(settings["max_remasking_rounds"]):
            before = list(ids)
            for half in (generated[::2], generated[1::2]):
                for column in half:
                    ids[column] = mask_token_id
                probabilities = predict(stop).softmax(dim=-1)
                for column in half:
                    share = probabilities[column, before[column]] / probabilities[column].max()
                    if share >= settings["remasking_threshold"]:
                        ids[column] = before[column]
                    num_doubted += ids[column] == mask_token_id
            fill(start, [-(-BLOCK_LENGTH // num_steps)] * BLOCK_LENGTH)
            if ids == before:
                break
    return ids[: len(prompt) + settings["max_new_tokens"]], num_doubted


class TestPlantedErrors:
    """
    The shipped model, which was never trained to edit itself: of wrong tokens that are planted in finished blocks
    nothing is left, and what is right stays as it is.
    """

    REMASKING = {"remasking_threshold": 0.05}

    @pytest.fixture(scope="class")
    def names_and_codes(self):
        """For both a function of settings; the model with all that it is asked."""
        model = AutoModelForImageTextToText.from_pretrained(embedded_checkpoint("emoji") / "model").float().eval()
        processor = AutoProcessor.from_pretrained(embedded_checkpoint("emoji") / "processor")
        # Of hands that differ in their tone alone, the model itself doubts some.
        sheet, names = Image.open(FIXTURES / "emoji.png"), json.loads((FIXTURES / "names.json").read_text())[5:16]
        places = [(64 * (number % 8), 64 * (number // 8)) for number in range(5, 16)]
        pictures = [[sheet.crop((x, y, x + 64, y + 64)).convert("RGB")] for x, y in places]
        questions = processor(images=pictures, text=["what is this?"] * len(names), task="understanding")
        wishes = processor(text=names, task="text_to_image", height=64, width=64)
        return model, {
            "names": lambda **settings: model.generate(**questions, max_new_tokens=16, **settings),
            "codes": lambda **settings: model.generate_image_codes(**wishes, **settings),
        }

    @pytest.mark.parametrize("what", ["names", "codes"])
    def test_are_restored_and_clean_blocks_stay(self, names_and_codes, what):
        model, calls = names_and_codes
        generate, config = calls[what], model.config.get_text_config()
        clean = generate()
        assert torch.equal(generate(**self.REMASKING), clean)
        offset = config.image_token_offset
        with planted_errors(0.15, (offset, config.vocab_size) if what == "codes" else (3, offset)) as planted:
            found = generate(**self.REMASKING)
        assert sum(planted) >= 6
        assert torch.equal(found, clean)
