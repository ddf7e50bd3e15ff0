"""
lm_eval's command line, knowing the model `llada-uni`:

    python -m transformers_llada_uni.evaluation run --model llada-uni --model_args pretrained=FOLDER --tasks arc_easy
"""

from .lm_eval_registration import register_with_lm_eval


if __name__ == "__main__":
    register_with_lm_eval()
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
