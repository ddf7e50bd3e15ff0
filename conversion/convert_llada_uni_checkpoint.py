"""
Converts a LLaDA2.0-Uni checkpoint from the released layout to a diffusers pipeline folder, and back.

    python conversion/convert_llada_uni_checkpoint.py SRC DST [--decoder turbo|normal|both] [--dtype bfloat16]
    python conversion/convert_llada_uni_checkpoint.py SRC DST --to-released

and an autoregressive checkpoint of the family (Ling-mini-2.0) to a language model to train by block diffusion:

    python conversion/convert_llada_uni_checkpoint.py LING DST [--mask-token TOKEN]

All files are checked before anything is written, the data is copied one tensor at a time, compared with its source
afterwards, and DST appears only when all of it is right.
"""

import argparse
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING


# torch, and with it what reads and writes tensors, is imported once the request has been looked at.
if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "bfloat16", "float16")
DECODER_CHOICES = ("turbo", "normal", "both")


def convert_to_diffusers(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    decoder: str | None = None,
    dtype: "torch.dtype | None" = None,
    progress: bool = True,
) -> Path:
    """
    Converts a checkpoint in the released layout to a folder that `DiffusionPipeline.from_pretrained` loads.

    Args:
        source: Folder in the released layout.
        destination: Folder to create; must not exist.
        decoder: `"turbo"`, `"normal"`, or `"both"`. Default: those that are there.
        dtype: Cast the weights to this dtype (the router's `expert_bias` to float32). Default: keep them as they are.
        progress: Show a progress bar (on a terminal).

    Returns:
        `destination`.

    Raises:
        FileExistsError: if `destination` exists.
        FileNotFoundError: if a file or shard of `source` is missing.
        ValueError: if a file is truncated or says what cannot be, tensors are missing, extra or misshapen, codebooks
            differ, the tokenizer lacks a token, or a value does not fit into `dtype`.
        OSError: if there is no room, or a file cannot be written. In all cases nothing is left behind; what a process
            that was killed left of the same destination is removed with a warning.
    """
    source, destination = _check_request(source, destination, decoder, dtype)
    from llada_uni.conversion.diffusers_plan import plan_diffusers
    from llada_uni.conversion.output_plan import carry_out

    return carry_out(plan_diffusers(source, destination.name, decoder, dtype), destination, progress)


def convert_to_released(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    decoder: str | None = None,
    dtype: "torch.dtype | None" = None,
    progress: bool = True,
) -> Path:
    """
    Converts our layout to the released one.

    Args:
        source: A pipeline folder (written by [`convert_to_diffusers`] or by the pipeline's `save_pretrained`), or a
            folder that `LLaDAUniForConditionalGeneration.save_pretrained` wrote; the latter gives the backbone, the
            image tokenizer and, where the processor was saved to the same folder, the tokenizer.
        destination, decoder, dtype, progress: As in [`convert_to_diffusers`].

    Returns:
        `destination`.

    Raises:
        FileExistsError, FileNotFoundError, ValueError, OSError: As in [`convert_to_diffusers`].
    """
    source, destination = _check_request(source, destination, decoder, dtype)
    from llada_uni.conversion.output_plan import carry_out
    from llada_uni.conversion.released_plan import plan_released

    return carry_out(plan_released(source, decoder, dtype), destination, progress)


def convert_autoregressive(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    mask_token: str | None = None,
    dtype: "torch.dtype | None" = None,
    progress: bool = True,
) -> Path:
    """
    Converts an autoregressive checkpoint of the family (BailingMoeV2: Ling-mini-2.0 and its siblings) to a folder that
    `AutoModelForCausalLM.from_pretrained` loads: the same model, which fills in masks once it is trained to, as the
    stage `"from_autoregressive"` does. With `block_length=1` it computes what it did.

    Args:
        source: The folder of the checkpoint.
        destination: As in [`convert_to_diffusers`].
        mask_token: A token that is not in use, or a new one, to stand for "not yet written". Its embedding is drawn as
            those of other tokens are spread. Default: the tokenizer's mask token, which stays, or else `<|mask|>`.
        dtype, progress: As in [`convert_to_diffusers`].

    Returns:
        `destination`.

    Raises:
        FileExistsError, FileNotFoundError, OSError: As in [`convert_to_diffusers`].
        ValueError: as there; and for a setting, named, that the model of block diffusion has no place for, or if the
            vocabulary has no room for the mask token.
    """
    source, destination = _check_request(source, destination, None, dtype)
    if mask_token is not None and not mask_token.strip():
        raise ValueError(f"`mask_token` must be a token, got {mask_token!r}.")
    from llada_uni.conversion.autoregressive_plan import plan_autoregressive
    from llada_uni.conversion.output_plan import carry_out

    return carry_out(plan_autoregressive(source, mask_token, dtype), destination, progress)


def convert(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    to_released: bool = False,
    decoder: str | None = None,
    dtype: "torch.dtype | None" = None,
    mask_token: str | None = None,
) -> Path:
    """
    Whichever of the conversions `source` asks for.

    Raises:
        ValueError: for an argument that has no meaning for it; and what the conversions raise.
    """
    source, destination = _check_request(source, destination, decoder, dtype)
    if not to_released:
        from llada_uni.conversion.autoregressive_plan import is_autoregressive

        if is_autoregressive(source):
            if decoder is not None:
                raise ValueError(f"`decoder` is {decoder!r}, but {source} is a language model, without a decoder.")
            return convert_autoregressive(source, destination, mask_token, dtype)
    if mask_token is not None:
        raise ValueError(f"`mask_token` is for an autoregressive model, which {source} is not.")
    write = convert_to_released if to_released else convert_to_diffusers
    return write(source, destination, decoder, dtype)


def _check_request(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    decoder: str | None,
    dtype: "torch.dtype | None",
) -> tuple[Path, Path]:
    source, destination = Path(source), Path(destination).absolute()
    if not source.is_dir():
        raise FileNotFoundError(f"The source {source} is not a folder.")
    if os.path.lexists(destination):
        raise FileExistsError(f"The destination {destination} exists already; remove it or name another.")
    if decoder not in (None, *DECODER_CHOICES):
        raise ValueError(f"`decoder` must be one of {', '.join(DECODER_CHOICES)}, got {decoder!r}.")
    if dtype is not None:
        import torch

        if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise TypeError(f"`dtype` must be a floating-point torch.dtype or None, got {dtype!r}.")
    return source, destination


def dtype_of(name: str | None) -> "torch.dtype | None":
    """The dtype that one of `DTYPES` names."""
    if name is None:
        return None
    import torch

    return getattr(torch, name)


def _parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="SRC", help="folder to convert")
    parser.add_argument("destination", metavar="DST", help="folder to create; must not exist")
    parser.add_argument("--decoder", choices=DECODER_CHOICES, help="decoders to convert (default: those in SRC)")
    parser.add_argument(
        "--dtype", choices=DTYPES, help="dtype of the weights (default: as in SRC; the router's bias is float32)"
    )
    parser.add_argument("--to-released", action="store_true", help="from our layout to the released one")
    parser.add_argument("--mask-token", help="of an autoregressive SRC (default: its tokenizer's, or <|mask|>)")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = _parse_arguments(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the temporary folder is removed
    try:
        settings = (args.to_released, args.decoder, dtype_of(args.dtype), args.mask_token)
        path = convert(args.source, args.destination, *settings)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130
    print(path)
    return 0


__all__ = ["convert", "convert_autoregressive", "convert_to_diffusers", "convert_to_released", "main"]


if __name__ == "__main__":
    sys.exit(main())
