"""The fields that the configurations of all language-model trainers share."""

from dataclasses import dataclass, field

from ...input_checks import check_integer
from ..documented_settings import documented
from .noise import IMAGE_NOISES, NOISE_LEVELS, BlockDiffusionNoise


@documented
@dataclass
class NoiseSettings:
    """
    Parameters:
        block_length (`int`, *optional*): Tokens of a block. Default: the model's.
        noise_range (`list[float]`, defaults to `[1e-3, 1.0]`): Lowest and highest noise level, which is the share of
            tokens that is masked; see [`BlockDiffusionNoise`].
        noise_level (`str`, defaults to `"block"`): Whether each `"block"` or each `"sample"` has a noise level of its
            own.
        num_noise_samples (`int`, defaults to 4): Noisy copies of each row.
        complementary (`bool`, defaults to `False`): Whether each copy comes with its complement.
        image_noise (`str`, defaults to `"linear"`): How noise levels of image codes are drawn: `"linear"`, or
            `"cosine"`, which masks more of an image.

    Raises:
        ValueError: naming the field, for a value out of range.
    """

    block_length: int | None = None
    noise_range: list[float] = field(default_factory=lambda: [1e-3, 1.0])
    noise_level: str = field(default="block", metadata={"choices": list(NOISE_LEVELS)})
    num_noise_samples: int = 4
    complementary: bool = False
    image_noise: str = field(default="linear", metadata={"choices": list(IMAGE_NOISES)})

    def __post_init__(self) -> None:
        self.make_noise()
        if self.block_length is not None:
            check_integer("block_length", self.block_length, 1)

    def make_noise(self) -> BlockDiffusionNoise:
        """The likelihood bound's noise: its weights are 1/t."""
        return BlockDiffusionNoise(
            noise_range=tuple(self.noise_range),  # type: ignore[arg-type]  # its length is checked there
            noise_level=self.noise_level,
            complementary=self.complementary,
            num_noise_samples=self.num_noise_samples,
            image_noise=self.image_noise,
        )
