"""
The fenced blocks of a document, and how they are run: `python documentation.py README.md 3` does what a reader does in
section 3, in the working directory.

A section (`#` or `##`) is a process of its own, as a reader starts where he finds what he needs; its blocks follow
one another in it. Nothing of a block is changed. A block that cannot run in a test has `<!-- not run: why -->` in the
line above it. Blocks may be indented, as in the tabs of mkdocs-material. Of blocks that are not code but JSON or YAML
the syntax is looked at; `text` is what a program says.
"""

import json
import re
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import yaml


FENCE = re.compile(r"( *)(```+)(\w*)$")
NOT_RUN = re.compile(r" *<!-- not run: (.+) -->$")


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
        elif fence is not None and found and found.groups() == (*fence.groups()[:2], ""):
            code = textwrap.dedent("\n".join(lines[start:number]) + "\n")
            blocks.append(Block(fence.group(3), code, start + 1, section, reason))
            fence = None
        elif fence is None and re.match(r"##? ", line):
            section = line.strip("# ")
    if fence is not None:
        raise ValueError(f"The block that begins in line {start} has no end.")
    return blocks


def runnable_blocks(document: str) -> list[Block]:
    """All but those that install something, or are said not to run."""
    return [block for block in blocks_of(document) if not (block.not_run or block.is_installation)]


def sections_of(document: str) -> list[list[Block]]:
    """The blocks that are run, by section; none is empty."""
    return [list(section) for _, section in groupby(runnable_blocks(document), key=lambda block: block.section)]


def run(block: Block, path: Path, namespace: dict[str, object]) -> None:
    if block.language == "python":
        # The lines before it are left empty, so that a traceback shows the lines of the document.
        exec(compile("\n" * (block.line - 1) + block.code, str(path), "exec"), namespace)
    elif block.language == "bash":
        subprocess.run(["bash", "-euo", "pipefail", "-c", block.code], check=True)
    elif block.language == "yaml":
        yaml.safe_load(block.code)
    elif block.language == "json":
        for line in block.code.splitlines():
            json.loads(line)
    elif block.language != "text":
        raise ValueError(f"A block is python, bash, yaml, json or text, not {block.language!r}.")


def main() -> None:
    path, number = Path(sys.argv[1]), int(sys.argv[2])
    sys.path[0] = ""  # the reader's working directory, and not the tests
    namespace: dict[str, object] = {"__name__": "__main__"}
    for block in sections_of(path.read_text())[number]:
        print(f"{path.name}, line {block.line}, under {block.section!r}", flush=True)
        run(block, path, namespace)


if __name__ == "__main__":
    main()
