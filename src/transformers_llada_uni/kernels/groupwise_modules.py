"""Linear layers and routed experts whose weights are stored in four or eight bits, with a scale for each group."""

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized
from transformers import PreTrainedConfig

from . import DTYPES, HAS_TRITON, IS_INTERPRETED, is_kernel_device
from .expert_weights import STORED_DTYPES, ExpertWeights, Kind, quantize_experts
from .experts_dequantized import dequantized_linear, experts_one_by_one, experts_together
from .experts_triton import triton_experts


SCALES = "_scales"  # what the name of a weight's scales ends with
NOT_ADAPTED = (
    "Quantised experts cannot be adapted: leave out `target_parameters`, as `lora_config(experts=False)` does."
)


class GroupwiseWeights(nn.Module):
    """What the two modules have in common: their weights are parameters `name` and `name + "_scales"`."""

    kind: Kind
    group_size: int
    weight_names: tuple[str, ...]

    def _add_weight(self, name: str, *shape: int) -> None:
        *others, rows, columns = shape
        span, rest = divmod(
            columns, 2 if self.kind == "int4" else 1
        )  # the two halves of a row share bytes, not groups
        if rest or span % self.group_size:
            part = "half of the" if self.kind == "int4" else "the"
            raise ValueError(
                f"`group_size` must divide {part} {columns} columns of `{name}` in {self.kind}, got {self.group_size}."
            )
        stored = torch.empty(*others, rows, span, dtype=STORED_DTYPES[self.kind])
        scales = torch.empty(*others, columns // self.group_size, rows)
        self.register_parameter(name, nn.Parameter(stored, requires_grad=False))
        self.register_parameter(name + SCALES, nn.Parameter(scales, requires_grad=False))

    def quantize(self, name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """
        Args:
            name: Of the parameter.
            weight: As it is before quantisation.

        Returns:
            The values of the parameter and of its scales; the module is not changed.

        Raises:
            ValueError: for another shape, or values that are infinite or no numbers.
        """
        found, wanted = tuple(weight.shape), self.plain_shape(name)
        if found != wanted:
            raise ValueError(f"`{name}` is {list(found)} instead of {list(wanted)}.")
        stack = weight.reshape(-1, *wanted[-2:])
        made = quantize_experts(stack, self.kind, self.group_size, parts=self._parts(name))
        assert made.scales is not None  # it is not plain
        return {
            name: made.data.view(getattr(self, name).shape),
            name + SCALES: made.scales.view(getattr(self, name + SCALES).shape),
        }

    def plain_shape(self, name: str) -> tuple[int, ...]:
        """The shape that a weight has before quantisation."""
        *others, columns = getattr(self, name).shape
        return *others, columns * (2 if self.kind == "int4" else 1)

    def weights_of(self, name: str) -> ExpertWeights:
        """A weight as the kernels take it; that of a linear layer as of one expert."""
        data, scales = getattr(self, name), getattr(self, name + SCALES)
        return ExpertWeights(
            self.kind,
            data.reshape(-1, *data.shape[-2:]),
            scales.reshape(-1, *scales.shape[-2:]),
            (1, self.group_size),
            self._parts(name),
        )

    @staticmethod
    def _parts(name: str) -> int:
        return 2 if name == "gate_up_proj" else 1

    def can_use_kernel(self, states: torch.Tensor) -> bool:
        """Whether Triton's kernels can compute with these states: on GPUs of CUDA from Ampere on, no gradients."""
        if torch.is_grad_enabled() or states.dtype not in DTYPES:
            return False
        data = getattr(self, self.weight_names[0])
        if type(data) is not nn.Parameter or data.device != states.device:
            return False
        return is_kernel_device(states.device) or (IS_INTERPRETED and HAS_TRITON)


class GroupwiseLinear(GroupwiseWeights, nn.Linear):
    """
    A linear layer without bias. Its `weight` is `(out_features, in_features)` in eight bits or, in four, two in a
    byte: see [`ExpertWeights`]. A subclass of `nn.Linear`, for peft, which adds adapters to those.

    Raises:
        ValueError: if the groups do not divide the columns.
    """

    weight_names = ("weight",)

    def __init__(self, in_features: int, out_features: int, kind: Kind, group_size: int):
        super().__init__(in_features, out_features, bias=False, device="meta")
        del self.weight
        self.kind, self.group_size = kind, group_size
        self._add_weight("weight", out_features, in_features)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        weights = self.weights_of("weight")
        if self.can_use_kernel(input) and not torch.compiler.is_compiling():
            from .groupwise_linear import MAX_ROWS, groupwise_linear

            if input.shape[:-1].numel() <= MAX_ROWS:
                return groupwise_linear(input.flatten(0, -2), weights).unflatten(0, input.shape[:-1])
        return dequantized_linear(input, weights)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.kind}, group_size={self.group_size}"


class GroupwiseExperts(GroupwiseWeights, nn.Module):
    """
    The routed experts of a layer. On a GPU without gradients Triton's kernels read their weights as they are stored;
    in training there those of a layer are made plain together for the time of its products; elsewhere, and with
    `experts_implementation="eager"`, each expert that is used by itself.

    Raises:
        ValueError: if the groups do not divide the columns, or the activation is not SiLU.
    """

    weight_names = ("gate_up_proj", "down_proj")

    def __init__(self, config: PreTrainedConfig, kind: Kind, group_size: int):
        super().__init__()
        if config.hidden_act != "silu":
            raise ValueError(f"Quantised experts know `hidden_act` 'silu' only, got {config.hidden_act!r}.")
        self.config, self.kind, self.group_size = config, kind, group_size
        self.num_experts = config.num_experts
        width, hidden_size = config.moe_intermediate_size, config.hidden_size
        self._add_weight("gate_up_proj", self.num_experts, 2 * width, hidden_size)
        self._add_weight("down_proj", self.num_experts, hidden_size, width)

    def forward(
        self,
        hidden_states: torch.Tensor,
        top_k_index: torch.LongTensor,
        top_k_weights: torch.Tensor,
        addend: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        Args:
            hidden_states: `(tokens, hidden_size)`.
            top_k_index, top_k_weights: `(tokens, top_k)`.
            addend: `(tokens, hidden_size)`, added to the sum over the experts. Default: none.

        Returns:
            `(tokens, hidden_size)`.

        Raises:
            ValueError: if peft adds something to the weights, which would be lost in their few bits.
        """
        if is_parametrized(self):
            raise ValueError(NOT_ADAPTED)
        gate_up, down = self.weights_of("gate_up_proj"), self.weights_of("down_proj")
        is_eager = self.config._experts_implementation == "eager"
        if not is_eager and self.can_use_kernel(hidden_states):
            return triton_experts(hidden_states, gate_up, down, top_k_index, top_k_weights, addend=addend)
        # In training on a GPU launches would take the time; float64 is nothing for grouped products.
        is_grouped = torch.is_grad_enabled() and hidden_states.is_cuda and hidden_states.dtype in DTYPES
        compute = experts_together if is_grouped and not is_eager else experts_one_by_one
        output = compute(hidden_states, gate_up, down, top_k_index, top_k_weights)
        return output if addend is None else output + addend

    def extra_repr(self) -> str:
        shape = ", ".join(map(str, self.plain_shape("gate_up_proj")))
        return f"gate_up_proj=({shape}), {self.kind}, group_size={self.group_size}"
