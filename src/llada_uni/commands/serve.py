"""`serve`: the server, until it is stopped."""

import os
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from diffusers_llada_uni import LLaDAUniPipeline


def run_server(
    pipe: "LLaDAUniPipeline", host: str, port: int, engine_settings: dict[str, int], **settings: Any
) -> None:
    """
    Serves until SIGINT or SIGTERM; what has been accepted by then is answered. A second one ends it at once.

    Args:
        pipe: The pipeline.
        host, port: Where to listen.
        engine_settings: Of [`~llada_uni.serving.engine.Engine`].
        **settings: Of [`~llada_uni.serving.settings.ServerSettings`].
    """
    import uvicorn

    from ..serving.app import create_app
    from ..serving.engine import Engine
    from ..serving.settings import ServerSettings

    pipe.set_progress_bar_config(disable=True)
    engine = Engine(pipe, **engine_settings)
    app = create_app(engine, ServerSettings(**settings))
    try:
        uvicorn.run(app, host=host, port=port, log_level="info", server_header=False)
    finally:
        if engine.is_alive:  # a second Ctrl-C waits for nobody, and Python cannot end threads that compute
            os._exit(130)
