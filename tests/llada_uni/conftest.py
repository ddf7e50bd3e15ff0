import pytest

from diffusers_llada_uni import LLaDAUniPipeline, embedded_checkpoint


@pytest.fixture(scope="session")
def pipe() -> LLaDAUniPipeline:
    pipe = LLaDAUniPipeline.from_pretrained(embedded_checkpoint("emoji"))
    pipe.set_progress_bar_config(disable=True)
    return pipe
