"""
Everything that makes the emoji model, in order.

    python examples/emoji/train.py packages --minutes 85        # packages.py says what it holds

Language model and decoder need one another only at the end and are trained side by side, each on one core. Stops after
that many minutes, or when you stop it; the same command goes on where it was. What is finished is noted in
`runs/emoji/finished.txt`; what each step prints stands in `runs/emoji/logs/`.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from packages import check


HERE = Path(__file__).parent
RUNS = Path("runs/emoji")
MODEL, DATA = RUNS / "model", RUNS / "data"
FINISHED = RUNS / "finished.txt"
SIDE_BY_SIDE = 2
SETTINGS = {
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // SIDE_BY_SIDE)),
    # glibc gives large tensors back and fetches them anew for every operation; kept, steps are a quarter faster.
    "MALLOC_MMAP_THRESHOLD_": "4000000000",
    "MALLOC_TRIM_THRESHOLD_": "100000000000",
    "MALLOC_TOP_PAD_": "500000000",
}


class Step(NamedTuple):
    command: list[str]
    after: tuple[str, ...] = ()


def all_steps(packages: Path, gpu: bool) -> dict[str, Step]:
    """The command of each step and what it waits for, by its name; of two that may run, the first named does."""

    def script(name: str, *arguments: str | Path, after: tuple[str, ...] = ()) -> Step:
        return Step([sys.executable, str(HERE / f"{name}.py"), *map(str, arguments)], after)

    def stage(command: str, config: str, *after: str) -> Step:
        config_file = str(HERE / "configs" / f"{config}.yaml")
        settings = ["--use_cpu", "false"] if gpu else []
        return Step(
            [sys.executable, "-m", "llada_uni.cli", "train", command, "--config", config_file, *settings], after
        )

    def put(trained: str, *after: str) -> Step:
        return script("put_into_pipeline", RUNS / trained, MODEL, after=(trained, *after))

    return {
        "prepare_data": script("prepare_data", packages, DATA),
        "build_model": script("build_model", DATA / "corpus.txt", MODEL, after=("prepare_data",)),
        "tokenizer": stage("image_tokenizer", "tokenizer", "build_model"),
        "put_tokenizer": put("tokenizer"),
        "prepare_codes": script("prepare_codes", packages, MODEL, DATA, after=("put_tokenizer",)),
        # The language model: all it needs to know of images is their codes.
        "prepare_tasks": script(
            "prepare_tasks", packages, MODEL, DATA / "codes.json", RUNS / "tasks", after=("prepare_codes",)
        ),
        "text": stage("sft", "text", "prepare_tasks"),
        "alignment": stage("sft", "alignment", "text"),
        "pretraining": stage("sft", "pretraining", "alignment"),
        "sft": stage("sft", "sft", "pretraining"),
        "finishing": stage("sft", "finishing", "sft"),
        # From codes to pixels, and from pixels to the settled codes.
        "autoencoder": stage("autoencoder", "autoencoder", "build_model"),
        "put_autoencoder": put("autoencoder", "put_tokenizer"),
        "prepare_decoder_data": script(
            "prepare_decoder_data", MODEL, DATA, after=("put_autoencoder", "prepare_codes")
        ),
        "decoder": stage("decoder", "decoder", "prepare_decoder_data"),
        "put_decoder": put("decoder"),
        "prepare_hard_data": script("prepare_hard_data", MODEL, DATA, after=("put_decoder",)),
        "decoder_hard": stage("decoder", "decoder_hard", "prepare_hard_data"),
        "put_decoder_hard": put("decoder_hard"),
        "distill": stage("distill", "distill", "put_decoder_hard"),
        "put_distilled": put("distill"),
        "tokenizer_alone": stage("image_tokenizer_alignment", "tokenizer_alone", "prepare_codes"),
        "put_tokenizer_alone": put("tokenizer_alone"),
        "tokenizer_alignment": stage("image_tokenizer_alignment", "tokenizer_alignment", "put_tokenizer_alone"),
        "put_aligned_tokenizer": put("tokenizer_alignment"),
        # What was drawn is read as what it was drawn from.
        "prepare_drawings": script(
            "prepare_drawings", packages, MODEL, DATA, after=("put_distilled", "put_aligned_tokenizer")
        ),
        "tokenizer_drawings": stage("image_tokenizer_alignment", "tokenizer_drawings", "prepare_drawings"),
        "put_tokenizer_of_drawings": put("tokenizer_drawings"),
        # Last what needs both: words and questions, on images as they are read.
        "prepare_readings": script("prepare_readings", MODEL, DATA, after=("put_tokenizer_of_drawings",)),
        "prepare_words": script(
            *("prepare_tasks", packages, MODEL, DATA / "codes.json", RUNS / "tasks"),
            *("--readings", DATA / "readings.json"),
            after=("prepare_readings",),
        ),
        "words": stage("sft", "words", "finishing", "prepare_words"),
        "put_language_model": put("words"),
        "lora": stage("sft", "lora", "put_language_model"),
    }


def run(steps: dict[str, Step], deadline: float) -> list[str]:
    """Runs what is not finished; returns what is not, because the time was up. A stage goes on from its last
    checkpoint."""
    finished = FINISHED.read_text().split() if FINISHED.exists() else []
    running: dict[str, subprocess.Popen[bytes]] = {}
    try:
        while len(finished) < len(steps) and time.monotonic() < deadline:
            for name, step in steps.items():
                if len(running) == SIDE_BY_SIDE:
                    break
                if name not in (*finished, *running) and set(step.after) <= set(finished):
                    running[name] = start(name, step.command)
            for name, process in list(running.items()):
                if process.poll() is None:
                    continue
                del running[name]
                if process.returncode:
                    raise SystemExit(f"{name} failed; the end of {log_of(name)} says why.")
                finished.append(name)
                FINISHED.write_text("\n".join(finished) + "\n")
            time.sleep(0.5)
    except KeyboardInterrupt:
        pass
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()
    return [name for name in steps if name not in finished]


def log_of(name: str) -> Path:
    return RUNS / "logs" / f"{name}.log"


def start(name: str, command: list[str]) -> subprocess.Popen[bytes]:
    print(f"{time.strftime('%H:%M:%S')} {name} (see {log_of(name)})", flush=True)
    log_of(name).parent.mkdir(parents=True, exist_ok=True)
    with log_of(name).open("a", encoding="utf-8") as output:
        return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", type=Path, help="The folder of the npm packages, see packages.py.")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="Stop after so long; default: never.")
    parser.add_argument("--gpu", action="store_true", help="Train on the GPU.")
    arguments = parser.parse_args()
    try:
        check(arguments.packages)
    except FileNotFoundError as error:
        parser.error(str(error))
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    RUNS.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stopped by whatever, it stops what it has started
    left = run(all_steps(arguments.packages, arguments.gpu), time.monotonic() + 60 * arguments.minutes)
    print(f"Not done yet: {', '.join(left)}; the same command goes on." if left else f"All done: {MODEL}.")


if __name__ == "__main__":
    main()
