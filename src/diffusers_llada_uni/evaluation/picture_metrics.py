"""Metrics of pictures, on models that the user has: nothing is downloaded."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image
from transformers import AutoProcessor, CLIPModel

from transformers_llada_uni.input_checks import check_integer


class CLIPScore:
    """
    How well a picture fits its prompt: 100 times the cosine of CLIP's embeddings, not below 0 (CLIPScore, arXiv
    2104.08718, with the factor 100 that text-to-image reports use in place of 2.5).

    Call it with prompts and as many PIL pictures; it gives one number for each. Prompts longer than CLIP's 77 tokens
    are cut.

    Args:
        model (`str` or `CLIPModel`): A local folder or name, or a loaded model.
        processor (`CLIPProcessor`, *optional*): Default: that of `model`'s folder.
        device (`str`, *optional*): Where to put the model. Default: where it is.

    Raises:
        ValueError: if a loaded `model` comes without `processor`; in the call, if there are not as many prompts as
            pictures.
    """

    def __init__(self, model: str | CLIPModel, processor: Any = None, device: str | torch.device | None = None):
        if isinstance(model, CLIPModel):
            if processor is None:
                raise ValueError("`processor` is needed with a model that is loaded already.")
        else:
            processor = AutoProcessor.from_pretrained(model) if processor is None else processor
            model = CLIPModel.from_pretrained(model)
        self.model = model.eval() if device is None else model.eval().to(device)
        self.processor = processor

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str], pictures: Sequence[Image.Image]) -> list[float]:
        if len(prompts) != len(pictures):
            raise ValueError(f"`prompts` are {len(prompts)}, but `pictures` are {len(pictures)}.")
        pictures = [picture.convert("RGB") for picture in pictures]
        inputs = self.processor(
            text=list(prompts), images=pictures, return_tensors="pt", padding=True, truncation=True
        ).to(self.model.device)
        # Normalised embeddings, in float32 whatever the model computes in.
        outputs = self.model(**inputs)
        cosines = torch.cosine_similarity(outputs.text_embeds.float(), outputs.image_embeds.float(), dim=-1)
        return (100 * cosines.clamp(min=0)).tolist()


def frechet_distance(features: torch.Tensor, reference_features: torch.Tensor) -> float:
    """
    Distance between two sets of features, `(samples, dimensions)`, taken for Gaussian:
    `|mean - mean'|^2 + tr(C + C' - 2 (C C')^(1/2))` (FID, arXiv 1706.08500, eq. 6), in float64.

    It falls with the number of samples: compare distances of equally many only.

    Raises:
        ValueError: if a set has fewer than two samples, or the dimensions differ.
    """
    for name, value in (("features", features), ("reference_features", reference_features)):
        if value.ndim != 2 or len(value) < 2:
            raise ValueError(f"`{name}` must be (samples, dimensions) with two or more, got {tuple(value.shape)}.")
    if features.shape[1] != reference_features.shape[1]:
        raise ValueError(
            f"`features` have {features.shape[1]} dimensions, but `reference_features` {reference_features.shape[1]}."
        )
    first, second = features.double(), reference_features.to(features.device).double()
    root = _square_root(first.T.cov())
    # tr (C C')^(1/2) = tr (C^(1/2) C' C^(1/2))^(1/2), which is symmetric and so has real eigenvalues.
    eigenvalues = torch.linalg.eigvalsh(root @ second.T.cov() @ root).clamp(min=0)
    means = (first.mean(dim=0) - second.mean(dim=0)).square().sum()
    distance = means + first.var(dim=0).sum() + second.var(dim=0).sum() - 2 * eigenvalues.sqrt().sum()
    return max(float(distance), 0.0)


def _square_root(covariance: torch.Tensor) -> torch.Tensor:
    eigenvalues, vectors = torch.linalg.eigh(covariance)
    return vectors * eigenvalues.clamp(min=0).sqrt() @ vectors.T


class FrechetDistance:
    """
    [`frechet_distance`] between pictures and reference pictures, on the features of a model of the user's.

    Call it with pictures and reference pictures, of any two numbers.

    Args:
        extract_features (`Callable[[list[PIL.Image.Image]], torch.Tensor]`): Pictures to features `(pictures,
            dimensions)`; of Inception's last pooling layer for what papers call FID.
        batch_size (`int`, defaults to 16): Pictures at a time.
    """

    def __init__(self, extract_features: Callable[[list[Image.Image]], torch.Tensor], batch_size: int = 16):
        if not callable(extract_features):
            raise TypeError(f"`extract_features` must be callable, got {type(extract_features).__name__}.")
        check_integer("batch_size", batch_size, 1)
        self.extract_features, self.batch_size = extract_features, batch_size

    def __call__(self, pictures: Sequence[Image.Image], reference_pictures: Sequence[Image.Image]) -> float:
        return frechet_distance(self._features(pictures), self._features(reference_pictures))

    @torch.no_grad()
    def _features(self, pictures: Sequence[Image.Image]) -> torch.Tensor:
        starts = range(0, len(pictures), self.batch_size)
        batches = [[picture.convert("RGB") for picture in pictures[i : i + self.batch_size]] for i in starts]
        if not batches:
            raise ValueError("There are no pictures to compare.")
        return torch.cat([self.extract_features(batch).detach().cpu() for batch in batches])


__all__ = ["CLIPScore", "FrechetDistance", "frechet_distance"]
