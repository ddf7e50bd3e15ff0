"""`serve`: the server, until it is stopped."""

import ipaddress
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .listening import check_can_listen
from .loading import load
from .options import Device, Dtype, Host, Model, Tokens


if TYPE_CHECKING:
    from diffusers_llada_uni import LLaDAUniPipeline

PACKAGES = ("fastapi", "uvicorn", "prometheus_client", "python_multipart", "httpx")


def serve(
    model: Model = "emoji",
    host: Host = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Where to listen; 0 is any that is free.")] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(envvar="LLADA_UNI_API_KEY", help="What clients must send; needed where others can reach it."),
    ] = None,
    no_api_key: Annotated[
        bool, typer.Option("--no-api-key", help="Let in whoever can reach --host, without a key.")
    ] = False,
    name: Annotated[str | None, typer.Option(help="What clients call the model. Default: the folder's name.")] = None,
    max_rows: Annotated[int, typer.Option(min=1, help="Answers under work at once.")] = 32,
    max_batch_images: Annotated[int, typer.Option(min=1, help="Images made at once.")] = 16,
    max_waiting: Annotated[int, typer.Option(min=1, help="Requests that may wait, of text and images each.")] = 256,
    max_new_tokens: Tokens = 1024,
    max_side: Annotated[int, typer.Option(min=1, help="Longest side of an image, in pixels.")] = 2048,
    allow_images_from: Annotated[
        list[str] | None, typer.Option(help="A host from which images are fetched; more than once.")
    ] = None,
    device: Device = None,
    dtype: Dtype = "auto",
) -> None:
    """Serve the model as OpenAI's API: chat, images, edits."""
    host = host.removeprefix("[").removesuffix("]")
    if api_key == "":
        raise ValueError("`api_key` must not be empty.")
    if api_key is not None and no_api_key:
        raise ValueError("`--api-key` (or LLADA_UNI_API_KEY) and `--no-api-key` exclude each other.")
    if api_key is None and not (no_api_key or _is_loopback(host)):
        raise ValueError(
            f"`host` {host!r} lets in others than this machine: give an `--api-key`, or say `--no-api-key`."
        )
    from ..pipeline_loading import resolve_model

    resolve_model(model)  # before torch is imported
    check_can_listen("serve", PACKAGES, host, port)
    run_server(
        load(model, device, dtype),
        host,
        port,
        {"max_rows": max_rows, "max_images": max_batch_images, "max_waiting": max_waiting},
        model_name=name or Path(model).resolve().name,
        api_key=api_key,
        max_new_tokens=max_new_tokens,
        max_side=max_side,
        allowed_image_hosts=frozenset(host.lower() for host in allow_images_from or ()),
    )


def _is_loopback(host: str) -> bool:
    """Whether who listens at `host` is reached from this machine alone, as far as its name says."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


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
    from ..serving.http_server import HTTPServer
    from ..serving.settings import ServerSettings

    pipe.set_progress_bar_config(disable=True)
    engine = Engine(pipe, **engine_settings)
    app = create_app(engine, ServerSettings(**settings))
    server = HTTPServer(uvicorn.Config(app, host=host, port=port, log_level="info", server_header=False))
    with suppress(KeyboardInterrupt):  # which uvicorn raises again once all is done
        server.run()
    if not server.started:
        raise typer.Exit(1)  # it has said why
