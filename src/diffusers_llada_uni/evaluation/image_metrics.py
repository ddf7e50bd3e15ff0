"""Metrics of images, on models that the user has: nothing is downloaded."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoProcessor, CLIPModel

from transformers_llada_uni.input_checks import check_integer


class CLIPScore:
    """
    How well an image fits its prompt: 100 times the cosine of CLIP's embeddings, not below 0 (CLIPScore, arXiv
    2104.08718, with the factor 100 that text-to-image reports use in place of 2.5).

    Call it with prompts and as many PIL images; it gives one number for each. Prompts longer than CLIP's 77 tokens
    are cut.

    Args:
        model (`str` or `CLIPModel`): A local folder or name, or a loaded model.
        processor (`CLIPProcessor`, *optional*): Default: that of `model`'s folder.
        device (`str`, *optional*): Where to put the model. Default: where it is.

    Raises:
        ValueError: if `model` is no CLIP; if a loaded one comes without `processor`; in the call, if there are not as
            many prompts as images.
    """

    def __init__(self, model: str | CLIPModel, processor: Any = None, device: str | torch.device | None = None):
        if isinstance(model, CLIPModel):
            if processor is None:
                raise ValueError("`processor` is needed with a model that is loaded already.")
        else:
            if (kind := AutoConfig.from_pretrained(model).model_type) != "clip":
                raise ValueError(f"`model` {model!r} is no CLIP model, but of the type {kind!r}.")
            processor = AutoProcessor.from_pretrained(model) if processor is None else processor
            model = CLIPModel.from_pretrained(model)
        self.model = model.eval() if device is None else model.eval().to(device)
        self.processor = processor

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str], images: Sequence[Image.Image]) -> list[float]:
        if len(prompts) != len(images):
            raise ValueError(f"`prompts` are {len(prompts)}, but `images` are {len(images)}.")
        images = [image.convert("RGB") for image in images]
        inputs = self.processor(
            text=list(prompts), images=images, return_tensors="pt", padding=True, truncation=True
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
    [`frechet_distance`] between images and reference images, on the features of a model of the user's.

    Call it with images and reference images, of any two numbers.

    Args:
        extract_features (`Callable[[list[PIL.Image.Image]], torch.Tensor]`): Images to features `(images,
            dimensions)`; of Inception's last pooling layer for what papers call FID.
        batch_size (`int`, defaults to 16): Images at a time.
    """

    def __init__(self, extract_features: Callable[[list[Image.Image]], torch.Tensor], batch_size: int = 16):
        if not callable(extract_features):
            raise TypeError(f"`extract_features` must be callable, got {type(extract_features).__name__}.")
        check_integer("batch_size", batch_size, 1)
        self.extract_features, self.batch_size = extract_features, batch_size

    def __call__(self, images: Sequence[Image.Image], reference_images: Sequence[Image.Image]) -> float:
        return frechet_distance(self._features(images), self._features(reference_images))

    @torch.no_grad()
    def _features(self, images: Sequence[Image.Image]) -> torch.Tensor:
        starts = range(0, len(images), self.batch_size)
        batches = [[image.convert("RGB") for image in images[i : i + self.batch_size]] for i in starts]
        if not batches:
            raise ValueError("There are no images to compare.")
        return torch.cat([self.extract_features(batch).detach().cpu() for batch in batches])


class ImageFeatures:
    """
    Features of images for [`FrechetDistance`]: the embeddings of CLIP and its like, else what the model pools.

    Call it with PIL images; it gives `(images, dimensions)`.

    Args:
        model (`str`): A local folder or a name of a model of images (DINOv2, ViT, CLIP, SigLIP, ...).
        device (`str`, *optional*): Where to put the model. Default: the CPU.

    Raises:
        ValueError: if the model pools nothing.
    """

    def __init__(self, model: str, device: str | torch.device | None = None):
        self.processor = AutoImageProcessor.from_pretrained(model)
        self.model = AutoModel.from_pretrained(model).eval().to(device or "cpu")

    @torch.no_grad()
    def __call__(self, images: Sequence[Image.Image]) -> torch.Tensor:
        inputs = self.processor(images=list(images), return_tensors="pt").to(self.model.device)
        compute = getattr(self.model, "get_image_features", self.model)
        outputs = compute(**inputs)
        features = outputs if isinstance(outputs, torch.Tensor) else outputs.get("pooler_output")
        if features is None:
            raise ValueError(f"`model`: {type(self.model).__name__} pools no features of an image.")
        return features.flatten(1)


__all__ = ["CLIPScore", "FrechetDistance", "ImageFeatures", "frechet_distance"]
