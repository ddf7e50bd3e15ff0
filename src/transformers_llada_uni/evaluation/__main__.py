"""
lm_eval's command line, knowing the model `llada-uni`:

    python -m transformers_llada_uni.evaluation run --model llada-uni --model_args pretrained=FOLDER --tasks arc_easy
"""

from . import lm_eval_model  # noqa: F401  registers it, or says what to install


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
