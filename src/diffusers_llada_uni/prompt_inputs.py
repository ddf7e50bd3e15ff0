"""The words a caller gives: prompts and negative prompts; and which arguments of a call go with which."""

from typing import Any

from transformers_llada_uni.input_checks import check_flag


def check_prompt(prompt: Any) -> list[str]:
    """Returns the prompts as a new list."""
    prompts = _list_of_texts("prompt", prompt)
    for index, text in enumerate(prompts):
        if not text.strip():
            raise ValueError(f"`prompt` must not be empty{f' (index {index})' if len(prompts) > 1 else ''}.")
    return prompts


def check_negative_prompt(negative_prompt: Any, num_prompts: int, guidance_scale: float) -> list[str] | None:
    """Returns one for each prompt, empty where none is meant; `None` where none is meant for any."""
    if negative_prompt is None:
        return None
    texts = [text.strip() and text for text in _list_of_texts("negative_prompt", negative_prompt)]
    if isinstance(negative_prompt, str):
        texts *= num_prompts
    if len(texts) != num_prompts:
        raise ValueError(f"`negative_prompt` has {len(texts)} entries for {num_prompts} prompts; give one for each.")
    if not any(texts):
        return None
    if guidance_scale == 1:
        raise ValueError("`negative_prompt` needs guidance to lead away from it, but `guidance_scale` is 1.")
    return texts


def check_task(
    image: Any,
    mask_image: Any,
    size: tuple[int | None, int | None],
    thinking: bool,
    image_guidance_scale: float,
    thinking_kwargs: dict[str, Any],
) -> None:
    """Arguments of a call that must fit each other."""
    check_flag("thinking", thinking)
    if thinking_kwargs and not thinking:
        raise ValueError("`thinking_kwargs` are given, but `thinking` is False.")
    if image is None and mask_image is not None:
        raise ValueError("`mask_image` needs the `image`, or the `image_codes`, it belongs to.")
    if image is None and image_guidance_scale:
        raise ValueError("`image_guidance_scale` needs an `image`, or `image_codes`, to be guided by.")
    if image is not None and thinking:
        raise ValueError("`thinking` is for text-to-image; it cannot be combined with `image` or `image_codes`.")
    if image is not None and (size[0] is None) != (size[1] is None):
        raise ValueError("`height` and `width` must be given together with `image` or `image_codes`, or neither.")
    if mask_image is not None and size != (None, None):
        raise ValueError("`height` and `width` cannot be given with `mask_image`: the codes around the mask stay.")


def _list_of_texts(name: str, texts: Any) -> list[str]:
    if isinstance(texts, str):
        return [texts]
    if not isinstance(texts, (list, tuple)):
        raise TypeError(f"`{name}` must be a string or a list of strings, got {type(texts).__name__}.")
    if not texts:
        raise ValueError(f"`{name}` must hold at least one prompt, got an empty list.")
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"`{name}` must hold strings only, got {type(text).__name__} at index {index}.")
    return list(texts)
