"""The image tokenizer's training: every term by hand, and that images find their captions."""

import copy
import json
import math

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset, Image
from PIL import Image as PILImage
from PIL import ImageDraw
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor, SiglipTextConfig, SiglipTextModel

from tests.common import assert_resumed_equals_uninterrupted
from transformers_llada_uni.training import LLaDAUniImageTokenizerConfig, LLaDAUniImageTokenizerTrainer
from transformers_llada_uni.training.image_tokenizer_loss import (
    codebook_statistics,
    recall_at_one,
    sigmoid_contrastive_loss,
)
from transformers_llada_uni.training.image_tokenizer_trainer import GroupSampler


RUN = {
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
    "lr_scheduler_type": "constant",
    "logging_steps": 5,
    "save_strategy": "no",
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 16,
    "resize_mode": "understanding",
}
COLOURS, SHAPES = ("red", "green", "blue", "yellow"), ("circle", "square", "cross", "ring")


def picture(colour, shape, offset=0):
    image = PILImage.new("RGB", (64, 64), "black")
    draw = ImageDraw.Draw(image)
    box = (12 + offset, 12 - offset, 52 + offset, 52 - offset)
    if shape == "circle":
        draw.ellipse(box, fill=colour)
    elif shape == "square":
        draw.rectangle(box, fill=colour)
    elif shape == "cross":
        draw.line(box, fill=colour, width=10)
        draw.line((box[0], box[3], box[2], box[1]), fill=colour, width=10)
    else:
        draw.ellipse(box, outline=colour, width=6)
    return image


def shapes(offsets=(0,)):
    rows = [(picture(c, s, o), f"a {c} {s}") for o in offsets for c in COLOURS for s in SHAPES]
    images, captions = zip(*rows, strict=True)
    return Dataset.from_dict({"image": list(images), "caption": list(captions)}).cast_column("image", Image())


def coloured_shapes():
    return (
        shapes()
        .add_column("content", [s for _ in COLOURS for s in SHAPES])
        .add_column("style", [c for c in COLOURS for _ in SHAPES])
    )


@pytest.fixture(scope="module")
def processor(converted_dir):
    return AutoProcessor.from_pretrained(converted_dir / "processor")


@pytest.fixture
def make_trainer(converted_dir, processor, tmp_path):
    def make(output_dir=tmp_path, dataset=None, side=64, **settings):
        """Images become squares of `side` pixels; few patches are soon trained on."""
        model = AutoModelForImageTextToText.from_pretrained(converted_dir / "model")
        own = copy.copy(processor)
        own.image_processor = copy.copy(processor.image_processor)
        own.image_processor.min_pixels = side**2
        torch.manual_seed(0)
        text_config = SiglipTextConfig(
            vocab_size=len(processor.tokenizer),
            hidden_size=48,
            intermediate_size=96,
            num_hidden_layers=1,
            num_attention_heads=4,
            max_position_embeddings=32,
            projection_size=48,
        )
        trainer = LLaDAUniImageTokenizerTrainer(
            model,
            SiglipTextModel(text_config),
            LLaDAUniImageTokenizerConfig(str(output_dir), **{**RUN, "max_text_length": 32, **settings}),
            train_dataset=shapes() if dataset is None else dataset,
            eval_dataset=coloured_shapes(),
            processing_class=own,
        )
        trainer.whole_model = model
        return trainer

    return make


def batch_of(trainer, num_rows=4):
    return trainer.data_collator([trainer.train_dataset[i] for i in range(num_rows)])


# Losses


def test_contrastive_loss_equals_the_formula():
    generator = torch.Generator().manual_seed(0)
    images, texts = (F.normalize(torch.randn(3, 5, generator=generator), dim=-1) for _ in range(2))
    scale, bias = torch.tensor(0.7), torch.tensor(-1.3)
    expected = 0.0
    for i in range(3):
        for j in range(3):
            logit = math.exp(0.7) * float(images[i] @ texts[j]) - 1.3
            expected -= math.log(1 / (1 + math.exp(-logit if i == j else logit)))
    loss = sigmoid_contrastive_loss(images, texts, scale, bias)
    assert loss.item() == pytest.approx(expected / 3, rel=1e-5)


def test_statistics_by_hand():
    statistics = codebook_statistics(torch.tensor([2.0, 2.0, 0.0, 0.0]))
    assert statistics == {"codebook_usage": 0.5, "codebook_perplexity": pytest.approx(2.0)}
    uneven = codebook_statistics(torch.tensor([3.0, 1.0]))["codebook_perplexity"]
    assert uneven == pytest.approx(math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25)))
    images = torch.eye(3)
    assert recall_at_one(images, images[[0, 2, 1]])["image_to_text_recall"] == pytest.approx(1 / 3)
    assert recall_at_one(images, images) == {"image_to_text_recall": 1.0, "text_to_image_recall": 1.0}


@pytest.mark.parametrize("codebook_update", ["ema", "gradient"])
def test_loss_equals_its_terms_by_hand(make_trainer, codebook_update):
    weights = {"commitment_weight": 0.3, "codebook_weight": 0.7, "reconstruction_weight": 0.2}
    trainer = make_trainer(codebook_update=codebook_update, **weights)
    trainer.model.eval()
    inputs = batch_of(trainer)
    with torch.no_grad():
        loss, outputs = trainer.compute_loss(trainer.model, inputs, return_outputs=True)
        holder = trainer.whole_model.model
        hidden = holder.visual(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"]).last_hidden_state
        kernel, shift = holder.vqmodel.quant_conv.weight[:, :, 0, 0], holder.vqmodel.quant_conv.bias
        features = F.normalize(hidden @ kernel.T + shift, dim=-1)
        codebook = F.normalize(holder.vqmodel.quantize.embedding.weight, dim=-1)
        codes = torch.cat(
            [c.flatten() for c in holder.get_image_codes(inputs["pixel_values"], inputs["image_grid_thw"])]
        )
        distance = (features - codebook[codes]).square().sum(dim=-1).mean()
        contrast = sigmoid_contrastive_loss(
            outputs.image_embeds, outputs.text_embeds, torch.tensor(10.0).log(), torch.tensor(-10.0)
        )
        kernel, shift = holder.vqmodel.post_quant_conv.weight[:, :, 0, 0], holder.vqmodel.post_quant_conv.bias
        pixels = trainer.model.pixel_projection(codebook[codes] @ kernel.T + shift)
        pixel_error = (pixels - inputs["pixel_values"]).square().mean()
    assert torch.equal(outputs.codes, codes)
    expected = contrast + 0.3 * distance + 0.2 * pixel_error
    expected = expected + (0.7 * distance if codebook_update == "gradient" else 0)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)


def test_gradients_go_where_they_should(make_trainer):
    """Straight through the quantiser to the vision tower; to the codebook only by its own loss."""
    for codebook_update in ("ema", "gradient"):
        trainer = make_trainer(codebook_update=codebook_update, commitment_weight=0.0)
        outputs = trainer.model(**batch_of(trainer))
        sigmoid_contrastive_loss(
            outputs.image_embeds, outputs.text_embeds, trainer.model.logit_scale, trainer.model.logit_bias
        ).backward()
        codebook = trainer.model.vqmodel.quantize.embedding.weight
        assert trainer.model.visual.patch_embed.proj.weight.grad.abs().sum() > 0
        assert codebook.grad is None or codebook.grad.abs().sum() == 0
        assert codebook.requires_grad == (codebook_update == "gradient")
    outputs = trainer.model(**batch_of(trainer))
    outputs.codebook_loss.backward()
    assert set(codebook.grad.abs().sum(dim=-1).nonzero().flatten().tolist()) <= set(outputs.codes.tolist())
    assert codebook.grad.abs().sum() > 0


def test_straight_through_gradient_is_that_of_the_code(make_trainer):
    """The gradient at the features equals the gradient that reaches the code that stands in for them."""
    quantize = make_trainer().model.vqmodel.quantize
    features = F.normalize(torch.randn(1, 32, 1, 5, generator=torch.Generator().manual_seed(0)), dim=1)
    features.requires_grad_(True)
    quantized, _, _ = quantize(features)
    weights = torch.randn(quantized.shape, generator=torch.Generator().manual_seed(1))
    (quantized * weights).sum().backward()
    # of length one already, so that normalising takes away the part along the features
    along = (weights * features).sum(dim=1, keepdim=True) * features
    torch.testing.assert_close(features.grad, (weights - along).detach(), atol=1e-5, rtol=1e-4)


# Shared codes


def test_shared_codes_by_hand(make_trainer):
    """Style codes are those of the mean over a colour, all others those of the mean over a shape."""
    trainer = make_trainer(dataset=coloured_shapes(), num_style_codes=2)
    inputs = batch_of(trainer, 16)
    with torch.no_grad():
        outputs = trainer.model(**inputs)
    features, codes = outputs.features.unflatten(0, (16, -1)), outputs.codes.unflatten(0, (16, -1))
    codebook = F.normalize(trainer.model.vqmodel.quantize.embedding.weight.detach(), dim=-1)
    own = (features @ codebook.T).argmax(dim=-1)
    for row, (content, style) in enumerate(
        zip(trainer.train_dataset["content"], trainer.train_dataset["style"], strict=True)
    ):
        for column, name, members in (("style", style, slice(None, 2)), ("content", content, slice(2, None))):
            group = [other for other, value in enumerate(trainer.train_dataset[column]) if value == name]
            mean = features[group][:, members].mean(dim=0)
            assert torch.equal(codes[row, members], (F.normalize(mean, dim=-1) @ codebook.T).argmax(dim=-1))
    assert outputs.sharing_agreement.item() == pytest.approx((own == codes).float().mean().item())
    assert outputs.sharing_agreement < 1
    commitment = (features - codebook[codes]).square().sum(dim=-1).mean()
    torch.testing.assert_close(outputs.commitment_loss, commitment)
    own_share = (features @ codebook.T / 0.05).log_softmax(dim=-1).gather(-1, codes[..., None])
    torch.testing.assert_close(outputs.sharing_loss, -own_share.mean())

    expected = 0.0
    for column, members in (("style", slice(None, 2)), ("content", slice(2, None))):
        values = trainer.train_dataset[column][:]
        means = {
            name: F.normalize(features[[value == name for value in values], members].mean(dim=0), dim=-1)
            for name in set(values)
        }
        for row, name in enumerate(values):
            cosines = {other: (features[row, members] * mean).sum(dim=-1).mean() for other, mean in means.items()}
            expected -= cosines[name] / 0.1 - torch.stack([cosine / 0.1 for cosine in cosines.values()]).logsumexp(0)
    torch.testing.assert_close(outputs.group_loss, expected / len(features))


def test_each_style_code_may_have_a_name_of_its_own(make_trainer):
    """The first code is that of a colour, the second that of a place; a name for both is the same as it twice."""
    dataset = coloured_shapes()
    places = [str(number % 3) for number in range(len(dataset))]
    styles = [[colour, place] for colour, place in zip(dataset["style"], places, strict=True)]
    trainer = make_trainer(dataset=dataset.remove_columns("style").add_column("style", styles), num_style_codes=2)
    inputs = batch_of(trainer, 16)
    with torch.no_grad():
        outputs = trainer.model(**inputs)
    features, codes = outputs.features.unflatten(0, (16, -1)), outputs.codes.unflatten(0, (16, -1))
    codebook = F.normalize(trainer.model.vqmodel.quantize.embedding.weight.detach(), dim=-1)
    values = trainer.train_dataset["style"][:]
    for row, names in enumerate(values):
        for code, name in enumerate(names):
            group = [other for other, value in enumerate(values) if value[code] == name]
            mean = F.normalize(features[group, code].mean(dim=0), dim=-1)
            assert codes[row, code] == (mean @ codebook.T).argmax()
    with pytest.raises(ValueError, match="`style` must be a name or a list of 2"):
        trainer.data_collator([{**trainer.train_dataset[0], "style": ["red"]}])


def test_mixed_precision_leaves_the_choice_of_codes_exact(make_trainer):
    """Under bf16 features are compared with codes in float32."""
    trainer = make_trainer(bf16=True, max_steps=1)
    trainer.train()
    with trainer.compute_loss_context_manager(), torch.no_grad():
        outputs = trainer.model(**batch_of(trainer, 4))
    assert outputs.features.dtype == outputs.image_embeds.dtype == torch.float32
    codebook = F.normalize(trainer.model.vqmodel.quantize.embedding.weight.detach(), dim=-1)
    assert torch.equal((outputs.features @ codebook.T).argmax(dim=-1), outputs.codes)


def test_images_learn_to_share_codes(make_trainer):
    """Alone, too, an image then has the codes of its shape and of its colour."""
    trainer = make_trainer(
        dataset=coloured_shapes(),
        side=96,
        num_style_codes=2,
        reconstruction_layers=1,
        reconstruction_weight=1.0,
        revival_threshold=0.0,  # with 16 images nearly all codes are dead, and new ones would only disturb
        group_weight=3.0,
        max_steps=50,
        learning_rate=1e-3,
        lr_scheduler_type="cosine",
        codebook_decay=0.9,
    )
    trainer.train()
    logged = [entry["sharing_agreement"] for entry in trainer.state.log_history if "sharing_agreement" in entry]
    assert logged[-1] > 0.9


def test_groups_stay_together_in_an_order_drawn_anew():
    groups = ["a", "b", "a", "c", "b", "a"]
    sampler = GroupSampler(groups, seed=0)
    orders = set()
    for epoch in range(6):
        sampler.set_epoch(epoch)
        order = list(sampler)
        assert sorted(order) == list(range(6)) and list(sampler) == order
        names = [groups[index] for index in order]
        assert sum(first != second for first, second in zip(names, names[1:], strict=False)) == 2
        orders.add(tuple(order))
    assert len(orders) > 1


def test_the_order_of_an_epoch_is_known_behind_all_wrappers(make_trainer):
    """Those of several processes, and of an epoch that is resumed, do not tell the sampler which one it is."""
    trainer = make_trainer(dataset=coloured_shapes(), num_style_codes=1)
    sampler, wanted = trainer._get_train_sampler(), GroupSampler(coloured_shapes()["content"][:], trainer.args.seed)
    wanted.set_epoch(3)
    assert list(sampler) != list(wanted)
    trainer.state.epoch = 3.25
    trainer.callback_handler.on_epoch_begin(trainer.args, trainer.state, trainer.control)
    assert list(sampler) == list(wanted)


def test_recomputed_activations_give_the_same_weights(make_trainer, tmp_path):
    settings = {"max_steps": 1, "per_device_train_batch_size": 2, "learning_rate": 1e-3}
    states = []
    for recomputes in (False, True):
        trainer = make_trainer(tmp_path / str(recomputes), activation_checkpointing=recomputes, **settings)
        trainer.train()
        towers = trainer.model.visual, trainer.model.text_model
        assert [tower.is_gradient_checkpointing for tower in towers] == [recomputes] * 2
        states.append(trainer.model.state_dict())
    for name, tensor in states[0].items():
        torch.testing.assert_close(tensor, states[1][name], rtol=0, atol=1e-6, msg=name)


def test_pixels_may_be_told_by_all_codes_of_a_image(make_trainer):
    """With layers between, the pixels of a patch hang on the codes of others; without, on its own alone."""
    for layers in (0, 1):
        model = make_trainer(reconstruction_layers=layers, resize_mode="editing").model.eval()
        side = model.visual.config.image_size // model.visual.config.patch_size
        num_patches = side**2
        codes = torch.randn(2 * num_patches, model.pixel_projection[0].in_features, requires_grad=True)
        model._pixels(codes, torch.tensor([[1, side, side]] * 2))[0].sum().backward()
        seen = codes.grad.abs().sum(dim=-1) > 0
        assert seen.sum() == (num_patches if layers else 1)


# Codebook


def test_moving_averages_by_hand(make_trainer):
    model = make_trainer().model
    counts, sums = model.code_counts.clone(), model.code_sums.clone()
    features = F.normalize(torch.randn(5, sums.shape[1], generator=torch.Generator().manual_seed(0)), dim=-1)
    codes = torch.tensor([3, 3, 7, 3, 9])
    seen = model.update_codebook(features, codes, decay=0.9, moves_codes=True)
    assert seen[[3, 7, 9]].tolist() == [3, 1, 1] and seen.sum() == 5
    for code in (3, 7, 9, 0):
        own = features[codes == code]
        count = 0.9 * counts[code] + 0.1 * len(own)
        total = 0.9 * sums[code] + 0.1 * own.sum(dim=0)
        torch.testing.assert_close(model.code_counts[code], count)
        torch.testing.assert_close(
            model.vqmodel.quantize.embedding.weight[code], F.normalize(total / count, dim=-1), atol=1e-6, rtol=1e-5
        )


def test_dead_codes_are_revived_from_the_batch(make_trainer):
    model = make_trainer().model
    model.code_counts.fill_(1.0)
    model.code_counts[:3] = 0.001
    features = F.normalize(
        torch.randn(6, model.code_sums.shape[1], generator=torch.Generator().manual_seed(0)), dim=-1
    )
    old = model.vqmodel.quantize.embedding.weight.detach().clone()
    assert model.revive_dead_codes(features, 0.1, torch.Generator().manual_seed(0)) == 3
    weight = model.vqmodel.quantize.embedding.weight
    for code in range(3):
        assert any(torch.equal(weight[code], feature) for feature in features)
    assert torch.equal(weight[3:], old[3:])
    assert model.revive_dead_codes(features, 0.1, torch.Generator().manual_seed(0)) == 0


# Training


@pytest.mark.parametrize("codebook_update", ["ema", "gradient"])
def test_images_find_their_captions(make_trainer, codebook_update, tmp_path):
    trainer = make_trainer(
        dataset=shapes((-4, -2, 2, 4)),
        max_steps=160,
        learning_rate=3e-3,
        codebook_update=codebook_update,
        codebook_decay=0.9,
    )
    before = trainer.evaluate()
    assert before["eval_image_to_text_recall"] <= 0.125  # chance is a sixteenth
    trainer.train()
    after = trainer.evaluate()
    # Measured with three seeds: 0.25 to 0.6875
    assert after["eval_image_to_text_recall"] >= 0.25 and after["eval_text_to_image_recall"] >= 0.25
    assert after["eval_codebook_perplexity"] > 5
    logged = [entry for entry in trainer.state.log_history if "contrastive_loss" in entry]
    assert logged[-1]["contrastive_loss"] < 0.5 * logged[0]["contrastive_loss"]
    assert {"commitment_loss", "codebook_usage", "codebook_perplexity"} <= logged[-1].keys()

    # What was trained is what the model uses, and what both layouts hold
    inputs = batch_of(trainer)
    pictures = (inputs["pixel_values"], inputs["image_grid_thw"])
    codes = trainer.whole_model.get_image_codes(*pictures)
    trainer.whole_model.save_pretrained(tmp_path / "model")
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "model")
    assert all(torch.equal(*pair) for pair in zip(loaded.get_image_codes(*pictures), codes, strict=True))
    trainer.save_model(str(tmp_path / "parts"))
    tensors = load_file(tmp_path / "parts" / "image_tokenizer" / "image_tokenizer.safetensors")
    state = trainer.whole_model.model.state_dict()
    expected = {f"model.{name}" for name in state if name.startswith(("visual.", "vqmodel."))}
    assert tensors.keys() == expected
    assert all(torch.equal(tensor, state[name.removeprefix("model.")]) for name, tensor in tensors.items())
    configs = json.loads((tmp_path / "parts" / "image_tokenizer" / "config.json").read_text())
    assert configs["vq_config"]["num_embeddings"] == len(trainer.model.code_counts)


def test_a_save_that_stops_leaves_the_old_result(make_trainer, tmp_path, monkeypatch):
    def files():
        return {path: path.read_bytes() for path in (tmp_path / "parts").rglob("*") if path.is_file()}

    def stop(*args, **kwargs):
        raise OSError("the disk is full")

    trainer = make_trainer(tmp_path / "run", max_steps=1)
    trainer.save_model(str(tmp_path / "parts"))
    before = files()
    monkeypatch.setattr("transformers_llada_uni.training.image_tokenizer_saving.save_file", stop)
    with pytest.raises(OSError, match="the disk is full"):
        trainer.save_model(str(tmp_path / "parts"))
    assert before and files() == before


def test_resumed_run_equals_the_uninterrupted_one(make_trainer, tmp_path):
    settings = {"learning_rate": 1e-3, "revival_interval": 1}
    settings |= {"revival_threshold": 0.5, "per_device_train_batch_size": 4}
    assert_resumed_equals_uninterrupted(make_trainer, tmp_path, **settings)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"commitment_weight": -1.0}, "commitment_weight"),
        ({"codebook_update": "adam"}, "codebook_update"),
        ({"codebook_decay": 1.5}, "codebook_decay"),
        ({"revival_interval": 0}, "revival_interval"),
        ({"num_style_codes": -1}, "num_style_codes"),
        ({"reconstruction_layers": 1.5}, "reconstruction_layers"),
        ({"sharing_weight": -1.0}, "sharing_weight"),
        ({"group_weight": -1.0}, "group_weight"),
        ({"resize_mode": "stretch"}, "resize_mode"),
        ({"max_text_length": 0}, "max_text_length"),
    ],
)
def test_bad_settings_are_refused(settings, name, tmp_path):
    with pytest.raises((ValueError, TypeError), match=f"`{name}`"):
        LLaDAUniImageTokenizerConfig(str(tmp_path), **settings)


def test_bad_data_are_refused(make_trainer):
    with pytest.raises(ValueError, match="`train_dataset`"):
        make_trainer(dataset=Dataset.from_dict({"image": ["a.png"]}))
    with pytest.raises(ValueError, match="a column `content` and a column `style`"):
        make_trainer(num_style_codes=1)
