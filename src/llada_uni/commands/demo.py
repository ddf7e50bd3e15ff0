"""`demo`: the web page, until it is stopped."""

import socket
from collections.abc import Callable
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from diffusers_llada_uni import LLaDAUniPipeline


def run_demo(
    load: Callable[[], "LLaDAUniPipeline"], host: str, port: int, share: bool, tell: Callable[[str], None]
) -> None:
    """
    Serves the page until Ctrl-C.

    Args:
        load: Loads the pipeline, once it is known that there is what shows it.
        host, port: Where to listen.
        share: Whether to let all the world in, through a server of Gradio's.
        tell: Called with the page's address.

    Raises:
        ModuleNotFoundError: if Gradio is not installed.
        OSError: if the port is taken.
    """
    from transformers_llada_uni.optional_dependencies import require_extra

    require_extra("demo", "gradio")
    socket.create_server((host, port)).close()  # a port that is taken is told before the model is loaded
    from ..demo.app import Demo

    demo = Demo(load())
    try:
        tell(demo.launch(host, port, share=share, quiet=True, prevent_thread_lock=True))
        demo.page.block_thread()
    finally:
        demo.close()
