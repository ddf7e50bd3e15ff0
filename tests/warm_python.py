"""
A `python` whose slow imports are done: `serve` imports other people's libraries once, which takes longer than most
commands do, and forks a process for each call of what `write_command` writes. That process is fresh in all else: it
has its own arguments, working directory, environment, standard streams, exit code and signals, and has imported
nothing of this project.
"""

import gc
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


# What asks for a process, in place of `python`. It imports next to nothing: it is started some hundred times.
COMMAND = """#!{python} -IS
import json, os, signal, socket, sys
arguments = {prefix} + sys.argv[1:]
if arguments[:1] not in (["-m"], ["-c"]) and not os.path.isfile("".join(arguments[:1])):
    os.execv({python!r}, [{python!r}, *arguments])
connection = socket.socket(socket.AF_UNIX)
connection.connect({address!r})
socket.send_fds(connection, [b"."], [0, 1, 2])
call = json.dumps([arguments, os.getcwd(), dict(os.environ)])
answers = connection.makefile("rw")
print(call, file=answers, flush=True)
process = int(answers.readline())
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, frame: os.kill(process, number))
sys.exit(int(answers.readline() or 1))
"""


def write_command(path: Path, address: str, *prefix: str) -> None:
    """
    Args:
        path: Of the command to write.
        address: Where `serve` listens.
        *prefix: Its first arguments.
    """
    path.write_text(COMMAND.format(python=sys.executable, address=address, prefix=list(prefix)))
    path.chmod(0o755)


@contextmanager
def listening(address: str, environment: dict[str, str]) -> Iterator[None]:
    """`serve` in a process of its own, which has done its imports."""
    command = [sys.executable, __file__, address]
    with subprocess.Popen(command, env=environment, start_new_session=True) as process:
        while not os.path.exists(address):
            assert process.poll() is None
            time.sleep(0.1)
        yield
        os.killpg(process.pid, signal.SIGKILL)


def run(arguments: list[str]) -> None:
    """What `python *arguments` does."""
    kind, *rest = arguments
    if kind == "-c":
        sys.argv, sys.path[0] = ["-c", *rest[1:]], ""
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    elif kind == "-m":
        sys.argv, sys.path[0] = rest, os.getcwd()
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = arguments, os.path.dirname(os.path.abspath(kind))
        runpy.run_path(kind, run_name="__main__")


def answer(connection: socket.socket) -> None:
    """Does what one call asks for, in a process of its own, and ends it."""
    _, streams, *_ = socket.recv_fds(connection, 1, 3)
    for number, (name, stream) in enumerate(zip(("stdin", "stdout", "stderr"), streams, strict=True)):
        os.dup2(stream, number)
        os.close(stream)
        setattr(sys, name, open(number, "w" if number else "r", 1 if number == 2 else -1, closefd=False))  # noqa: SIM115
    answers = connection.makefile("rw")
    arguments, folder, environment = json.loads(answers.readline())
    print(os.getpid(), file=answers, flush=True)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    code = 0
    try:
        run(arguments)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    print(code, file=answers, flush=True)
    os._exit(code)


def serve(address: str) -> None:
    """Listens at `address`, a path, until it is killed, or nobody is left who could do that."""
    parent = os.getppid()
    gc.disable()  # what is imported stays: nobody needs to look through it
    import datasets  # noqa: F401
    import diffusers.guiders
    import diffusers.pipelines.auto_pipeline  # noqa: F401  and with it all pipelines
    import peft  # noqa: F401
    import pydantic.type_adapter  # noqa: F401
    import torch  # noqa: F401
    import transformers  # noqa: F401
    import typer  # noqa: F401
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImageTransformer2DModel  # noqa: F401
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping
    from transformers.models.glm4_moe import modeling_glm4_moe  # noqa: F401
    from transformers.models.glm_image import modeling_glm_image  # noqa: F401
    from trl import DPOTrainer, GRPOTrainer, SFTTrainer  # noqa: F401

    get_checkpoint_conversion_mapping("")  # which makes, once, a thousand regular expressions
    gc.freeze()
    gc.enable()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(64)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the processes
    listener.settimeout(10)
    while os.getppid() == parent:
        try:
            connection, _ = listener.accept()
        except TimeoutError:
            continue
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            listener.close()
            answer(connection)
        connection.close()


if __name__ == "__main__":
    serve(sys.argv[1])
