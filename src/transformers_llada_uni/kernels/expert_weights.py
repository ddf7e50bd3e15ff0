"""
Weights of routed experts in fewer bits: how they are stored, made from plain ones, and made plain again.

| kind | bytes a weight | scales |
|---|---|---|
| `plain` | as its dtype | none |
| `float8` | 1 (e4m3) | one a block, 128 x 128 in DeepSeek-V3 (arXiv 2412.19437, section 3.3.2) and the FP8 release |
| `int8` | 1 | one a row and group of columns, symmetric |
| `int4` | 1/2, two in a `uint8` | one a row and group of columns, of either sign |

Scales multiply: `weight = stored * scale`. None has zero points: four bits have one level more below zero than above,
and a scale of either sign lends it to the side of a group that reaches further. At the same number of bits a smaller
group then does more for accuracy than a zero point would.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F


Kind = Literal["plain", "float8", "int8", "int4"]
STORED_DTYPES = {"float8": torch.float8_e4m3fn, "int8": torch.int8, "int4": torch.uint8}
MIN_GROUP = 16  # what a tensor core sums up at once

# What is tried as the largest weight of a group of four bits, in parts of the true one: a smaller scale cuts off the
# few large weights and rounds all others less.
CLIPPING = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)


@dataclass(frozen=True)
class ExpertWeights:
    """
    The weights of one projection of all experts, `(experts, out_features, in_features)`.

    Args:
        kind: See the table above.
        data: `(experts, out_features, in_features)`, contiguous; for `int4` half as many columns: the lower four bits
            of column `c` are weight `c`, its upper ones weight `c + in_features / 2`, in two's complement both. So a
            tile of bytes is two tiles of neighbouring weights, and nothing has to be interleaved.
        scales: For `float8` `(experts, row blocks, column blocks)`, where the blocks of each part begin anew; for
            `int8` and `int4` `(experts, groups of columns, out_features)`, so that the scales of neighbouring rows are
            neighbours.
        scale_shape: Rows and columns of weights that share a scale. Columns: a power of two, at least 16.
        parts: Equal parts that rows consist of: 2 for gate and up.

    Raises:
        ValueError: for columns that cannot share a scale.
    """

    kind: Kind
    data: torch.Tensor
    scales: torch.Tensor | None = None
    scale_shape: tuple[int, int] = (1, MIN_GROUP)
    parts: int = 1

    def __post_init__(self):
        assert self.data.ndim == 3 and self.data.is_contiguous() and self.data.shape[1] % self.parts == 0
        if self.kind == "plain":
            return
        assert self.data.dtype == STORED_DTYPES[self.kind]
        rows, columns = self.scale_shape
        _check_group("scale_shape", columns, self.in_features, self.kind)
        num_blocks = self.parts * -(-self.out_features // self.parts // rows), -(-self.in_features // columns)
        if self.kind != "float8":
            num_blocks = num_blocks[::-1]
        assert self.scales is not None and self.scales.shape == (len(self.data), *num_blocks)

    @property
    def out_features(self) -> int:
        return self.data.shape[1]

    @property
    def in_features(self) -> int:
        return self.data.shape[2] * (2 if self.kind == "int4" else 1)

    @property
    def nbytes(self) -> int:
        return self.data.nbytes + (0 if self.scales is None else self.scales.nbytes)

    def scale_strides(self) -> tuple[int, int, int]:
        """Of `scales`, from expert to expert, from row block to row block, from column block to column block."""
        if self.scales is None:
            return 0, 0, 0
        expert, first, second = self.scales.stride()
        return (expert, first, second) if self.kind == "float8" else (expert, second, first)

    def of_experts(self, start: int, stop: int) -> "ExpertWeights":
        """Those of some experts, as a view."""
        scales = None if self.scales is None else self.scales[start:stop]
        return replace(self, data=self.data[start:stop], scales=scales)

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """`(experts, out_features, in_features)`; multiplied in float32 at least, then rounded to `dtype`."""
        if self.kind == "plain":
            return self.data.to(dtype)
        wide = torch.promote_types(dtype, torch.float32)
        if self.kind == "int4":
            # The shift to the left drops the upper bits, that to the right repeats the sign.
            signed = self.data.view(torch.int8)
            weight = torch.cat([(signed << 4) >> 4, signed >> 4], dim=-1).to(wide)
        else:
            weight = self.data.to(wide)
        assert self.scales is not None  # it was checked
        rows, columns = self.scale_shape
        if self.kind != "float8":
            groups = weight.unflatten(2, (-1, columns))
            return groups.mul_(self.scales.transpose(1, 2).to(wide)[..., None]).flatten(2).to(dtype)
        scales = self.scales.to(wide).unflatten(1, (self.parts, -1)).repeat_interleave(rows, dim=2)
        scales = scales[:, :, : self.out_features // self.parts].flatten(1, 2)
        return (weight * scales.repeat_interleave(columns, dim=2)[..., : self.in_features]).to(dtype)


def quantize_experts(
    weight: torch.Tensor,
    kind: Kind,
    group_size: int = 64,
    block_size: tuple[int, int] = (128, 128),
    parts: int = 1,
    scale_dtype: torch.dtype | None = None,
) -> ExpertWeights:
    """
    Args:
        weight: `(experts, out_features, in_features)`, of a floating type.
        kind: What to make of it.
        group_size: Columns that share a scale, for `int8` and `int4`: a power of two, at least 16, that divides
            `in_features`, for `int4` half of them.
        block_size: Rows and columns that share a scale, for `float8`.
        parts: Equal parts that rows consist of, whose blocks of `float8` begin anew: 2 for gate and up.
        scale_dtype: Default: float32 for `float8`, as in the release, else that of `weight`.

    Raises:
        ValueError: if the sizes do not fit, or for weights that are infinite or no numbers.
    """
    if weight.ndim != 3 or not weight.is_floating_point():
        raise ValueError(
            f"`weight` must be (experts, out_features, in_features) of a floating type, got {tuple(weight.shape)} of "
            f"{weight.dtype}."
        )
    weight = weight.detach()
    if kind == "plain":
        return ExpertWeights(kind, weight.contiguous(), parts=parts)
    if kind == "float8":
        scale_shape, quantize = block_size, _quantize_float8
    elif kind in STORED_DTYPES:
        scale_shape, quantize = (1, group_size), _quantize_int8 if kind == "int8" else _quantize_int4
        _check_group("group_size", group_size, weight.shape[2], kind)
    else:
        raise ValueError(f"`kind` must be plain, float8, int8 or int4, got {kind!r}.")
    scale_dtype = scale_dtype or (torch.float32 if kind == "float8" else weight.dtype)
    # One after the other: in float32, all experts of a layer are gigabytes.
    experts = [_quantize_expert(expert, quantize, scale_shape, parts, scale_dtype) for expert in weight]
    data, scales = (torch.stack(tensors) for tensors in zip(*experts, strict=True))
    return ExpertWeights(kind, data, scales, scale_shape, parts)


def _quantize_expert(
    weight: torch.Tensor, quantize: Callable, scale_shape: tuple[int, int], parts: int, scale_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    if not bool(weight.isfinite().all()):
        raise ValueError("`weight` holds values that are infinite or no numbers.")
    parts_of_weight = weight.to(torch.promote_types(weight.dtype, torch.float32)).chunk(parts)
    data, scales = zip(*(quantize(part, scale_shape, scale_dtype) for part in parts_of_weight), strict=True)
    return torch.cat(data), torch.cat(scales, dim=0 if quantize is _quantize_float8 else 1)


def _quantize_float8(
    weight: torch.Tensor, scale_shape: tuple[int, int], scale_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    (rows, columns), (block_rows, block_columns) = weight.shape, scale_shape
    padded = F.pad(weight, (0, -columns % block_columns, 0, -rows % block_rows))
    blocks = padded.unflatten(1, (-1, block_columns)).unflatten(0, (-1, block_rows))  # (blocks, rows, blocks, columns)
    scales = blocks.abs().amax(dim=(1, 3)) / torch.finfo(torch.float8_e4m3fn).max
    scales = _without_zeros(scales.to(scale_dtype))
    limit = torch.finfo(torch.float8_e4m3fn).max  # a scale that was rounded down may lead beyond it
    stored = (blocks / scales.to(weight.dtype)[:, None, :, None]).clamp(-limit, limit)
    return stored.reshape(padded.shape)[:rows, :columns].to(torch.float8_e4m3fn), scales


def _quantize_int8(
    weight: torch.Tensor, scale_shape: tuple[int, int], scale_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    groups = weight.unflatten(1, (-1, scale_shape[1]))
    scales = _without_zeros((groups.abs().amax(dim=-1) / 127).to(scale_dtype))
    stored = (groups / scales.to(weight.dtype)[..., None]).round().clamp(-127, 127)
    return stored.flatten(1).to(torch.int8), scales.T.contiguous()


def _quantize_int4(
    weight: torch.Tensor, scale_shape: tuple[int, int], scale_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    groups = weight.unflatten(1, (-1, scale_shape[1]))
    largest = groups.gather(-1, groups.abs().argmax(dim=-1, keepdim=True))
    best_error = torch.full_like(largest, torch.inf)
    best_scales = torch.ones_like(largest)
    for part in CLIPPING:
        scales = _without_zeros((largest * (part / -8)).to(scale_dtype)).to(weight.dtype)
        stored = (groups / scales).round_().clamp_(-8, 7)
        error = stored.mul_(scales).sub_(groups).square_().sum(dim=-1, keepdim=True)
        is_better = error < best_error
        best_error = torch.where(is_better, error, best_error)
        best_scales = torch.where(is_better, scales, best_scales)
    best_stored = (groups / best_scales).round_().clamp_(-8, 7)
    low, high = best_stored.flatten(1).to(torch.int8).chunk(2, dim=1)
    packed = (low & 15) | (high << 4)
    return packed.view(torch.uint8), best_scales[..., 0].T.to(scale_dtype).contiguous()


def _without_zeros(scales: torch.Tensor) -> torch.Tensor:
    """A block of zeros may have any scale but zero, by which one cannot divide."""
    return torch.where(scales == 0, torch.ones_like(scales), scales)


def _check_group(name: str, columns: int, in_features: int, kind: str) -> None:
    if columns < MIN_GROUP or columns & (columns - 1):
        raise ValueError(f"`{name}` must have a power of two of at least {MIN_GROUP} columns, got {columns}.")
    span = in_features // 2 if kind == "int4" else in_features
    if kind != "float8" and (span % columns or (kind == "int4" and in_features % 2)):
        part = "half of the" if kind == "int4" else "the"
        raise ValueError(f"`{name}` must divide {part} {in_features} columns of {kind} weights, got {columns}.")
