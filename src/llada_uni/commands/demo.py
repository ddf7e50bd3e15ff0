"""`demo`: the web page, until it is stopped."""

import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .listening import check_can_listen
from .loading import load
from .options import Device, Dtype, Host, Model


if TYPE_CHECKING:
    from diffusers_llada_uni import LLaDAUniPipeline

USER, PASSWORD = "llada-uni", "LLADA_UNI_PASSWORD"


def demo(
    model: Model = "emoji",
    host: Host = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Where to listen.")] = 7860,
    share: Annotated[bool, typer.Option(help="Let all the world in, through a server of Gradio's.")] = False,
    password: Annotated[
        str | None,
        typer.Option(envvar=PASSWORD, help=f"What visitors must type, as the user {USER}. Default: none."),
    ] = None,
    device: Device = None,
    dtype: Dtype = "auto",
) -> None:
    """Show the model on a web page: draw, edit, chat, stories."""
    if password == "" or os.environ.get(PASSWORD) == "":  # of the latter typer makes None
        raise ValueError("`password` must not be empty.")
    run_demo(
        lambda: load(model, device, dtype),
        host,
        port,
        share,
        password,
        lambda url: typer.echo(f"The page is at {url}"),
    )


def wait() -> None:
    """Until Ctrl-C, which Gradio's own way to wait takes for a good end."""
    while True:
        time.sleep(1)


def run_demo(
    load: Callable[[], "LLaDAUniPipeline"],
    host: str,
    port: int,
    share: bool,
    password: str | None,
    tell: Callable[[str], None],
) -> None:
    """
    Serves the page until Ctrl-C.

    Args:
        load: Loads the pipeline, once it is known that there is what shows it.
        host, port: Where to listen.
        share: Whether to let all the world in, through a server of Gradio's.
        password: What visitors must type, as the user `USER`; `None` lets in whoever reaches the page.
        tell: Called with the page's address.

    Raises:
        ModuleNotFoundError: if Gradio is not installed.
        OSError: if the port is taken.
    """
    host = host.removeprefix("[").removesuffix("]")
    check_can_listen("demo", ("gradio",), host, port)
    check_can_listen("demo", (), "127.0.0.1", port)  # where Gradio looks whether a port is free, whatever the host
    from ..demo.app import Demo

    demo = Demo(load())
    try:
        settings: dict[str, Any] = {"share": share, "quiet": True, "prevent_thread_lock": True}
        if password is not None:
            settings |= {"auth": (USER, password), "auth_message": f"The user is {USER}."}
        tell(demo.launch(f"[{host}]" if ":" in host else host, port, **settings))  # it makes an address of it
        wait()
    finally:
        demo.close()
