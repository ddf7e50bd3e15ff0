"""Between the engine's threads and the clients: news of an answer, and of clients that hang up before they have it."""

import asyncio
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any, Generic, TypeVar

from starlette.requests import ClientDisconnect, Request

from .jobs import Job


Result = TypeVar("Result")
Item = TypeVar("Item")


class Updates(Generic[Item]):
    """What threads say, for a coroutine of the loop that this is made in."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Item] = asyncio.Queue()

    def put(self, item: Item) -> None:
        """For any thread."""
        with suppress(RuntimeError):  # the loop is closed: the server has been made to stop at once
            self._loop.call_soon_threadsafe(self._queue.put_nowait, item)

    async def get(self) -> Item:
        return await self._queue.get()


async def while_connected(request: Request, job: Job, work: Coroutine[Any, Any, Result]) -> Result:
    """
    What `work` returns; once the client has hung up it is cancelled, and so is the job that it waits for. The
    request's body must have been read.

    Raises:
        ClientDisconnect: if the client has hung up; whatever `work` raises.
    """
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_hung_up(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()
        job.cancel()  # if it is done already, that is nothing


async def _hung_up(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
