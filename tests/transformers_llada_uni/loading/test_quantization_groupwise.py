"""Four and eight bits with a scale for each group, by `quantization_config`: loading, saving, generating, QLoRA."""

import json
from unittest import mock

import pytest
import torch
from datasets import Dataset
from diffusers import DiffusionPipeline, PipelineQuantizationConfig
from peft import PeftModel, get_peft_model
from safetensors import safe_open
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    LlamaConfig,
)
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeExperts
from transformers.models.llama.modeling_llama import LlamaForCausalLM

from diffusers_llada_uni import embedded_checkpoint
from tests.transformers_llada_uni.training.training_common import RUN
from transformers_llada_uni import GroupwiseQuantizationConfig, LLaDA2MoeConfig
from transformers_llada_uni.generation import recording
from transformers_llada_uni.kernels.groupwise_modules import GroupwiseExperts, GroupwiseLinear
from transformers_llada_uni.training import LLaDAUniSFTConfig, LLaDAUniSFTTrainer
from transformers_llada_uni.training.lora import lora_config


FOLDER = embedded_checkpoint("emoji")
PROMPTS = ["a red apple", "full moon", "flag of Japan", "dog face"]
IDS = torch.arange(32, 96).view(2, 32)


def load(folder=FOLDER / "model", **settings):
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, **settings).eval()


@pytest.fixture(scope="module", params=[4, 8])
def quantized(request):
    return load(quantization_config=GroupwiseQuantizationConfig(bits=request.param))


@pytest.fixture(scope="module")
def full():
    return load()


def logits(model, ids=IDS, **inputs):
    with torch.no_grad():
        return model(input_ids=ids, **inputs).logits


def drawing_inputs():
    return AutoProcessor.from_pretrained(FOLDER / "processor")(text=PROMPTS, task="text_to_image")


# What is quantised


def test_quantises_layers_and_nothing_else(quantized, full):
    for name, module in full.named_modules():
        if ".mlp.experts." in name:  # the activation
            continue
        found = quantized.get_submodule(name)
        if isinstance(module, Glm4MoeExperts):
            assert type(found) is GroupwiseExperts
        elif type(module) is torch.nn.Linear and ".language_model.layers." in name:
            assert type(found) is GroupwiseLinear
        else:
            assert type(found) is type(module), name
    unchanged = {name: parameter for name, parameter in full.named_parameters() if ".layers." not in name}
    assert unchanged
    for name, parameter in unchanged.items():
        assert torch.equal(quantized.get_parameter(name), parameter), name


def test_takes_the_bits_that_were_asked_for(quantized, full):
    bits = quantized.config.quantization_config.bits
    for name, module in quantized.named_modules():
        if isinstance(module, GroupwiseExperts):
            plain = full.get_submodule(name).gate_up_proj
            assert module.gate_up_proj.nbytes * 8 == plain.numel() * bits
            assert module.gate_up_proj_scales.numel() * 64 == plain.numel()


def test_weights_are_near_what_they_were(quantized, full):
    tolerance = {4: 0.12, 8: 0.01}[quantized.config.quantization_config.bits]  # of the root mean square
    for name, module in quantized.named_modules():
        for own_name in getattr(module, "weight_names", ()):
            plain = getattr(full.get_submodule(name), own_name).detach()
            found = module.weights_of(own_name).dequantize(torch.float32).view_as(plain)
            assert (found - plain).norm() < tolerance * plain.norm(), f"{name}.{own_name}"


def test_only_what_is_not_quantised_takes_gradients(quantized):
    modules = [module for module in quantized.modules() if isinstance(module, GroupwiseExperts | GroupwiseLinear)]
    assert modules and not any(parameter.requires_grad for module in modules for parameter in module.parameters())
    assert {type(parameter) for parameter in quantized.parameters()} == {torch.nn.Parameter}


# What is computed


def test_predicts_what_the_full_weights_predict(quantized, full):
    found, wanted = (model.generate_image_codes(**drawing_inputs(), guidance_scale=2.0) for model in (quantized, full))
    assert (found == wanted).float().mean() > 0.9


def test_batch_equals_single(quantized):
    together = logits(quantized)
    for row in range(2):
        torch.testing.assert_close(logits(quantized, IDS[row : row + 1])[0], together[row], rtol=1e-4, atol=1e-4)


def test_experts_add_what_they_are_given(quantized):
    experts = next(module for module in quantized.modules() if isinstance(module, GroupwiseExperts))
    states, addend = torch.randn(2, 5, 256, generator=torch.Generator().manual_seed(0))
    index, weights = torch.tensor([[0, 3]] * 5), torch.tensor([[0.3, 0.7]] * 5)
    expected = experts(states, index, weights) + addend
    torch.testing.assert_close(experts(states, index, weights, addend=addend), expected)


def test_gradients_are_those_of_the_plain_product(quantized):
    linear = next(module for module in quantized.modules() if isinstance(module, GroupwiseLinear))
    states = torch.randn(2, 3, linear.in_features, generator=torch.Generator().manual_seed(0)).requires_grad_()
    weight = linear.weights_of("weight").dequantize(torch.float32)[0]
    outputs = linear(states)
    factors = torch.randn_like(outputs)
    (found,) = torch.autograd.grad((outputs * factors).sum(), states)
    torch.testing.assert_close(found, factors @ weight)


# Saving and loading


def test_comes_back_from_disk_as_it_was(quantized, tmp_path):
    quantized.save_pretrained(tmp_path / "once")
    again = load(tmp_path / "once")
    assert torch.equal(logits(again), logits(quantized))
    again.save_pretrained(tmp_path / "twice", max_shard_size="1MB")
    assert len(list((tmp_path / "twice").glob("*.safetensors"))) > 1
    assert torch.equal(logits(load(tmp_path / "twice")), logits(quantized))


def test_saves_what_it_holds(quantized, tmp_path):
    quantized.save_pretrained(tmp_path)
    found = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    bits = quantized.config.quantization_config.bits
    assert found == {"quant_method": "llada_uni_groupwise", "bits": bits, "group_size": 64}
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert names == set(quantized.state_dict())
    assert "model.language_model.layers.1.mlp.experts.gate_up_proj_scales" in names
    size = sum(tensor.nbytes for tensor in quantized.state_dict().values())
    assert (tmp_path / "model.safetensors").stat().st_size < 1.02 * size


def test_backbone_in_the_released_layout(official_tiny, tmp_path):
    config = GroupwiseQuantizationConfig(bits=8, group_size=16)
    ids = torch.arange(64)[None]
    for auto_class in (AutoModelForCausalLM, AutoModel):
        model = auto_class.from_pretrained(official_tiny, dtype=torch.float32, quantization_config=config).eval()
        plain = auto_class.from_pretrained(official_tiny, dtype=torch.float32).eval()
        experts = next(module for module in model.modules() if isinstance(module, GroupwiseExperts))
        plain = next(module for module in plain.modules() if isinstance(module, Glm4MoeExperts))
        for name in experts.weight_names:
            found = experts.weights_of(name).dequantize(torch.float32)
            torch.testing.assert_close(found, getattr(plain, name).detach(), rtol=0.0, atol=0.01)
        with torch.no_grad():
            found = model(input_ids=ids)[0]
        model.save_pretrained(tmp_path)
        again = auto_class.from_pretrained(tmp_path, dtype=torch.float32).eval()
        with torch.no_grad():
            assert torch.equal(again(input_ids=ids)[0], found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(tmp_path, dtype):
    settings = {"quantization_config": GroupwiseQuantizationConfig(group_size=32)}
    model = AutoModelForImageTextToText.from_pretrained(FOLDER / "model", dtype=dtype, **settings).eval()
    experts = next(module for module in model.modules() if isinstance(module, GroupwiseExperts))
    assert experts.gate_up_proj_scales.dtype == dtype
    model.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    found = logits(again)
    assert found.dtype == dtype and torch.equal(found, logits(model)) and bool(found.isfinite().all())


def test_pipeline(tmp_path):
    def draw(pipe):
        pipe.set_progress_bar_config(disable=True)
        return pipe("a red apple", generator=torch.Generator().manual_seed(0), output_type="np").images[0]

    config = GroupwiseQuantizationConfig()
    pipe = DiffusionPipeline.from_pretrained(FOLDER, model=load(quantization_config=config), dtype=torch.float32)
    picture = draw(pipe)
    pipe.save_pretrained(tmp_path)
    again = DiffusionPipeline.from_pretrained(tmp_path, dtype=torch.float32)
    assert again.model.config.quantization_config.bits == 4
    assert abs(draw(again) - picture).max() < 1e-3
    mapping = PipelineQuantizationConfig(quant_mapping={"model": config})
    mapped = DiffusionPipeline.from_pretrained(FOLDER, quantization_config=mapping, dtype=torch.float32)
    assert abs(draw(mapped) - picture).max() < 1e-3


# Recording


def test_recorded_where_the_kernels_run(quantized):
    with mock.patch.object(recording, "RECORDABLE_DEVICES", ("cpu",)):
        reason = recording.why_not_recorded(quantized.get_decoder(), quantized.lm_head)
        assert "computed one by one" in reason
        with mock.patch.object(recording, "is_kernel_device", lambda device: True):
            assert recording.why_not_recorded(quantized.get_decoder(), quantized.lm_head) is None


# Adapters


def train(model, steps):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=IDS, labels=IDS.flip(-1)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_adapter_learns_and_comes_back(tmp_path):
    config = GroupwiseQuantizationConfig()
    torch.manual_seed(0)
    model = get_peft_model(load(quantization_config=config), lora_config(r=4, experts=False))
    losses = train(model, 40)
    assert losses[-1] < 0.5 * losses[0]
    model.eval().save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(load(quantization_config=config), tmp_path).eval()
    assert torch.equal(logits(again), logits(model))
    with again.disable_adapter():
        assert not torch.equal(logits(again), logits(model))


def test_trainer_takes_it(official_tiny, tmp_path):
    config = GroupwiseQuantizationConfig(bits=8, group_size=16)
    model = AutoModelForCausalLM.from_pretrained(official_tiny, dtype=torch.float32, quantization_config=config)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ids = torch.randint(0, 400, (8, 64), generator=torch.Generator().manual_seed(0)).tolist()
    trainer = LLaDAUniSFTTrainer(
        model,
        LLaDAUniSFTConfig(
            str(tmp_path), **RUN | {"max_steps": 3, "learning_rate": 1e-2, "gradient_checkpointing": True}
        ),
        train_dataset=Dataset.from_dict({"input_ids": ids, "labels": ids}),
        processing_class=AutoTokenizer.from_pretrained(official_tiny),
        peft_config=lora_config(r=2, experts=False),
    )
    trainer.train()
    moved = [name for name, parameter in trainer.model.named_parameters() if "lora_B" in name and parameter.any()]
    assert moved
    for name, tensor in trainer.model.state_dict().items():
        base = name.replace("base_model.model.", "").replace(".base_layer", "")
        assert base not in before or torch.equal(tensor, before[base]), name


def test_refuses_adapters_of_packed_experts():
    model = get_peft_model(load(quantization_config=GroupwiseQuantizationConfig()), lora_config(r=2))
    with pytest.raises(ValueError, match="Quantised experts cannot be adapted.*experts=False"):
        logits(model)


# Bad input


@pytest.mark.parametrize("bits", [3, 16, "4", None])
def test_refuses_other_bits(bits):
    with pytest.raises(ValueError, match="`bits` must be 4 or 8"):
        GroupwiseQuantizationConfig(bits=bits)


@pytest.mark.parametrize("group_size", [8, 48, -1, 64.0, None])
def test_refuses_other_groups(group_size):
    with pytest.raises(ValueError, match="`group_size` must be a power of two"):
        GroupwiseQuantizationConfig(group_size=group_size)


def test_refuses_groups_that_do_not_divide():
    with pytest.raises(
        ValueError, match=r"layers\.1\.mlp\.experts .*`group_size` must divide half of the 128 columns"
    ):
        load(quantization_config=GroupwiseQuantizationConfig(group_size=128))


def test_refuses_an_implementation_that_cannot_compute_with_them():
    with pytest.raises(ValueError, match="`experts_implementation` 'fused_gather' cannot"):
        load(quantization_config=GroupwiseQuantizationConfig(), experts_implementation="fused_gather")


def test_refuses_to_quantise_what_stays_on_the_disk(tmp_path):
    with pytest.raises(ValueError, match="`device_map` leaves weights on the disk"):
        load(
            quantization_config=GroupwiseQuantizationConfig(),
            device_map={"model": "disk", "lm_head": "cpu"},
            offload_folder=tmp_path,
        )


def test_refuses_other_models(tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="`quantization_config` is for LLaDA2 backbones"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=GroupwiseQuantizationConfig())


def test_refuses_another_activation():
    with pytest.raises(ValueError, match="`hidden_act`.*'gelu'"):
        GroupwiseExperts(LLaDA2MoeConfig(hidden_act="gelu"), "int4", 64)
