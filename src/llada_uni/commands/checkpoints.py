"""`convert`, `consolidate`, `merge` and `assemble`: a folder of weights made of others."""

import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from .loading import hide_progress_bars


NewFolder = Annotated[Path, typer.Argument(help="The folder to write; must not exist.")]


def convert(
    source: Annotated[Path, typer.Argument(help="The released checkpoint; with --to-released, ours.")],
    output: NewFolder,
    to_released: Annotated[bool, typer.Option("--to-released", help="Write the released layout back.")] = False,
    decoder: Annotated[str | None, typer.Option(help="turbo, normal or both. Default: what is there.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16, of the weights. Default: as they are.")
    ] = None,
    mask_token: Annotated[
        str | None, typer.Option(help="Of an autoregressive model. Default: its tokenizer's, or a new <|mask|>.")
    ] = None,
) -> None:
    """
    Convert a released checkpoint into a pipeline, or back.

    Of an autoregressive model (Ling) it makes one to be trained by block diffusion.
    """
    from ..conversion import convert_llada_uni_checkpoint as conversion

    if dtype is not None and dtype not in conversion.DTYPES:
        raise ValueError(f"`dtype` must be one of {', '.join(conversion.DTYPES)}, got {dtype!r}.")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what is half written is removed
    typer.echo(conversion.convert(source, output, to_released, decoder, conversion.dtype_of(dtype), mask_token))


def consolidate(
    checkpoint: Annotated[Path, typer.Argument(help="What a sharded training run wrote.")],
    output: NewFolder,
    max_shard_size: Annotated[str, typer.Option(help="Of the largest file.")] = "5GB",
) -> None:
    """Make one model of a sharded checkpoint."""
    from transformers_llada_uni.loading.consolidation import consolidate_checkpoint

    consolidate_checkpoint(checkpoint, output, max_shard_size)


def merge(
    checkpoints: Annotated[list[Path], typer.Argument(help="Two or more checkpoints; with --best, the run's folder.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to write; must not exist.")],
    best: Annotated[int | None, typer.Option(min=2, help="Take that many checkpoints of the run, the best.")] = None,
    metric: Annotated[str, typer.Option(help="What the run has logged, by which --best chooses.")] = "eval_loss",
    greater_is_better: Annotated[
        bool, typer.Option("--greater-is-better", help="The highest is best, and not the lowest.")
    ] = False,
) -> None:
    """Make one model of the mean of several checkpoints' weights."""
    from transformers_llada_uni.loading.checkpoint_merging import best_checkpoints, merge_checkpoints

    if best is not None:
        if len(checkpoints) != 1:
            raise ValueError("With `--best` give one folder, that of the run.")
        checkpoints = best_checkpoints(checkpoints[0], best, metric, greater_is_better)
    merge_checkpoints(checkpoints, output)
    typer.echo(f"{output}: the mean of {', '.join(checkpoint.name for checkpoint in checkpoints)}")


def assemble(
    trained: Annotated[list[Path], typer.Argument(help="What training has written: models, adapters, decoders, ...")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to write; must not exist.")],
    into: Annotated[
        str | None, typer.Option(help="The pipeline with all other parts. Default: what an adapter was trained upon.")
    ] = None,
) -> None:
    """Make a pipeline of another one and what training has written."""
    from ..pipeline_assembly import assemble

    hide_progress_bars()
    typer.echo(f"{output}: with {', '.join(assemble(trained, into, output))}")
