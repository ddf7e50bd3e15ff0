import threading
import time
from collections.abc import Iterator

import pytest
import uvicorn
from openai import OpenAI

from diffusers_llada_uni import LLaDAUniPipeline
from llada_uni.serving.app import create_app
from llada_uni.serving.engine import Engine
from llada_uni.serving.jobs import Job, TextJob
from llada_uni.serving.settings import ServerSettings


class Server:
    """A server in a thread of this process, on a port of its own."""

    def __init__(self, pipe: LLaDAUniPipeline, settings: ServerSettings, **engine_settings: int):
        self.engine = Engine(pipe, **engine_settings)
        config = uvicorn.Config(create_app(self.engine, settings), port=0, log_level="warning")
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        port = self.server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"

    def client(self, api_key: str = "none", **settings: object) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key=api_key, max_retries=0, **settings)

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join()


def make_texts_endless(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers go on to their full length, whatever the model says."""
    submit = engine.submit

    def submit_endless(job: Job) -> None:
        if isinstance(job, TextJob):
            job.settings["eos_token_id"] = []
        submit(job)

    monkeypatch.setattr(engine, "submit", submit_endless)


@pytest.fixture(scope="module")
def server(pipe) -> Iterator[Server]:
    server = Server(pipe, ServerSettings(model_name="emoji", max_new_tokens=64))
    yield server
    server.stop()


@pytest.fixture(scope="module")
def client(server) -> OpenAI:
    return server.client()
