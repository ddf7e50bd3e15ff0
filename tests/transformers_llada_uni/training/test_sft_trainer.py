"""Supervised training: the loss against its formula, presets, load balancing, resuming, adapters."""

import copy
import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset, DatasetDict
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, TrlParser

from transformers_llada_uni import GroupwiseQuantizationConfig, LLaDA2MoeConfig, LLaDA2MoeForBlockDiffusion
from transformers_llada_uni.modeling_llada2_moe import LLaDA2MoeTopkRouter
from transformers_llada_uni.training.block_schedule import block_length_at
from transformers_llada_uni.training.lora import lora_config
from transformers_llada_uni.training.objective.block_diffusion import add_block_diffusion_head, document_ids_of
from transformers_llada_uni.training.objective.length_weighting import length_weights
from transformers_llada_uni.training.objective.noise import BlockDiffusionNoise, step_generators
from transformers_llada_uni.training.objective.router_balancing import RouterBalancing
from transformers_llada_uni.training.objective.token_corruption import TokenCorruption
from transformers_llada_uni.training.sft_config import LLaDAUniSFTConfig
from transformers_llada_uni.training.sft_trainer import LLaDAUniSFTTrainer
from transformers_llada_uni.training.stages import PARTS, STAGES, freeze_all_but, part_of


BLOCK = 8
LENGTH = 24
IMAGE_OFFSET = 512
ALL_MASKED = [0.999999, 1.0]


def tiny_model():
    torch.manual_seed(0)
    config = LLaDA2MoeConfig(
        vocab_size=768,
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=8,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        block_length=BLOCK,
        mask_token_id=441,
        eos_token_id=440,
        pad_token_id=440,
        image_token_offset=IMAGE_OFFSET,
        max_position_embeddings=128,
        initializer_range=0.2,
    )
    return LLaDA2MoeForBlockDiffusion(config)


def rows(num_rows=16, seed=0):
    """Prompts of 10 tokens; every second row answers with image codes. Rows 2, 6, 10, ... are a block shorter."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(0, 400, (num_rows, LENGTH), generator=generator)
    input_ids[1::2, 12:] = IMAGE_OFFSET + input_ids[1::2, 12:] % 256
    labels = input_ids.clone()
    labels[:, :10] = -100
    lengths = [LENGTH - BLOCK if row % 4 == 2 else LENGTH for row in range(num_rows)]
    return Dataset.from_dict(
        {
            "input_ids": [ids[:length] for ids, length in zip(input_ids.tolist(), lengths, strict=True)],
            "labels": [ids[:length] for ids, length in zip(labels.tolist(), lengths, strict=True)],
        }
    )


@pytest.fixture(scope="module")
def tokenizer(official_tiny):
    return AutoTokenizer.from_pretrained(official_tiny)


@pytest.fixture
def make_trainer(tmp_path, tokenizer):
    def make(model=None, dataset=None, eval_dataset=None, peft_config=None, folder="out", **settings):
        settings = {
            "max_steps": 4,
            "per_device_train_batch_size": 4,
            "logging_steps": 1,
            "learning_rate": 1e-2,
            "save_strategy": "no",
            "gradient_checkpointing": False,
            **settings,
        }
        args = LLaDAUniSFTConfig(str(tmp_path / folder), use_cpu=True, report_to=[], disable_tqdm=True, **settings)
        return LLaDAUniSFTTrainer(
            tiny_model() if model is None else model,
            args,
            train_dataset=rows() if dataset is None else dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            peft_config=peft_config,
        )

    return make


def collate(trainer, num_rows=4):
    return trainer.data_collator([trainer.train_dataset[row] for row in range(num_rows)])


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def state_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


# The loss


def loss_by_hand(model, inputs, masked, weights, num_items, settings):
    """A forward for every row, copy and block: the clean blocks before it, and the block with its masks."""
    text_weight, image_weight = (settings.get(name, 1.0) for name in ("text_weight", "image_weight"))
    confidence_weight = settings.get("confidence_weight", 0.0)
    betas = torch.ones(len(masked))
    if settings["length_weighting"]:
        lengths = (inputs["labels"] != -100).sum(dim=1)
        low, high = settings.get("noise_range", (1e-3, 1.0))
        share = 0.5 if settings.get("complementary", True) else (low + high) / 2
        scale = lengths.sum() / (lengths / (share * lengths).sqrt()).sum()
        betas = scale / masked.float().mean(dim=1).sum(dim=1).sqrt()
    total = torch.zeros(())
    for row, length in enumerate(inputs["attention_mask"].sum(dim=1).tolist()):
        for copy_number in range(masked.shape[1]):
            for begin in range(0, length, BLOCK):
                hidden = [i for i in range(begin, begin + BLOCK) if masked[row, copy_number, i]]
                if not hidden:
                    continue
                ids = inputs["input_ids"][row, : begin + BLOCK].clone()
                ids[hidden] = model.config.get_text_config().mask_token_id
                log_probs = model(input_ids=ids[None]).logits[0].log_softmax(dim=-1)
                for i in hidden:
                    label = inputs["labels"][row, i]
                    alpha = image_weight if label >= IMAGE_OFFSET else text_weight
                    term = -log_probs[i, label]
                    if log_probs[i].argmax() == label:
                        term = term - confidence_weight * (log_probs[i].exp() * log_probs[i]).sum()
                    total = total + betas[row] * alpha * weights[row, copy_number, i] * term
    return total / num_items


@pytest.mark.parametrize(
    "settings",
    [
        {"complementary": False, "length_weighting": False},
        {"complementary": True, "text_weight": 3.0, "image_weight": 0.25, "length_weighting": True},
        {
            "complementary": False,
            "num_noise_samples": 2,
            "noise_level": "sample",
            "image_weight": 0.0,
            "length_weighting": True,
        },
        {"weighting": "none", "noise_range": [0.3, 0.8], "text_weight": 0.5, "length_weighting": False},
        {"confidence_weight": 2.0, "text_weight": 2.0, "length_weighting": True},
    ],
)
@pytest.mark.parametrize("num_items", [None, 70])
def test_loss_is_the_formula(make_trainer, settings, num_items):
    trainer = make_trainer(**settings)
    inputs = collate(trainer)
    trainer.model.train()
    masked, weights = trainer.noise.sample(inputs["labels"], None, BLOCK, step_generators(trainer, 4))
    trainer.callback_handler.on_step_begin(trainer.args, trainer.state, trainer.control)  # the same noise again
    loss = trainer.compute_loss(trainer.model, dict(inputs), num_items_in_batch=num_items)
    with torch.no_grad():
        count = int((inputs["labels"] != -100).sum()) if num_items is None else num_items
        expected = loss_by_hand(trainer.model, inputs, masked, weights, count, settings)
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-4, atol=1e-5)


def test_gradients_follow_the_root_of_the_length(make_trainer):
    """With all masked and equal log-probabilities what is left of a document's share is beta times its length."""
    trainer = make_trainer(noise_range=ALL_MASKED, complementary=False)
    inputs = collate(trainer)
    masked = (inputs["labels"] != -100)[:, None]
    shares = (length_weights(masked, document_ids_of(inputs["labels"])) * masked[:, 0]).sum(dim=1)
    assert shares.tolist() == pytest.approx([math.sqrt(14), math.sqrt(14), math.sqrt(6), math.sqrt(14)])


def test_confidence_loss_makes_right_predictions_surer(make_trainer):
    """Its gradient alone, on labels that the model predicts: the entropy falls."""
    model = tiny_model()
    ids = torch.arange(2 * BLOCK)[None]
    hidden = ids.clone()
    hidden[:, BLOCK:] = model.config.mask_token_id
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    add_block_diffusion_head(model)
    masked = (torch.arange(2 * BLOCK) >= BLOCK)[None, None]

    def entropy_and_loss():
        labels = model(input_ids=hidden).logits.argmax(dim=-1)
        labels[:, :BLOCK] = -100
        inputs = {"input_ids": torch.where(labels == -100, ids, labels), "labels": labels}
        noise = {"masked": masked, "weights": masked.float()}
        terms = model(**inputs, **noise, keep_entropy=True, fused_lm_head=True)
        plain = model(**inputs, **noise, fused_lm_head=True)
        assert plain.confidence_loss is None and torch.equal(plain.log_probs, terms.log_probs)
        assert terms.is_top1.sum() == BLOCK  # all are right
        return terms.entropy.sum().item(), terms.confidence_loss.sum()

    before, loss = entropy_and_loss()
    assert loss.item() == pytest.approx(before)
    loss.backward()
    optimizer.step()
    after, _ = entropy_and_loss()
    assert after < before - 0.01


def test_wrong_tokens_are_shown_and_predicted():
    """A tenth of what is shown is wrong, a word for a word and a code for a code; each token's weight is as it was."""
    labels = torch.cat([torch.arange(400).repeat(500), IMAGE_OFFSET + torch.arange(200).repeat(1000)])[None]
    labels[:, ::7] = -100
    ids = labels.clamp(min=0)
    noise = BlockDiffusionNoise((0.2, 0.6), weighting="none")
    generators = [torch.Generator().manual_seed(0)]
    masked, weights = noise.sample(labels, None, BLOCK, generators)
    shares, documents = noise.masked_share(labels), torch.zeros_like(labels)
    shown, still_masked, new_weights = TokenCorruption(rate=0.1, weight=2.0).corrupt(
        ids, labels, masked, weights, shares, (IMAGE_OFFSET, 768), [441, 7], documents, BLOCK, generators
    )
    assert torch.equal(still_masked, masked)
    is_wrong = shown[:, 0] != ids
    is_shown = ~masked[:, 0] & (labels != -100)
    assert not is_wrong[~is_shown].any() and not (shown == 441).any() and not (shown[is_wrong[:, None]] == 7).any()
    assert is_wrong[is_shown].float().mean().item() == pytest.approx(0.1, abs=0.003)
    assert torch.equal(shown[:, 0] >= IMAGE_OFFSET, ids >= IMAGE_OFFSET)
    assert torch.equal(new_weights[masked], weights[masked])
    has_label = labels[0] != -100
    assert new_weights.sum(dim=1)[0, has_label].mean().item() == pytest.approx(3.0, abs=0.02)
    assert not new_weights.sum(dim=1)[0, ~has_label].any()


def test_who_learns_to_edit_repairs_what_is_wrong(make_trainer):
    dataset, repaired = rows(2), {}
    settings = {"max_steps": 100, "learning_rate": 2e-2, "corruption_rate": 0.4}
    for editing_weight in (2.0, 0.0):
        trainer = make_trainer(dataset=dataset, editing_weight=editing_weight, **settings)
        trainer.train()
        examiner = make_trainer(trainer.model, dataset, dataset, editing_weight=1.0, num_noise_samples=8)
        repaired[editing_weight] = examiner.evaluate()["eval_repaired"]  # of the tenth that is wrong by default
    assert repaired[2.0] > 0.8 and repaired[0.0] < 0.5, repaired


def test_wrong_tokens_of_a_row_do_not_depend_on_its_padding():
    labels = torch.randint(0, 768, (1, 20), generator=torch.Generator().manual_seed(1))
    corruption = TokenCorruption(rate=0.5, draft_share=0.5)

    def corrupt(length):
        padded = torch.nn.functional.pad(labels, (0, length - 20), value=-100)
        documents = torch.where(torch.arange(length) < 20, 0, -1)[None]
        generators = [torch.Generator().manual_seed(5)]
        noise = BlockDiffusionNoise(complementary=True)
        noised = noise.sample(padded, documents, BLOCK, generators)
        shares, vocabulary = noise.masked_share(padded), (IMAGE_OFFSET, 768)
        return corruption.corrupt(
            padded.clamp(min=0),
            padded,
            *noised,
            shares,
            vocabulary,
            [441],
            documents,
            BLOCK,
            generators,
            lambda blocks: torch.full(blocks.shape, 3),
        )

    for alone, padded in zip(corrupt(20), corrupt(32), strict=True):
        torch.testing.assert_close(padded[..., :20], alone, rtol=0, atol=0)


@torch.no_grad()
def test_drafts_are_what_the_model_puts_in_the_place_of_masks(make_trainer):
    """All masks of some blocks, none of the others; each token's weight is as it was."""
    settings = {"complementary": False, "num_noise_samples": 2, "noise_range": [0.3, 1.0], "weighting": "none"}
    settings |= {"editing_weight": 2.0, "corruption_rate": 0.0, "draft_share": 0.4}
    trainer, calls = make_trainer(**settings), []
    inputs = collate(trainer)
    ids, labels = inputs["input_ids"], inputs["labels"]
    noise, generators = trainer.noise, step_generators(make_trainer(**settings), len(ids))
    masked, _ = noise.sample(labels, document_ids_of(labels, inputs["attention_mask"]), BLOCK, generators)

    def model(**kwargs):
        calls.append(kwargs)
        return trainer.model(**kwargs)

    trainer.compute_loss(model, dict(inputs))
    shown, still_masked, weights = (calls[-1][name] for name in ("shown_ids", "masked", "weights"))
    num_drafted = num_left = 0
    for row, of_noise, begin in itertools.product(range(len(ids)), range(2), range(0, LENGTH, BLOCK)):
        block = slice(begin, begin + BLOCK)
        before, after = masked[row, of_noise, block], still_masked[row, of_noise, block]
        expected = ids[row, block]
        if before.any() and not after.any():
            noised = torch.cat([ids[row, :begin], expected.masked_fill(before, 441)])
            logits = trainer.model(input_ids=noised[None]).logits[0, block]
            logits[:, 441] = -torch.inf
            expected = torch.where(before, logits.argmax(dim=-1), expected)
            assert not torch.equal(expected, ids[row, block])  # it has not learnt anything
            num_drafted += 1
        else:
            assert torch.equal(after, before)
            num_left += int(before.any())
        assert torch.equal(shown[row, of_noise, block], expected)
    assert num_drafted > 2 and num_left > 2
    share = 0.65 * 0.6  # of the tokens that are expected to be masked still
    is_shown = ~still_masked & (labels != -100)[:, None]
    torch.testing.assert_close(weights, (still_masked / share + 2.0 * is_shown / (1 - share)) / 2)


def test_who_learns_from_drafts_makes_one_of_what_does_not_go_together(make_trainer):
    """Four answers to one question. Tokens drawn one by one are of one each, and none of the answers."""
    answers = torch.arange(100, 100 + 4 * BLOCK).view(4, BLOCK)
    ids = torch.cat([torch.arange(BLOCK).expand(4, -1), answers], dim=1)
    labels = torch.cat([torch.full((4, BLOCK), -100), answers], dim=1)
    dataset = Dataset.from_dict({"input_ids": ids.repeat(4, 1).tolist(), "labels": labels.repeat(4, 1).tolist()})
    settings = {"max_steps": 160, "learning_rate": 2e-2, "per_device_train_batch_size": 16, "noise_range": [0.3, 1.0]}
    settings |= {"weighting": "none", "complementary": False, "corruption_rate": 0.0, "logging_steps": 160}
    trainer = make_trainer(dataset=dataset, editing_weight=1.0, draft_share=0.5, **settings)
    trainer.train()
    model = trainer.model.eval()

    def share_of_answers():
        return (drafts[:, None, BLOCK:] == answers).all(dim=-1).any(dim=-1).float().mean().item()

    with torch.no_grad():
        drafts = ids[:1].repeat(64, 1)
        drafts[:, BLOCK:] = 441
        probabilities = model(input_ids=drafts[:1]).logits[0, BLOCK:].softmax(dim=-1)
        generator = torch.Generator().manual_seed(0)
        drafts[:, BLOCK:] = torch.multinomial(probabilities, 64, replacement=True, generator=generator).T
        assert share_of_answers() < 0.05
        for _ in range(3):
            drafts[:, BLOCK:] = model(input_ids=drafts).logits[:, BLOCK:].argmax(dim=-1)
        assert share_of_answers() > 0.3


def test_reports_each_modality(make_trainer):
    """With everything masked at t = 1, the numbers are those of the plain cross-entropy."""
    trainer = make_trainer(noise_range=ALL_MASKED, complementary=False, text_weight=2.0, image_weight=0.5)
    trainer.model.eval()
    inputs = collate(trainer)
    trainer.compute_loss(trainer.model, dict(inputs))
    metrics = {name: values[-1] for name, values in trainer._metrics["eval"].items()}

    losses, hits = {"text": [], "image": []}, {"text": [], "image": []}
    for row, length in enumerate(inputs["attention_mask"].sum(dim=1).tolist()):
        for begin in range(0, length, BLOCK):
            ids, labels = (
                inputs["input_ids"][row, : begin + BLOCK].clone(),
                inputs["labels"][row, begin : begin + BLOCK],
            )
            ids[begin:][labels != -100] = 441
            with torch.no_grad():
                log_probs = trainer.model(input_ids=ids[None]).logits[0, begin:].log_softmax(dim=-1)
            for place, label in enumerate(labels.tolist()):
                if label != -100:
                    modality = "image" if label >= IMAGE_OFFSET else "text"
                    losses[modality].append(-log_probs[place, label].item())
                    hits[modality].append(log_probs[place].argmax().item() == label)
    for modality in ("text", "image"):
        mean = sum(losses[modality]) / len(losses[modality])
        assert metrics[f"{modality}_loss"] == pytest.approx(mean, rel=1e-4)
        assert metrics[f"{modality}_accuracy"] == pytest.approx(sum(hits[modality]) / len(hits[modality]))
    all_hits = hits["text"] + hits["image"]
    assert metrics["mean_token_accuracy"] == pytest.approx(sum(all_hits) / len(all_hits))


@pytest.mark.parametrize(
    "settings", [{"length_weighting": True, "editing_weight": 1.0, "draft_share": 0.5}, {"length_weighting": False}]
)
def test_gradient_accumulation_equals_a_big_batch(make_trainer, settings):
    settings = {"confidence_weight": 1.0, **settings}
    settings |= {"max_steps": 3, "optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant"}
    big = make_trainer(per_device_train_batch_size=8, **settings)
    small = make_trainer(per_device_train_batch_size=2, gradient_accumulation_steps=4, **settings)
    big.train()
    small.train()
    torch.testing.assert_close(logged(small, "loss"), logged(big, "loss"), rtol=1e-4, atol=1e-5)
    for name, tensor in big.model.state_dict().items():
        torch.testing.assert_close(small.model.state_dict()[name], tensor, rtol=1e-4, atol=1e-5, msg=name)


def test_gradient_checkpointing_changes_nothing(make_trainer):
    """Neither the gradients nor the counts of the experts' loads, with a z-loss as well."""
    settings = {"max_steps": 2, "expert_bias_update_rate": 0.01, "router_z_loss_coefficient": 0.1}
    plain = make_trainer(**settings)
    checkpointed = make_trainer(gradient_checkpointing=True, **settings)
    plain.train()
    checkpointed.train()
    assert logged(checkpointed, "max_load_violation") == logged(plain, "max_load_violation")
    for name, tensor in plain.model.state_dict().items():
        torch.testing.assert_close(checkpointed.model.state_dict()[name], tensor, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("packing", [False, True])
def test_prepared_rows_that_are_too_long_are_left_out(make_trainer, packing, caplog):
    with caplog.at_level("WARNING"):
        trainer = make_trainer(max_length=LENGTH - BLOCK, packing=packing, eval_dataset=rows(4, seed=1))
    short = [row["input_ids"] for row in rows() if len(row["input_ids"]) < LENGTH]
    assert "12 of 16 rows are longer than `max_length` (16) and left out" in caplog.text
    assert sorted(trainer.train_dataset["input_ids"]) == sorted(short) and len(trainer.eval_dataset) == 1
    with pytest.raises(ValueError, match="None of the 16 rows fits into `max_length`"):
        make_trainer(max_length=BLOCK)


def test_lengths_are_weighed_over_all_processes_from_the_first_step_on(make_trainer, monkeypatch):
    """Before it, and after an evaluation, the model is not yet in training mode."""
    trainer, reduced = make_trainer(length_weighting=True), []
    trainer.model.eval()
    monkeypatch.setattr(trainer.accelerator, "reduce", lambda sums, reduction: reduced.append(sums) or 4 * sums)
    trainer.get_batch_samples(iter([collate(trainer)]), 1, trainer.args.device)
    assert len(reduced) == 1
    trainer.compute_loss(trainer.model, collate(trainer))  # of evaluation: each process its own
    assert len([sums for sums in reduced if sums.shape == (2,)]) == 1


@pytest.mark.parametrize("length_weighting", [True, False])
def test_packed_rows_have_the_loss_of_rows_apart(make_trainer, length_weighting):
    """trl takes the first token of each packed document out of the loss; here that is a prompt's."""
    settings = {"length_weighting": length_weighting}
    settings |= {"noise_range": ALL_MASKED, "complementary": False, "max_steps": 1, "per_device_train_batch_size": 16}
    apart = make_trainer(**settings)
    packed = make_trainer(packing=True, max_length=2 * LENGTH, **settings)
    apart.train()
    packed.train()
    assert len(packed.train_dataset) < len(apart.train_dataset)
    assert logged(packed, "loss")[0] == pytest.approx(logged(apart, "loss")[0], rel=1e-4)


def test_rows_that_are_packed_for_evaluation_alone_do_not_see_each_other(make_trainer):
    settings = {"noise_range": ALL_MASKED, "complementary": False, "per_device_eval_batch_size": 16}
    apart, packed = make_trainer(**settings), make_trainer(eval_packing=True, max_length=2 * LENGTH, **settings)
    wanted = apart.evaluate(rows(8, seed=1))["eval_loss"]
    trainer = make_trainer(eval_packing=True, max_length=2 * LENGTH, eval_dataset=rows(8, seed=1), **settings)
    assert len(trainer.eval_dataset) < 8 and len(trainer.train_dataset) == len(packed.train_dataset)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(wanted, rel=1e-3)


def test_evaluation_repeats_its_noise_and_keeps_the_final_blocks(make_trainer):
    trainer = make_trainer(block_lengths=[1], block_length_shares=[1.0], max_steps=2)
    first = trainer.evaluate(rows(6, seed=1))
    second = trainer.evaluate(rows(6, seed=1))
    assert first["eval_loss"] == second["eval_loss"]
    assert first["eval_block_length"] == BLOCK
    trainer.train()
    assert logged(trainer, "block_length") == [1, 1]
    assert trainer.evaluate(rows(6, seed=1))["eval_loss"] != first["eval_loss"]


# Stages


def test_blocks_of_the_schedule_come_in_order():
    lengths = [block_length_at(step, 50, 32, [1, 4, 64], [0.1, 0.2, 0.3]) for step in range(50)]
    assert lengths == [1] * 5 + [4] * 10 + [64] * 15 + [32] * 20
    assert block_length_at(0, 50, 24) == 24
    preset = STAGES["from_autoregressive"]
    lengths = [
        block_length_at(step, 100, 32, preset.block_lengths, preset.block_length_shares) for step in (0, 50, 99)
    ]
    assert lengths == [1, 4096, 32]


def test_training_follows_the_schedule(make_trainer):
    """Blocks longer than a row, too: the row is the block."""
    trainer = make_trainer(max_steps=4, block_lengths=[1, 64], block_length_shares=[0.25, 0.5])
    trainer.train()
    assert logged(trainer, "block_length") == [1, 64, 64, BLOCK]


@pytest.mark.parametrize("stage", STAGES)
def test_frozen_parts_stay_frozen(make_trainer, stage):
    trainer = make_trainer(stage=stage, packing=False, max_steps=2)
    before = state_of(trainer.model)
    trainer.train()
    for name, tensor in trainer.model.state_dict().items():
        if name.endswith("expert_bias"):
            is_trained = STAGES[stage].expert_bias_update_rate > 0
        else:
            is_trained = part_of(name) in STAGES[stage].trained_parts
        assert torch.equal(tensor, before[name]) is not is_trained, name


def test_every_parameter_of_the_composite_belongs_to_a_part(converted_dir):
    from transformers_llada_uni import LLaDAUniForConditionalGeneration

    model = LLaDAUniForConditionalGeneration.from_pretrained(converted_dir / "model")
    assert {part_of(name) for name, _ in model.named_parameters()} == set(PARTS)
    freeze_all_but(model, ["attention"])
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained and all(".attention." in name and "language_model" in name for name in trained)


def test_stage_sets_what_the_user_does_not(tmp_path):
    preset = LLaDAUniSFTConfig(str(tmp_path), stage="pretraining")
    assert (preset.learning_rate, preset.packing) == (1e-4, True)
    own = LLaDAUniSFTConfig(str(tmp_path), stage="pretraining", learning_rate=5e-5, packing=False)
    assert (own.learning_rate, own.packing) == (5e-5, False)


def test_config_is_read_from_the_command_line(tmp_path):
    options = "--stage alignment --noise_range 0.1 0.9 --trained_parts head norms --complementary true"
    mix = '{"text": 1, "editing": 2}'
    (args,) = TrlParser(LLaDAUniSFTConfig).parse_args_and_config(
        ["--output_dir", str(tmp_path), "--use_cpu", "true", "--task_mix", mix, *options.split()]
    )
    assert args.make_noise() == BlockDiffusionNoise((0.1, 0.9), complementary=True)
    assert (args.trained_parts, args.learning_rate) == (["head", "norms"], 1e-3)
    assert args.task_mix == {"text": 1, "editing": 2}


# Routers


@pytest.mark.parametrize("update", ["normalized", "sign"])
def test_expert_bias_follows_the_loads(make_trainer, update):
    """One step of two accumulated batches with padding; the loads are counted from the objective's own definition."""
    trainer = make_trainer(
        max_steps=1,
        gradient_accumulation_steps=2,
        expert_bias_update_rate=0.25,
        expert_bias_update=update,
        complementary=False,
        seed=3,
    )
    routers = [module for module in trainer.model.modules() if isinstance(module, LLaDA2MoeTopkRouter)]
    seen = []
    hooks = [
        router.register_forward_hook(lambda module, args, output: seen.append((module, output[2])))
        for router in routers
    ]
    batches = []
    plain_loss = trainer.compute_loss

    def compute_loss(model, inputs, **kwargs):
        batches.append(inputs)
        return plain_loss(model, inputs, **kwargs)

    trainer.compute_loss = compute_loss
    trainer.train()
    for hook in hooks:
        hook.remove()
    assert any(bool((batch["attention_mask"] == 0).any()) for batch in batches)

    for router in routers:
        load = torch.zeros(8)
        indices = [index for module, index in seen if module is router]
        for batch, index in zip(batches, indices, strict=True):
            # Of each row the blocks with labels (prompts of 10 tokens: all but the first), then those before the last.
            length = batch["attention_mask"].sum(dim=1)
            num_tokens = length - BLOCK + (length - 1) // BLOCK * BLOCK
            is_token = (torch.arange(int(num_tokens.max())) < num_tokens[:, None]).flatten()
            for experts in index[is_token].tolist():
                for expert in experts:
                    load[expert] += 1
        error = load.mean() - load
        direction = error.sign() if update == "sign" else error / error.square().mean().sqrt()
        torch.testing.assert_close(router.expert_bias, 0.25 * direction)
    assert logged(trainer, "max_load_violation")[0] > 0


def test_expert_bias_evens_the_loads_and_is_saved(make_trainer, tmp_path):
    model = tiny_model()
    freeze_all_but(model, ["head"])
    trainer = make_trainer(
        model,
        trained_parts=["head"],
        max_steps=60,
        per_device_train_batch_size=16,
        learning_rate=0.0,
        expert_bias_update_rate=0.01,
    )
    trainer.train()
    violations = logged(trainer, "max_load_violation")
    assert sum(violations[-5:]) < 0.5 * sum(violations[:5])
    trainer.save_model(tmp_path / "saved")
    loaded = LLaDA2MoeForBlockDiffusion.from_pretrained(tmp_path / "saved")
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert any(tensor.any() for name, tensor in loaded.state_dict().items() if name.endswith("expert_bias"))


def test_z_loss_is_the_formula():
    model = tiny_model()
    balancing = RouterBalancing(model, 0.0, None, None)
    ids = torch.arange(12).view(1, 12)
    is_token = torch.arange(12)[None] < 9
    with balancing.recording(is_token, keep_logits=True):
        logits = model(input_ids=ids, output_router_logits=True).router_logits
    expected = torch.stack([layer[:9].exp().sum(dim=-1).log().square().mean() for layer in logits]).mean()
    found = balancing.z_loss(is_token)
    torch.testing.assert_close(found, expected)
    assert found.requires_grad


# Resuming


@pytest.mark.parametrize("kind", ["all", "adapter", "packed"])
def test_resumed_run_equals_the_uninterrupted_one(make_trainer, kind):
    settings = {"max_steps": 6, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    settings |= {
        "save_strategy": "steps",
        "save_steps": 3,
        "block_lengths": [2],
        "block_length_shares": [0.5],
        "num_noise_samples": 2,
        "editing_weight": 1.0,
        "draft_share": 0.5,
    }
    if kind != "adapter":
        settings |= {"expert_bias_update_rate": 0.01}
    if kind == "packed":
        settings |= {"packing": True, "max_length": 2 * LENGTH}
    peft_config = lora_config(r=2) if kind == "adapter" else None

    whole = make_trainer(folder="whole", peft_config=peft_config, **settings)
    whole.train()
    make_trainer(folder="killed", peft_config=copy.deepcopy(peft_config), **settings).train()
    resumed = make_trainer(folder="killed", peft_config=copy.deepcopy(peft_config), **settings)
    resumed.train(resume_from_checkpoint=f"{resumed.args.output_dir}/checkpoint-3")
    assert logged(resumed, "loss")[3:] == logged(whole, "loss")[3:]
    state = whole.model.state_dict()
    for name, tensor in resumed.model.state_dict().items():
        assert torch.equal(tensor, state[name]), name


def test_best_model_is_loaded_whole(make_trainer):
    """The first of two equally good checkpoints is the best; the experts come back too."""
    trainer = make_trainer(
        max_steps=2,
        learning_rate=0.5,
        optim="sgd",
        lr_scheduler_type="constant",
        eval_dataset=rows(4, seed=1),
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=1,
        save_steps=1,
        load_best_model_at_end=True,
        greater_is_better=True,
        metric_for_best_model="block_length",
    )
    trainer.train()
    best = LLaDA2MoeForBlockDiffusion.from_pretrained(trainer.state.best_model_checkpoint).state_dict()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-1")
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(tensor, best[name]), name


def test_an_adapter_goes_on_in_the_precision_that_it_had(make_trainer):
    """trl trains adapters upon weights of few bits in bfloat16; peft would load them in float32."""
    settings = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    trainer = make_trainer(peft_config=lora_config(r=2), **settings)
    trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.data = parameter.data.bfloat16()
    trainer.train()
    trainer.state.best_model_checkpoint = checkpoint = f"{trainer.args.output_dir}/checkpoint-1"
    for load in (lambda: trainer._load_from_checkpoint(checkpoint), trainer._load_best_model):
        load()
        assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.bfloat16}


def test_processor_is_saved_with_checkpoints(make_trainer, tmp_path):
    trainer = make_trainer(max_steps=1, save_strategy="steps", save_steps=1)
    trainer.train()
    saved = tmp_path / "out" / "checkpoint-1"
    assert AutoTokenizer.from_pretrained(saved).get_vocab() == trainer.processing_class.get_vocab()
    assert LLaDA2MoeForBlockDiffusion.from_pretrained(saved).generation_config.block_length == BLOCK


# Bad input


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"stage": "warmup"}, "`stage`.*'warmup'"),
        ({"trained_parts": ["heads"]}, "`trained_parts`.*heads"),
        ({"trained_parts": ["image_tokenizer"]}, "`trained_parts`.*image_tokenizer"),
        ({"trained_parts": []}, "`trained_parts`"),
        ({"block_length": 0}, "`block_length`.*0"),
        ({"block_lengths": [1, 2]}, "`block_lengths` and `block_length_shares`"),
        ({"block_lengths": [1, 2], "block_length_shares": [0.5]}, "`block_length_shares`.*2"),
        ({"block_lengths": [0], "block_length_shares": [0.5]}, "`block_lengths`.*0"),
        ({"block_lengths": [1, 2], "block_length_shares": [0.6, 0.5]}, "`block_length_shares`.*at most 1"),
        ({"noise_range": [0.5, 0.5]}, "`noise_range`"),
        ({"noise_level": "row"}, "`noise_level`.*'row'"),
        ({"weighting": "t"}, "`weighting`.*'t'"),
        ({"text_weight": -1.0}, "`text_weight`.*-1"),
        ({"text_weight": 0.0, "image_weight": 0.0}, "`text_weight` and `image_weight`"),
        ({"image_weight": math.nan}, "`image_weight`.*nan"),
        ({"expert_bias_update_rate": -0.1}, "`expert_bias_update_rate`.*-0.1"),
        ({"expert_bias_update": "error"}, "`expert_bias_update`.*'error'"),
        ({"editing_weight": -1.0}, "`editing_weight`.*-1"),
        ({"corruption_rate": 1.5}, "`corruption_rate`.*1.5"),
        ({"draft_share": 1.5}, "`draft_share`.*1.5"),
        ({"draft_share": 0.5}, "`draft_share`.*0.5.*`editing_weight`"),
        ({"confidence_weight": -1.0}, "`confidence_weight`.*-1"),
        ({"router_z_loss_coefficient": -0.1}, "`router_z_loss_coefficient`.*-0.1"),
        ({"caption_dropout": 1.5}, "`caption_dropout`.*1.5"),
        ({"image_dropout": "a"}, "`image_dropout`.*'a'"),
        ({"task_mix": {"text": 0.0}}, "`task_mix`"),
        ({"task_mix": {"text": -1.0}}, "`task_mix.*text.*-1"),
        ({"loss_type": "dft"}, "`loss_type`.*'dft'"),
        ({"packing_strategy": "wrapped"}, "`packing_strategy`.*'wrapped'"),
        ({"completion_only_loss": False}, "`completion_only_loss`.*False"),
        ({"label_smoothing_factor": 0.1}, "`label_smoothing_factor`.*0.1"),
    ],
)
def test_config_refuses_by_name(tmp_path, settings, message):
    with pytest.raises((ValueError, TypeError), match=message):
        LLaDAUniSFTConfig(str(tmp_path), use_cpu=True, **settings)


def test_trainer_refuses_by_name(make_trainer, tmp_path, tokenizer):
    with pytest.raises(ValueError, match="`max_length` .44. must be a multiple of `block_length` .8."):
        make_trainer(packing=True, max_length=44)
    with pytest.raises(ValueError, match="`trained_parts`.*adapter"):
        make_trainer(peft_config=lora_config(), trained_parts=["head"])
    with pytest.raises(ValueError, match="`expert_bias_update_rate`.*adapter"):
        make_trainer(peft_config=lora_config(), expert_bias_update_rate=0.1)
    with pytest.raises(TypeError, match="`args` must be a LLaDAUniSFTConfig, got SFTConfig"):
        LLaDAUniSFTTrainer(tiny_model(), SFTConfig(str(tmp_path), bf16=False), train_dataset=rows())
    args = LLaDAUniSFTConfig(str(tmp_path), use_cpu=True)
    for dataset in (None, rows().select([])):
        with pytest.raises(ValueError, match="`train_dataset`"):
            LLaDAUniSFTTrainer(tiny_model(), args, train_dataset=dataset, processing_class=tokenizer)
    with pytest.raises(ValueError, match="`compute_metrics`"):
        LLaDAUniSFTTrainer(
            tiny_model(), args, train_dataset=rows(), processing_class=tokenizer, compute_metrics=SimpleNamespace()
        )
    for dataset, message in (
        ({"poetry": rows()}, "`task_mix`.*poetry.*'text'"),  # the allowed names
        (DatasetDict(train=rows(), test=rows()), r"`train_dataset` has 2 splits.*train_dataset\['test'\]"),
    ):
        with pytest.raises(ValueError, match=message):
            LLaDAUniSFTTrainer(tiny_model(), args, train_dataset=dataset, processing_class=tokenizer)


def test_adapters_of_experts_in_few_bits_are_refused(make_trainer, official_tiny):
    config = GroupwiseQuantizationConfig(bits=8, group_size=32)
    model = AutoModelForCausalLM.from_pretrained(official_tiny, quantization_config=config)
    with pytest.raises(ValueError, match="Quantised experts cannot be adapted"):
        make_trainer(model=model, peft_config=lora_config(r=2))


def test_lora_config_refuses_by_name():
    with pytest.raises(ValueError, match="`r`.*0"):
        lora_config(r=0)
    with pytest.raises(ValueError, match="`lora_dropout`.*0.1"):
        lora_config(lora_dropout=0.1)
    with pytest.raises(ValueError, match="`attention`, `mlps` and `experts`"):
        lora_config(attention=False, mlps=False, experts=False)
