"""What every model of the project must do, whatever it computes: the checks of transformers' and diffusers' testers
that matter here (those testers are not in the wheels)."""

import copy

import pytest
import torch
from safetensors import safe_open


class ModelTesterMixin:
    """
    A test class that inherits this gives `model()`, a fresh small model in eval mode with fixed weights, and
    `inputs()`, arguments of `forward` for a batch of two. `output(outputs)` picks the tensor to compare.
    """

    attention_implementations: tuple[str, ...] = ()
    has_experts = False
    splits_over_devices = False
    supports_gradient_checkpointing = False

    def model(self):
        raise NotImplementedError

    def inputs(self) -> dict:
        raise NotImplementedError

    def output(self, outputs) -> torch.Tensor:
        raise NotImplementedError

    def run(self, model, **inputs) -> torch.Tensor:
        with torch.no_grad():
            return self.output(model(**inputs))

    def test_is_deterministic(self):
        model = self.model()
        assert torch.equal(self.run(model, **self.inputs()), self.run(model, **self.inputs()))

    def test_save_and_load(self, tmp_path):
        model = self.model()
        model.save_pretrained(tmp_path)
        loaded = type(model).from_pretrained(tmp_path).eval()
        state = model.state_dict()
        assert loaded.state_dict().keys() == state.keys()
        for name, tensor in loaded.state_dict().items():
            assert torch.equal(tensor, state[name]), name
        torch.testing.assert_close(self.run(loaded, **self.inputs()), self.run(model, **self.inputs()))

    def test_saves_safetensors_only(self, tmp_path):
        self.model().save_pretrained(tmp_path)
        suffixes = {path.suffix for path in tmp_path.rglob("*") if path.is_file()}
        assert suffixes - {".py"} <= {".json", ".safetensors"}
        assert {path.stem for path in tmp_path.rglob("*.py")} <= {"load_llada_uni"}  # which holds no model

    def test_saves_in_shards(self, tmp_path):
        model = self.model()
        model.save_pretrained(tmp_path, max_shard_size="60KB")
        shards = list(tmp_path.glob("*.safetensors"))
        assert len(shards) > 1
        loaded = type(model).from_pretrained(tmp_path).eval()
        torch.testing.assert_close(self.run(loaded, **self.inputs()), self.run(model, **self.inputs()))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_loads_in_half_precision(self, tmp_path, dtype):
        model = self.model()
        model.save_pretrained(tmp_path)
        loaded = type(model).from_pretrained(tmp_path, torch_dtype=dtype).eval()
        assert loaded.dtype == dtype
        inputs = {
            name: value.to(dtype) if torch.is_tensor(value) and value.is_floating_point() else value
            for name, value in self.inputs().items()
        }
        assert bool(self.run(loaded, **inputs).isfinite().all())

    def test_device_map(self, tmp_path):
        model = self.model()
        model.save_pretrained(tmp_path)
        loaded = type(model).from_pretrained(tmp_path, device_map="cpu").eval()
        torch.testing.assert_close(self.run(loaded, **self.inputs()), self.run(model, **self.inputs()))

    def test_offloads_to_disk(self, tmp_path):
        if not self.splits_over_devices:
            pytest.skip("has no layers to leave on the disk")
        model = self.model()
        model.save_pretrained(tmp_path / "model")
        loaded = type(model).from_pretrained(
            tmp_path / "model", device_map=self.disk_map(), offload_folder=tmp_path / "offload"
        )
        assert any(parameter.is_meta for parameter in loaded.parameters())
        torch.testing.assert_close(self.run(loaded, **self.inputs()), self.run(model, **self.inputs()))

    def disk_map(self) -> dict[str, str]:
        """A device map that leaves some modules on the disk."""
        raise NotImplementedError

    def test_batch_equals_single(self):
        model, inputs = self.model(), self.inputs()
        together = self.run(model, **inputs)
        for row in range(2):
            alone = {
                name: value[row : row + 1] if torch.is_tensor(value) and value.shape[0] == 2 else value
                for name, value in inputs.items()
            }
            torch.testing.assert_close(self.run(model, **alone)[0], together[row], rtol=1e-4, atol=1e-5)

    def test_attention_implementations_agree(self):
        model, inputs = self.model(), self.inputs()
        for implementation in self.attention_implementations:
            other = copy.deepcopy(model)
            other.set_attn_implementation(implementation)
            with uncompiled():
                output = self.run(other, **inputs)
            torch.testing.assert_close(output, self.run(model, **inputs), rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
    def test_experts_implementations_agree(self, implementation):
        if not self.has_experts:
            pytest.skip("has no experts")
        model = self.model()
        expected = self.run(model, **self.inputs())
        model.set_experts_implementation(implementation)
        torch.testing.assert_close(self.run(model, **self.inputs()), expected, rtol=1e-4, atol=1e-4)

    def test_training_step_reaches_every_parameter(self):
        model = self.model().train()
        self.output(model(**self.inputs())).float().pow(2).mean().backward()
        frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
        without = {
            name for name, parameter in model.named_parameters() if parameter.grad is None and name not in frozen
        }
        assert without <= self.parameters_without_gradient(model)

    def parameters_without_gradient(self, model) -> set[str]:
        return set()

    def test_gradient_checkpointing_gives_the_same_gradients(self):
        if not self.supports_gradient_checkpointing:
            pytest.skip("has no gradient checkpointing")
        gradients = []
        for checkpointing in (False, True):
            model = self.model().train()
            if checkpointing:
                model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
                assert model.is_activation_checkpointing
            self.output(model(**self.inputs())).float().pow(2).mean().backward()
            gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        assert gradients[0].keys() == gradients[1].keys()
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def uncompiled():
    """
    Runs what is compiled, as flex attention and its masks are, by the same operators one by one, so that not each
    test of what they compute waits for a compiler. The code that is generated for flex attention is tested with every
    kind of mask: by `test_positions_to_keep_changes_only_what_is_computed`,
    `test_packed_documents_do_not_see_each_other` and `test_flex_attention_gives_the_loss_of_sdpa`.
    """
    return torch.compiler.set_stance("force_eager")


def assert_is_one_graph(model, **inputs):
    """What `_can_compile_fullgraph` promises: dynamo and `torch.export` meet no value they would have to read."""
    with torch.no_grad():
        expected = model(**inputs).logits
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="eager")(**inputs)
        exported = torch.export.export(model, (), inputs).module()(**inputs)
    for outputs in (compiled, exported):
        torch.testing.assert_close(outputs.logits, expected)


def saved_tensors(folder) -> dict[str, torch.Tensor]:
    """All tensors of a saved checkpoint, under the names they have on the disk."""
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            tensors.update({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    return tensors


def assert_resumed_equals_uninterrupted(make_trainer, folder, **settings):
    """Four steps, or two and after a stop two more, end at the same weights. Returns both trainers."""
    settings |= {"save_strategy": "steps", "save_steps": 2}
    whole = make_trainer(folder / "whole", max_steps=4, **settings)
    whole.train()
    make_trainer(folder / "parts", max_steps=2, **settings).train()
    resumed = make_trainer(folder / "parts", max_steps=4, **settings)
    resumed.train(resume_from_checkpoint=True)
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name
    return whole, resumed
