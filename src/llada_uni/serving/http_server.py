"""The server that listens: uvicorn's, ended at once by a second signal."""

import os
from types import FrameType

import uvicorn


class HTTPServer(uvicorn.Server):
    """
    SIGINT and SIGTERM end it when all that was accepted is answered; a second one, of either, ends the process, whose
    threads may compute for long and cannot be ended.
    """

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit:
            os._exit(128 + sig)
        super().handle_exit(sig, frame)
