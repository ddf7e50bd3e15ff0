"""
Runs the fenced blocks of a document as a reader would: `python documentation.py README.md DIRECTORY`.

A section (`#` or `##`) is a process of its own, as a reader starts where he finds what he needs; its blocks follow
one another in it, in the folder of DIRECTORY that is called by the section's number. Nothing of a block is changed. A
block that cannot run in a test has `<!-- not run: why -->` in the line above it.
"""

import os
import re
import subprocess
import sys
import traceback
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path


FENCE = re.compile(r"(```+)(\w*)$")
NOT_RUN = re.compile(r"<!-- not run: (.+) -->$")


@dataclass(frozen=True)
class Block:
    """
    Args:
        language: What is written behind the fence.
        code: The lines between the fences.
        line: Number of the first of them in the document.
        section: The heading that it stands under.
        not_run: Why it cannot run here, or `None`.
    """

    language: str
    code: str
    line: int
    section: str
    not_run: str | None

    @property
    def is_installation(self) -> bool:
        """Whether it installs something: tests then compare it with `pyproject.toml`."""
        return "pip install" in self.code


def blocks_of(document: str) -> list[Block]:
    """The fenced blocks of a document (its text), in order."""
    blocks, section, fence, start, reason = [], "", None, 0, None
    lines = document.splitlines()
    for number, line in enumerate(lines):
        found = FENCE.match(line)
        if fence is None and found:
            fence, start = found, number + 1
            above = NOT_RUN.match(lines[number - 1]) if number else None
            reason = above.group(1) if above else None
        elif fence is not None and found and found.group(1) == fence.group(1) and not found.group(2):
            code = "\n".join(lines[start:number]) + "\n"
            blocks.append(Block(fence.group(2), code, start + 1, section, reason))
            fence = None
        elif fence is None and re.match(r"##? ", line):
            section = line.strip("# ")
    if fence is not None:
        raise ValueError(f"The block that begins in line {start} has no end.")
    return blocks


def sections_of(document: str) -> list[list[Block]]:
    """The blocks that are run, by section; none is empty."""
    blocks = [block for block in blocks_of(document) if not (block.not_run or block.is_installation)]
    return [list(section) for _, section in groupby(blocks, key=lambda block: block.section)]


def run(block: Block, path: Path, namespace: dict[str, object]) -> None:
    if block.language == "python":
        # The lines before it are left empty, so that a traceback shows the lines of the document.
        exec(compile("\n" * (block.line - 1) + block.code, str(path), "exec"), namespace)
    elif block.language == "bash":
        subprocess.run(["bash", "-euo", "pipefail", "-c", block.code], check=True)
    else:
        raise ValueError(f"A block is python or bash, not {block.language!r}.")


def run_section(blocks: list[Block], path: Path, directory: Path) -> bool:
    """Whether all blocks ran, one after the other, in a process that has imported nothing of this project yet."""
    process = os.fork()
    if process == 0:
        os.chdir(directory)
        namespace: dict[str, object] = {"__name__": "__main__"}
        for block in blocks:
            print(f"line {block.line}, under {block.section!r}", flush=True)
            try:
                run(block, path, namespace)
            except BaseException:
                traceback.print_exc()
                print(f"FAILED: {path.name}, line {block.line}, under {block.section!r}", file=sys.stderr, flush=True)
                os._exit(1)
        sys.stdout.flush()
        os._exit(0)
    return os.waitpid(process, 0)[1] == 0


def main() -> None:
    path, directory = (Path(argument).resolve() for argument in sys.argv[1:])
    sys.path[0] = ""  # the reader's working directory, and not the tests
    sections = sections_of(path.read_text())
    if not sections:
        return
    # Once for all sections: importing them takes longer than most sections do.
    import diffusers  # noqa: F401
    import torch  # noqa: F401
    import transformers  # noqa: F401

    results = [run_section(blocks, path, directory / str(number)) for number, blocks in enumerate(sections)]
    sys.exit(0 if all(results) else 1)


if __name__ == "__main__":
    main()
