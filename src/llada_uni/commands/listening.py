"""What `serve` and `demo` say before they load a model."""

import socket


def check_can_listen(extra: str, packages: tuple[str, ...], host: str, port: int) -> None:
    """
    Args:
        extra, packages: What is needed, and the extra that brings it.
        host, port: Where to listen; 0 is any port.

    Raises:
        ModuleNotFoundError: if something is not installed; names the extra.
        ValueError: if there is no such host.
        OSError: if the port is taken, or the host another machine.
    """
    from transformers_llada_uni.optional_dependencies import require_extra

    require_extra(extra, *packages)
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except socket.gaierror as error:
        raise ValueError(f"`host` {host!r} is no address of this machine: {error.strerror}.") from error
    family, *_, address = found[0]
    socket.create_server(address, family=family).close()
