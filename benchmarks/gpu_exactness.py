"""The same tokens by every path in float32, and how far each path is from float32 in bfloat16."""

import copy
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gpu_model import RELEASED, TINY, make_model
from gpu_report import Section
from gpu_workload import ALL_OFF, DEFAULT, EAGER, PLAIN, Method, chosen
from safetensors.torch import load_file

from transformers_llada_uni import LLaDA2MoeForBlockDiffusion


# By name: the method, and whether the backbone carries a hook, which makes for a step that is not recordable.
PATHS: dict[str, tuple[Method, bool]] = {
    "recorded": (DEFAULT, False),
    "not recorded": (EAGER, False),
    "with a hook": (DEFAULT, True),
    "all three off": (ALL_OFF, False),
}


def run(model: LLaDA2MoeForBlockDiffusion, call: Callable, method: Method, is_hooked: bool) -> Any:
    """What a call gives; where steps may be recorded, which they are when they run again, a second call."""
    hook = model.model.register_forward_hook(lambda *_: None) if is_hooked else None
    try:
        with chosen(model, method):
            if method.is_recorded and model.device.type == "cuda":
                call(**method.settings)
            return call(**method.settings)
    finally:
        if hook is not None:
            hook.remove()


def report_same_tokens(section: Section, device: str) -> None:
    model = make_model(TINY, device, torch.float32)
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(700, (2, 3, 45), generator=generator).to(device)
    attention_mask = torch.ones_like(prompts[0])
    attention_mask[1, :13] = attention_mask[2, :30] = 0  # padding on the left

    def text(threshold: float, **settings: Any) -> torch.Tensor:
        settings |= {"num_steps_per_block": 16, "threshold": threshold, "eos_token_id": [5]}
        return model.generate(prompts[0], attention_mask, max_new_tokens=64, **settings)

    def codes(is_guided: bool, **settings: Any) -> torch.Tensor:
        if is_guided:
            settings |= {"negative_input_ids": prompts[1], "guidance_scale": 3.0, "guidance_rescale": 0.7}
        return model.generate_image_codes(
            prompts[0], (8, 10), attention_mask, num_steps_per_block=8, threshold=0.95, **settings
        )

    cases = {
        "text, threshold 1": lambda **settings: text(1.0, **settings),
        "text, threshold 0.6": lambda **settings: text(0.6, **settings),
        "codes": lambda **settings: codes(False, **settings),
        "guided codes": lambda **settings: codes(True, **settings),
    }
    for what, call in cases.items():
        with section.guarded(what):
            plain = run(model, call, PLAIN, False)
            section.add(
                f"{what}, 3 rows of a tiny model, float32",
                **{name: torch.equal(plain, run(model, call, *path)) for name, path in PATHS.items()},
            )


def report_fixture(section: Section, device: str, folder: Path) -> None:
    """`tests/fixtures/official_tiny`: what the released code computes."""
    model = LLaDA2MoeForBlockDiffusion.from_pretrained(folder, dtype=torch.float32).to(device).eval()
    expected = json.loads((folder / "expected" / "generation.json").read_text())
    tensors = {name: t.to(device) for name, t in load_file(folder / "expected" / "backbone.safetensors").items()}
    mask_token_id = expected["ids"]["<|mask|>"]

    def row(ids: list[int]) -> torch.LongTensor:
        return torch.tensor([ids], device=device)

    def of_case(case: dict[str, Any]) -> dict[str, Any]:
        names = {"block_length": "block_length", "num_steps_per_block": "steps", "threshold": "threshold"}
        return {"mask_token_id": mask_token_id, **{name: case[key] for name, key in names.items()}}

    def is_text_right(case: dict[str, Any], **settings: Any) -> bool:
        prompt = row(case["prompt_ids"])
        ids = model.generate(prompt, max_new_tokens=case["gen_length"], **of_case(case), **settings)
        return ids[0, prompt.shape[1] :].tolist()[: len(case["output_ids"])] == case["output_ids"]

    def is_picture_right(case: dict[str, Any], **settings: Any) -> bool:
        companions = {
            "negative_input_ids": case.get("uncond_ids") or case.get("no_text_ids"),
            "negative_image_input_ids": case.get("no_image_ids"),
        }
        settings |= {name: row(ids) for name, ids in companions.items() if ids is not None}
        codes = model.generate_image_codes(
            row(case["cond_ids"]),
            (case["h"], case["w"]),
            guidance_scale=case.get("cfg_scale", case.get("cfg_text_scale")),
            image_guidance_scale=case.get("cfg_image_scale", 0.0),
            guidance_rescale=case["cfg_rescale"],
            **of_case(case),
            **settings,
        )
        return codes[0].tolist() == case["token_ids"]

    kinds = {"text_generate": is_text_right, "text_to_image": is_picture_right, "image_edit": is_picture_right}
    for kind, is_right in kinds.items():
        with section.guarded(kind):
            agreed = {
                name: all(run(model, functools.partial(is_right, case), *path) for case in expected[kind])
                for name, path in PATHS.items()
            }
            section.add(f"official_tiny, {kind}, float32", **agreed)
    with section.guarded("logits"), torch.no_grad():
        logits = model(tensors["forward.input_ids"], block_length=expected["block_length_forward"]).logits
        section.note(f"official_tiny: logits within {(logits - tensors['forward.logits']).abs().max():.1e}.")


@torch.no_grad()
def report_rounding(section: Section, device: str, is_tiny: bool) -> None:
    """Hidden states and logits of a block of masks behind a prefix, of each path, against float32."""
    shape = TINY if is_tiny else RELEASED
    smaller = {"vocab_size": 32_768, "image_token_offset": 16_384, "mask_token_id": 16_383, "eos_token_id": 16_382}
    overrides = {} if is_tiny else {**smaller, "pad_token_id": 16_382, "num_hidden_layers": 4, "num_experts": 64}
    model = make_model(shape, device, torch.bfloat16, **overrides)
    exact = copy.deepcopy(model).float()
    config = model.config
    generator = torch.Generator().manual_seed(0)
    prefix = torch.randint(min(6000, config.mask_token_id), (2, 96), generator=generator).to(device)
    masks = torch.full((2, config.block_length), config.mask_token_id, device=device)
    masks[:, ::2] = prefix[:, : config.block_length // 2]

    def forward(of: LLaDA2MoeForBlockDiffusion, method: Method) -> tuple[torch.Tensor, torch.Tensor]:
        with chosen(of, method):
            cache = of.model(prefix, use_cache=True).past_key_values
            hidden_states = of.model(masks, past_key_values=cache).last_hidden_state
            return hidden_states.float(), of.lm_head(hidden_states).float()

    expected = forward(exact, Method(experts="eager", is_fused=False))
    paths = {
        "default": (DEFAULT, "sdpa"),
        "default, grouped_mm experts": (Method(experts="grouped_mm"), "sdpa"),
        "default, not fused": (Method(is_fused=False), "sdpa"),
        "plain, sdpa": (ALL_OFF, "sdpa"),
        "plain, eager attention": (ALL_OFF, "eager"),
    }
    for name, (method, attention) in paths.items():
        with section.guarded(name):
            model.set_attn_implementation(attention)
            found = forward(model, method)
            errors = [relative_errors(have, want) for have, want in zip(found, expected, strict=True)]
            section.add(
                name,
                **{
                    "hidden states, median": errors[0].median().item(),
                    "largest": errors[0].max().item(),
                    "logits, median": errors[1].median().item(),
                    "largest of logits": errors[1].max().item(),
                    "same best id": (found[1].argmax(-1) == expected[1].argmax(-1)).float().mean().item(),
                },
            )
    section.note(
        f"Relative errors of the {masks.numel()} positions of a block, half of it masks: {config.num_hidden_layers} "
        f"layers, {config.num_experts} experts, hidden size {config.hidden_size}. The largest are of positions that "
        "chose another expert."
    )


def relative_errors(found: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    return ((found - expected).norm(dim=-1) / expected.norm(dim=-1)).flatten()
