"""SPRINT: what a token's importance is, how many are kept, and which step sees them."""

import pytest
import torch
from transformers import DynamicCache

from tests.transformers_llada_uni.generation.property_cases import tiny_backbone
from transformers_llada_uni import BlockDiffusionGenerationConfig
from transformers_llada_uni.generation import runners, sprint
from transformers_llada_uni.generation.sprint import SprintConfig


BLOCK_LENGTH = 8
SETTINGS = {"block_length": BLOCK_LENGTH, "num_steps_per_block": 4, "cache_implementation": "sprint"}
TEXT = SETTINGS | {"max_new_tokens": 20, "eos_token_id": []}
GUIDED = SETTINGS | {"grid": (4, 5), "guidance_scale": 2.0}


@pytest.fixture(scope="module")
def model():
    return tiny_backbone()


def prompt(length: int, seed: int = 0, num_ids: int = 60) -> torch.Tensor:
    """`(length,)`; ids from 64 on are image codes."""
    return torch.randint(0, num_ids, (length,), generator=torch.Generator().manual_seed(seed))


def left_padded(prompts: list[torch.Tensor], prefix: str = "") -> dict[str, torch.Tensor]:
    ids = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True, padding_value=62, padding_side="left")
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(one) for one in prompts], True, 0, padding_side="left")
    return {f"{prefix}input_ids": ids, f"{prefix}attention_mask": mask}


@pytest.fixture
def choices(monkeypatch):
    """Of each choice, in its order: the importance `(rows, prefix)` and what is visible of the prefix."""
    found: list[tuple[torch.Tensor, torch.Tensor]] = []
    choose = SprintConfig.choose

    def note(self, importance, is_image, visible):
        found.append((importance, visible))
        return choose(self, importance, is_image, visible)

    monkeypatch.setattr(SprintConfig, "choose", note)
    return found


def importance_by_hand(model, ids: torch.Tensor, alpha: float) -> torch.Tensor:
    """Of tokens `(length,)` of whole blocks, by one forward of all of them."""
    cache = DynamicCache()
    with torch.no_grad():
        model.model(ids[None], past_key_values=cache, block_length=BLOCK_LENGTH)
        logits = model(ids[None], block_length=BLOCK_LENGTH).logits[0]
    norms = torch.stack([layer.keys[0].pow(2).sum(dim=(0, 2)).sqrt() for layer in cache.layers])
    ratio = (norms / norms.mean(dim=-1, keepdim=True)).mean(dim=0)
    return alpha * ratio + (1 - alpha) * logits.softmax(dim=-1).amax(dim=-1)


def assert_by_hand(model, choices, rows: list[torch.Tensor], alpha: float) -> None:
    """`rows`: what was generated, prompt included, of all branches, each `(length,)` without padding."""
    assert choices
    for importance, visible in choices:
        for row, found, shown in zip(rows, importance, visible, strict=True):
            prefix = row[: int(shown.sum())]
            assert len(prefix) % BLOCK_LENGTH == 0
            if len(prefix):  # a shorter row may have its first block
                wanted = importance_by_hand(model, prefix, alpha)
                torch.testing.assert_close(found[shown], wanted, check_dtype=False, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("is_block_by_block", [False, True])
def test_importance_of_prompt_and_answer(model, choices, monkeypatch, is_block_by_block):
    """In a padded batch; once as flash attention wants the prompt."""
    monkeypatch.setattr(runners, "is_flash_attention_requested", lambda config: is_block_by_block)
    prompts = [prompt(21, num_ids=96), prompt(37, seed=1)]
    found = model.generate(**left_padded(prompts), **TEXT, cache_config={"importance_alpha": 0.3})
    rows = [row[37 - len(one) :] for one, row in zip(prompts, found, strict=True)]
    assert_by_hand(model, choices, rows, 0.3)
    assert [visible.shape[1] for _, visible in choices] == [32, 40, 48, 56]


def test_importance_of_both_branches(model, choices):
    prompts, negative = [prompt(19), prompt(11, seed=1)], [prompt(11, seed=2), prompt(3, seed=3)]
    codes = model.generate_image_codes(**left_padded(prompts), **left_padded(negative, "negative_"), **GUIDED)
    rows = [torch.cat([one, codes[index % 2] + 64]) for index, one in enumerate(prompts + negative)]
    assert_by_hand(model, choices, rows, 0.5)
    for one, other, row in zip(prompts, negative, codes, strict=True):
        alone = model.generate_image_codes(one[None], negative_input_ids=other[None], **GUIDED)
        assert torch.equal(alone[0], row)


def test_the_floor_of_what_there_is_of_each_kind():
    config = SprintConfig(image_keep_ratio=0.8, text_keep_ratio=0.5)
    importance = torch.tensor([[3.0, 1, 2, 9, 4, 8, 7, 6, 5, 0], [1.0, 2, 3, 4, 5, 6, 7, 8, 9, 10]])
    is_image = torch.tensor([[False] * 3 + [True] * 7, [False] * 9 + [True]])
    visible = torch.tensor([[True] * 3 + [False] + [True] * 6, [False] * 2 + [True] * 8])
    found = config.choose(importance, is_image, visible)
    # 1 of 3 and 4 of 6; 3 of 7, and of a single one itself.
    assert found[0].nonzero()[:, 0].tolist() == [0, 5, 6, 7, 8]
    assert found[1].nonzero()[:, 0].tolist() == [6, 7, 8, 9]
    everything = torch.ones(1, 100, dtype=torch.bool)
    assert SprintConfig(keep_ratio=0.29).choose(torch.rand(1, 100), everything, everything).sum() == 29


def test_the_first_step_of_a_block_sees_all(model):
    lengths = []
    hook = model.model.layers[0].attention.register_forward_hook(
        lambda module, args, kwargs, output: lengths.append(
            kwargs["past_key_values"].get_mask_sizes(
                args[0].shape[1] if args else kwargs["hidden_states"].shape[1], 0
            )[0]
        ),
        with_kwargs=True,
    )
    ids = torch.cat([prompt(23), 64 + prompt(17, num_ids=32)])[None]
    settings = TEXT | {"max_new_tokens": 16, "threshold": 1.0, "num_steps_per_block": 4}
    ratios = {"text_keep_ratio": 0.5, "image_keep_ratio": 0.8}
    model.generate(ids, **settings, cache_config=ratios)
    new = model.generate(ids, **settings, cache_config=ratios)[0, 40:48]
    hook.remove()
    num_images = int((new >= 64).sum())
    later = (31 - num_images) // 2 + int((17 + num_images) * 0.8 + 1e-6)
    assert lengths[:8] == [40 + 8] + [11 + 13 + 8] * 3 + [48 + 8] + [later + 8] * 3


def test_a_kept_prefix_is_the_exact_one(model):
    """With the exact cache's own schedule; and with a threshold as if the prefix were never pruned."""
    texts, scheduled = left_padded([prompt(16), prompt(40, seed=1)]), {"threshold": 1.0, "max_new_tokens": 24}
    exact = model.generate(**texts, **TEXT | scheduled | {"cache_implementation": "dynamic"})
    assert torch.equal(exact, model.generate(**texts, **TEXT | scheduled, cache_config={"keep_ratio": 1.0}))
    assert not torch.equal(exact, model.generate(**texts, **TEXT | scheduled, cache_config={"keep_ratio": 0.2}))
    settings = TEXT | {"threshold": 0.3}
    texts = left_padded([prompt(21), prompt(14, seed=1)])
    never = model.generate(**texts, **settings, cache_config={"cache_warmup_steps": 4, "keep_ratio": 0.1})
    assert torch.equal(never, model.generate(**texts, **settings, cache_config={"keep_ratio": 1.0}))


def test_a_row_of_a_batch_is_the_row_alone(model):
    prompts = [prompt(3), prompt(30, seed=1, num_ids=96), prompt(17, seed=2)]
    free = model.generate(**left_padded(prompts), **TEXT)
    ends = [int(free[0, 30 + 6])]  # the first row ends early
    settings = TEXT | {"eos_token_id": ends, "threshold": 0.3, "max_new_tokens": 30}
    sampling = {"do_sample": True}
    for extra in ({}, sampling):
        generators = [torch.Generator().manual_seed(row) for row in range(3)]
        together = model.generate(**left_padded(prompts), generator=generators, **settings, **extra)
        for row, one in enumerate(prompts):
            generator = [torch.Generator().manual_seed(row)]
            alone = model.generate(one[None], generator=generator, **settings, **extra)[0, len(one) :]
            assert torch.equal(alone, together[row, 30 : 30 + len(alone)])


def test_the_head_looks_at_each_token_of_a_pruned_kind_once(model, monkeypatch):
    monkeypatch.setattr(sprint, "POSITIONS_AT_ONCE", 64)
    seen = []

    def note(module, args, output):
        if args[0].ndim == 2:  # steps ask with all branches, `(branches, masks, hidden)`
            seen.append(len(args[0]))

    hook = model.lm_head.register_forward_hook(note)
    texts = left_padded([prompt(150), prompt(22, seed=1)])
    model.generate(**texts, **TEXT)
    counts = list(seen)
    model.generate(**texts, **TEXT | {"max_new_tokens": 2}, cache_config={"text_keep_ratio": 1.0})
    hook.remove()
    assert max(counts) == 64
    assert sum(counts) == 144 + 16 + 3 * 16  # whole blocks of the prompts, and those that another follows
    assert seen == counts  # where all text is kept, there is nothing to ask of it


def test_settings_of_older_files_are_read(tmp_path):
    """The names are the release's own."""
    names = {"keep_ratio": 0.4, "image_keep_ratio": 0.8, "text_keep_ratio": 1.0, "cache_warmup_steps": 2}
    names |= {"importance_alpha": 0.3, "confidence": "neg_entropy"}
    config = BlockDiffusionGenerationConfig(cache_implementation="sprint", cache_config=names)
    config.save_pretrained(tmp_path)
    found = BlockDiffusionGenerationConfig.from_pretrained(tmp_path).sprint_config()
    assert found == SprintConfig(**names) and set(names) == set(SprintConfig.__dataclass_fields__)


def test_three_branches_fall_back_to_the_exact_cache(model):
    arguments = GUIDED | {
        "input_ids": prompt(9)[None],
        "negative_input_ids": prompt(2)[None],
        "negative_image_input_ids": prompt(3, seed=1)[None],
        "image_guidance_scale": 1.0,
    }
    exact = model.generate_image_codes(**arguments | {"cache_implementation": "dynamic"})
    assert torch.equal(exact, model.generate_image_codes(**arguments))
