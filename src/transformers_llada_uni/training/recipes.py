"""Settings of supervised training as they were published, each set as a whole; what is not in one stays as it is."""

from typing import Any

from .stages import LANGUAGE_MODEL


# What the paper of LLaDA2.0-Uni (arXiv 2604.20796) says of its stages beyond what `STAGES` has: rows of 8k tokens, in
# fine-tuning of 16k; images to make of 256 x 256, then of 512 x 512 pixels, which the decoder draws at twice that; in
# fine-tuning text to all else as 1 to 5. Which stage goes over to the larger images, and the shares within "all else",
# are ours. Images to understand have up to 800 x 800 pixels by the rule of the image processor.
_UNI = {
    "uni_alignment": {"stage": "alignment", "max_length": 8192, "editing_max_pixels": 256**2},
    "uni_pretraining": {"stage": "pretraining", "max_length": 8192, "editing_max_pixels": 512**2},
    "uni_finetuning": {
        "stage": "supervised_finetuning",
        "max_length": 16384,
        "editing_max_pixels": 512**2,
        "task_mix": {"text": 3, "understanding": 6, "text_to_image": 5, "editing": 3, "interleaved": 1},
    },
}

# Keyword arguments of [`LLaDAUniSFTConfig`], by name:
#
# - `"uni_alignment"`, `"uni_pretraining"`, `"uni_finetuning"`: see above;
# - `"dfactory"`: what dFactory, the public training code of LLaDA2, is configured with (`llada2_flash_bd_sft.yaml`),
#   and the weight of 2.0 that its documentation recommends for the confidence loss. It trains everything, on text;
# - `"clipped"`: LLaDA2.0's fine-tuning (arXiv 2512.15745) with noise levels clipped to a band and complementary masks.
#   The report does not give the band; this one is dFactory's.
RECIPES: dict[str, dict[str, Any]] = {
    **_UNI,
    "dfactory": {
        "stage": "supervised_finetuning",
        "trained_parts": list(LANGUAGE_MODEL),
        "learning_rate": 1e-5,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.03,  # a share of all
        "weight_decay": 0.1,
        "max_grad_norm": 1.0,
        "noise_range": [0.3, 0.8],
        "noise_level": "sample",
        "weighting": "none",
        "complementary": False,
        "length_weighting": False,
        "confidence_weight": 2.0,
        "max_length": 2048,
    },
    "clipped": {"stage": "supervised_finetuning", "complementary": True, "noise_range": [0.3, 0.8]},
}
