"""
The command `llada-uni`.

    llada-uni train sft --config sft.yaml --learning_rate 1e-5
    accelerate launch --config_file fsdp2.yaml -m llada_uni.cli train sft --config sft.yaml
    llada-uni consolidate runs/sft/checkpoint-1000 runs/sft/model
"""

import argparse
import contextlib
import sys
import traceback
from collections.abc import Iterator, Sequence
from importlib.metadata import version


STAGES = ("sft", "dpo", "grpo", "image_tokenizer", "autoencoder", "decoder", "distill")


@contextlib.contextmanager
def told_in_a_line() -> Iterator[None]:
    """
    A user's mistake is told in a line, with exit status 2: a value that is refused, a file or a package that is not
    there. Anything else is ours, and keeps its traceback.
    """
    try:
        yield
    except (ValueError, TypeError, OSError, ModuleNotFoundError) as error:
        *_, (frame, _) = traceback.walk_tb(error.__traceback__)
        if isinstance(error, TypeError) and "llada_uni" not in frame.f_globals["__name__"]:
            raise
        print("llada-uni:", " ".join(str(error).split()) or type(error).__name__, file=sys.stderr)
        sys.exit(2)


def train(stage: str, arguments: Sequence[str]) -> None:
    with told_in_a_line():
        from transformers_llada_uni.optional_dependencies import require_extra

        require_extra("train", "datasets", "peft", "trl")
        from .stage_options import StageParser
        from .training_stages import finish, stages

        options, build = stages()[stage]
        trainer, script_args = build(*StageParser(stage, options).parse(arguments))
    finish(trainer, script_args)


def consolidate(arguments: argparse.Namespace) -> None:
    with told_in_a_line():
        from transformers_llada_uni.loading.consolidation import consolidate_checkpoint

        consolidate_checkpoint(arguments.checkpoint, arguments.output, arguments.max_shard_size)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="llada-uni", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"llada-uni {version('llada-uni')}")
    commands = parser.add_subparsers(dest="command", required=True)
    training = commands.add_parser("train", help="train a stage", epilog="llada-uni train <stage> --help: its options")
    training.add_argument("stage", choices=STAGES)
    training.add_argument("options", nargs=argparse.REMAINDER, help="of the stage")
    shards = commands.add_parser("consolidate", help="make one model of a sharded checkpoint")
    shards.add_argument("checkpoint", help="a checkpoint that a sharded training run wrote")
    shards.add_argument("output", help="the folder to write; must not exist")
    shards.add_argument("--max-shard-size", default="5GB", help="largest file (default: %(default)s)")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, or 130 after Ctrl-C."""
    parser = make_parser()
    given = sys.argv[1:] if arguments is None else list(arguments)
    parsed = parser.parse_args(given or ["--help"])
    try:
        if parsed.command == "train":
            train(parsed.stage, parsed.options)
        else:
            consolidate(parsed)
    except KeyboardInterrupt:
        print("llada-uni: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
