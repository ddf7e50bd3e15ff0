"""`train`: a stage, by its own options."""

from collections.abc import Callable, Sequence


STAGES = {
    "sft": "the language model: text, chats, images",
    "dpo": "the language model, by preferences",
    "grpo": "the language model, by rewards",
    "image_tokenizer": "images to codes",
    "image_tokenizer_alignment": "images to codes that are given",
    "autoencoder": "latents to pixels",
    "decoder": "codes to latents",
    "distill": "the decoder, to few steps",
}


def prepare(stage: str, options: Sequence[str]) -> Callable[[], None]:
    """
    Reads the options and makes the trainer.

    Args:
        stage: One of `STAGES`.
        options: As typed.

    Returns:
        What trains. Errors of it are no mistakes of who has typed the options.
    """
    from transformers_llada_uni.optional_dependencies import require_extra

    require_extra("train", "datasets", "peft", "trl")
    from .train_options import StageParser
    from .train_trainers import check_resumes, check_run, finish, stages

    classes, build = stages()[stage]
    parsed = StageParser(stage, classes).parse(options)
    check_run(*parsed)
    trainer, script_args = build(*parsed)
    check_resumes(trainer)
    return lambda: finish(trainer, script_args)
