"""
Everything that makes the emoji model, in order, on a CPU.

    python examples/emoji/train.py packages --minutes 85        # packages.py says what it holds

Stops after that many minutes, or when you stop it; the same command goes on where it was. What is finished is noted
in `runs/emoji/finished.txt`; what each step prints stands in `runs/emoji/logs/`.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

from packages import check


HERE = Path(__file__).parent
RUNS = Path("runs/emoji")
MODEL, DATA = RUNS / "model", RUNS / "data"
# glibc gives large tensors back and fetches them anew for every operation; kept, steps are a quarter faster.
MEMORY_SETTINGS = {
    "MALLOC_MMAP_THRESHOLD_": "4000000000",
    "MALLOC_TRIM_THRESHOLD_": "100000000000",
    "MALLOC_TOP_PAD_": "500000000",
}


def steps(packages: Path) -> dict[str, list[str]]:
    """The command of each step, by its name, in order."""

    def script(name: str, *arguments: str | Path) -> list[str]:
        return [sys.executable, str(HERE / f"{name}.py"), *map(str, arguments)]

    def stage(command: str, config: str) -> list[str]:
        config_file = str(HERE / "configs" / f"{config}.yaml")
        return [sys.executable, "-m", "llada_uni.cli", "train", command, "--config", config_file]

    def put(trained: str) -> list[str]:
        return script("put_into_pipeline", RUNS / trained, MODEL)

    return {
        "prepare_data": script("prepare_data", packages, DATA),
        "build_model": script("build_model", DATA / "corpus.txt", MODEL),
        "tokenizer": stage("image_tokenizer", "tokenizer"),
        "put_tokenizer": put("tokenizer"),
        "prepare_codes": script("prepare_codes", packages, MODEL, DATA),
        "tokenizer_alignment": stage("image_tokenizer_alignment", "tokenizer_alignment"),
        "put_aligned_tokenizer": put("tokenizer_alignment"),
        "autoencoder": stage("autoencoder", "autoencoder"),
        "put_autoencoder": put("autoencoder"),
        "prepare_decoder_data": script("prepare_decoder_data", MODEL, DATA),
        "decoder": stage("decoder", "decoder"),
        "put_decoder": put("decoder"),
        "distill": stage("distill", "distill"),
        "put_distilled": put("distill"),
        "prepare_drawings": script("prepare_drawings", packages, MODEL, DATA),
        "tokenizer_drawings": stage("image_tokenizer_alignment", "tokenizer_drawings"),
        "put_tokenizer_of_drawings": put("tokenizer_drawings"),
        "prepare_tasks": script("prepare_tasks", packages, MODEL, DATA / "codes.json", RUNS / "tasks"),
        "text": stage("sft", "text"),
        "alignment": stage("sft", "alignment"),
        "pretraining": stage("sft", "pretraining"),
        "sft": stage("sft", "sft"),
        "finishing": stage("sft", "finishing"),
        "put_language_model": put("finishing"),
        "lora": stage("sft", "lora"),
    }


def run(name: str, command: list[str], deadline: float | None) -> bool:
    """Runs a step; False if the time was up. Its last checkpoint is where it goes on."""
    log = RUNS / "logs" / f"{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    print(f"{time.strftime('%H:%M:%S')} {name} (see {log})", flush=True)
    with log.open("a", encoding="utf-8") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        try:
            remaining = None if deadline is None else max(deadline - time.monotonic(), 1)
            code = process.wait(timeout=remaining)
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            process.terminate()
            process.wait()
            return False
    if code:
        raise SystemExit(f"{name} failed with exit code {code}; the end of {log} says why.")
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", type=Path, help="The folder of the npm packages, see packages.py.")
    parser.add_argument("--minutes", type=float, help="Stop after so long; default: when all is done.")
    arguments = parser.parse_args()
    try:
        check(arguments.packages)
    except FileNotFoundError as error:
        parser.error(str(error))
    deadline = None if arguments.minutes is None else time.monotonic() + 60 * arguments.minutes
    RUNS.mkdir(parents=True, exist_ok=True)
    finished_file = RUNS / "finished.txt"
    finished = finished_file.read_text().split() if finished_file.exists() else []
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for name, value in MEMORY_SETTINGS.items():
        os.environ.setdefault(name, value)
    for name, command in steps(arguments.packages).items():
        if name in finished:
            continue
        if not run(name, command, deadline):
            print(f"Stopped in {name}; the same command goes on.")
            return
        finished.append(name)
        finished_file.write_text("\n".join(finished) + "\n")
    print(f"All done: {MODEL}.")


if __name__ == "__main__":
    main()
