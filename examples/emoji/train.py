"""
Everything that makes the emoji model, in order, on a CPU.

    npm pack emoji-datasource-twitter@16.0.0
    python examples/emoji/train.py emoji-datasource-twitter-16.0.0.tgz --minutes 85

Stops after that many minutes, or when you stop it; the same command goes on where it was. What is finished is noted
in `runs/emoji/finished.txt`; what each step prints stands in `runs/emoji/logs/`.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path


HERE = Path(__file__).parent
RUNS = Path("runs/emoji")
MODEL = RUNS / "model"
# glibc gives large tensors back and fetches them anew for every operation; kept, steps are a quarter faster.
MEMORY_SETTINGS = {
    "MALLOC_MMAP_THRESHOLD_": "4000000000",
    "MALLOC_TRIM_THRESHOLD_": "100000000000",
    "MALLOC_TOP_PAD_": "500000000",
}


def steps(package: Path) -> dict[str, list[str]]:
    """The command of each step, by its name, in order."""

    def script(name: str, *arguments: str | Path) -> list[str]:
        return [sys.executable, str(HERE / f"{name}.py"), *map(str, arguments)]

    def stage(command: str, config: str) -> list[str]:
        config_file = str(HERE / "configs" / f"{config}.yaml")
        return [sys.executable, "-m", "llada_uni.cli", "train", command, "--config", config_file]

    def put(trained: str) -> list[str]:
        return script("put_into_pipeline", RUNS / trained, MODEL)

    return {
        "prepare_data": script("prepare_data", package, RUNS / "data"),
        "build_model": script("build_model", RUNS / "data" / "corpus.txt", MODEL),
        "tokenizer": stage("image_tokenizer", "tokenizer"),
        "put_tokenizer": put("tokenizer"),
        "prepare_tasks": script("prepare_tasks", package, MODEL, RUNS / "tasks"),
        "autoencoder": stage("autoencoder", "autoencoder"),
        "put_autoencoder": put("autoencoder"),
        "text": stage("sft", "text"),
        "alignment": stage("sft", "alignment"),
        "pretraining": stage("sft", "pretraining"),
        "sft": stage("sft", "sft"),
        "refining": stage("sft", "refining"),
        "polishing": stage("sft", "polishing"),
        "finishing": stage("sft", "finishing"),
        "put_language_model": put("finishing"),
        "prepare_preferences": script("prepare_preferences", package, MODEL, RUNS / "preferences"),
        "dpo": stage("dpo", "dpo"),
        "put_preferred": put("dpo"),
        "lora": stage("sft", "lora"),
        "decoder": stage("decoder", "decoder"),
        "put_decoder": put("decoder"),
        "distill": stage("distill", "distill"),
        "put_distilled": put("distill"),
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
    parser.add_argument("package", type=Path, help="emoji-datasource-twitter-16.0.0.tgz")
    parser.add_argument("--minutes", type=float, help="Stop after so long; default: when all is done.")
    arguments = parser.parse_args()
    if not arguments.package.is_file():
        parser.error(f"`package`: there is no file {arguments.package}; `npm pack` fetches it.")
    deadline = None if arguments.minutes is None else time.monotonic() + 60 * arguments.minutes
    RUNS.mkdir(parents=True, exist_ok=True)
    finished_file = RUNS / "finished.txt"
    finished = finished_file.read_text().split() if finished_file.exists() else []
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for name, value in MEMORY_SETTINGS.items():
        os.environ.setdefault(name, value)
    for name, command in steps(arguments.package).items():
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
