import copy
from collections.abc import Iterator

import pytest

from diffusers_llada_uni import LLaDAUniPipeline


pytest.importorskip("gradio")
from llada_uni.demo.app import Demo


@pytest.fixture(scope="session")
def demo(pipe: LLaDAUniPipeline) -> Iterator[Demo]:
    own = LLaDAUniPipeline(**copy.copy(pipe.components))  # others may call `pipe` while the engine runs
    own.register_to_config(_name_or_path=pipe.config["_name_or_path"])
    demo = Demo(own)
    yield demo
    demo.close()
