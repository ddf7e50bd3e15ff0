import pytest
from typer.testing import CliRunner

from diffusers_llada_uni import LLaDAUniPipeline, embedded_checkpoint
from llada_uni.cli import app


@pytest.fixture(scope="session")
def pipe() -> LLaDAUniPipeline:
    pipe = LLaDAUniPipeline.from_pretrained(embedded_checkpoint("emoji"))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def run_command(pipe, monkeypatch, tmp_path):
    """Runs the command in this process, in a folder of its own, with a pipeline that is loaded once for all tests."""
    loads = []

    def load(name, device=None, dtype="auto"):
        loads.append(name)
        return pipe

    monkeypatch.setattr("llada_uni.pipeline_loading.load_pipeline", load)
    monkeypatch.chdir(tmp_path)
    runner = CliRunner()

    def run(*arguments, input=None, code=0):
        result = runner.invoke(app, list(arguments), input=input)
        assert result.exit_code == code, (result.output, result.exception)
        return result

    run.loads = loads
    return run
