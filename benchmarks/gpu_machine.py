"""The card, and what it can do at most: bytes and operations a second."""

import importlib.metadata
from dataclasses import dataclass

import torch
import transformers
from gpu_report import Section, timed


@dataclass(frozen=True)
class Machine:
    """
    Args:
        device: "cuda", or "cpu" for `--tiny`.
        is_tiny: Whether shapes and repetitions are tiny.
        copy_bandwidth, read_bandwidth: Bytes a second; a copy's are those read and those written.
        product_peak: Operations a second of a large product in bfloat16.
    """

    device: str
    is_tiny: bool
    copy_bandwidth: float
    read_bandwidth: float
    product_peak: float

    @property
    def bandwidth(self) -> float:
        """What a floor is reckoned with: the better of the two."""
        return max(self.copy_bandwidth, self.read_bandwidth)

    @property
    def name(self) -> str:
        return torch.cuda.get_device_name() if self.device == "cuda" else "CPU"


def measure_machine(device: str, is_tiny: bool) -> Machine:
    """The best of ten runs of each."""
    source = torch.ones(2**20 if is_tiny else 2**29, device=device)  # 2 GiB, beyond every cache
    target = torch.empty_like(source)
    size = 256 if is_tiny else 8192
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))

    def best(call) -> float:
        call()
        return min(timed(call)[1] for _ in range(10))

    return Machine(
        device=device,
        is_tiny=is_tiny,
        copy_bandwidth=2 * source.nbytes / best(lambda: target.copy_(source)),
        read_bandwidth=source.nbytes / best(source.sum),
        product_peak=2 * size**3 / best(lambda: left @ right),
    )


def report_machine(section: Section, machine: Machine) -> None:
    section.add(
        machine.name,
        **{
            "copy, TB/s read and written": machine.copy_bandwidth / 1e12,
            "read, TB/s": machine.read_bandwidth / 1e12,
            "bfloat16 product, TFLOP/s": machine.product_peak / 1e12,
            "torch": torch.__version__,
            "triton": version_of("triton"),
            "transformers": transformers.__version__,
            "diffusers": version_of("diffusers"),
        },
    )


def version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
