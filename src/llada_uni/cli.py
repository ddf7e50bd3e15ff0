"""
The command `llada-uni`.

    llada-uni train sft --config sft.yaml --learning_rate 1e-5
    accelerate launch --config_file fsdp2.yaml -m llada_uni.cli train sft --config sft.yaml
    llada-uni consolidate runs/sft/checkpoint-1000 runs/sft/model
"""

import argparse
import sys
from collections.abc import Sequence


STAGES = ("sft", "dpo", "grpo", "tokenizer", "autoencoder", "decoder", "distill")


def train(stage: str, arguments: Sequence[str]) -> None:
    from trl import TrlParser

    from .training_stages import stages

    options, run = stages()[stage]
    parser = TrlParser(options, prog=f"llada-uni train {stage}")
    run(*parser.parse_args_and_config(list(arguments), fail_with_unknown_args=True))


def consolidate(arguments: Sequence[str]) -> None:
    from transformers_llada_uni.loading.consolidation import consolidate_checkpoint

    parser = argparse.ArgumentParser(prog="llada-uni consolidate", description="Makes one model of a sharded one.")
    parser.add_argument("checkpoint", help="a checkpoint that a sharded training run wrote")
    parser.add_argument("output", help="the folder to write; must not exist")
    parser.add_argument("--max-shard-size", default="5GB", help="largest file (default: %(default)s)")
    options = parser.parse_args(arguments)
    consolidate_checkpoint(options.checkpoint, options.output, options.max_shard_size)


def main(arguments: Sequence[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(prog="llada-uni", description=__doc__, add_help=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    commands = parser.add_subparsers(dest="command", required=True)
    training = commands.add_parser("train", help="train a stage: llada-uni train <stage> --help", add_help=False)
    training.add_argument("stage", choices=STAGES)
    commands.add_parser("consolidate", help="make one model of a sharded checkpoint", add_help=False)
    if not arguments or arguments[0] in ("-h", "--help"):
        parser.print_help()
        return
    chosen, _ = parser.parse_known_args(arguments[:2])
    if chosen.command == "train":
        train(chosen.stage, arguments[2:])
    else:
        consolidate(arguments[1:])


if __name__ == "__main__":
    main()
