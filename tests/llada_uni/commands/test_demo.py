import socket

import pytest

from llada_uni.cli import main
from llada_uni.commands.demo import USER, run_demo
from llada_uni.pipeline_loading import load_pipeline


def _has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


def never() -> None:
    raise AssertionError("the model has been loaded")


def test_what_is_missing_is_told_before_the_model_is_loaded(monkeypatch):
    monkeypatch.setattr("transformers_llada_uni.optional_dependencies.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "llada-uni\[demo\]"'):
        run_demo(never, "127.0.0.1", 7860, False, None, print)


def test_a_port_that_is_taken_is_told_in_a_line(monkeypatch, capsys):
    pytest.importorskip("gradio")
    monkeypatch.setattr("llada_uni.commands.demo.load", lambda *args: never())
    with socket.create_server(("127.0.0.1", 0)) as other, pytest.raises(SystemExit) as end:
        main(["demo", "--port", str(other.getsockname()[1])])
    assert end.value.code == 2
    assert "Address already in use" in capsys.readouterr().err


def test_it_is_served_on_this_machine_only_until_ctrl_c(monkeypatch, capsys):
    app = pytest.importorskip("llada_uni.demo.app")
    launched = {}

    def interrupted(seconds: float) -> None:
        raise KeyboardInterrupt

    class Demo:
        def __init__(self, pipe):
            launched.update(pipe=pipe, is_closed=False)

        def launch(self, host, port, **settings):
            launched.update(host=host, port=port, **settings)
            return f"http://{host}:{port}/"

        def close(self):
            launched["is_closed"] = True

    monkeypatch.setattr(app, "Demo", Demo)
    monkeypatch.setattr("llada_uni.commands.demo.time.sleep", interrupted)
    monkeypatch.setattr("llada_uni.commands.demo.load", lambda *args: "the pipeline")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(SystemExit) as end:
        main(["demo", "--port", str(port)])
    assert end.value.code == 130 and launched["is_closed"]
    assert launched["pipe"] == "the pipeline" and launched["host"] == "127.0.0.1" and launched["share"] is False
    assert f"The page is at http://127.0.0.1:{port}/\n" in capsys.readouterr().out


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "[::1]"])
def test_a_password(host):
    pytest.importorskip("gradio")
    httpx = pytest.importorskip("httpx")
    seen = []

    def visit(url: str) -> None:
        with httpx.Client(base_url=url, timeout=30, trust_env=False) as visitor:
            seen.append(visitor.get("/config").status_code)
            for password in ("wrong", "secret"):
                answer = visitor.post("/login", data={"username": USER, "password": password})
                seen.append(answer.status_code)
            seen.append(visitor.get("/config").status_code)
        raise KeyboardInterrupt

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    if ":" in host and not _has_ipv6():
        pytest.skip("this machine has no IPv6")
    with pytest.raises(KeyboardInterrupt):
        run_demo(lambda: load_pipeline("emoji", "cpu"), host, port, False, "secret", visit)
    assert seen == [401, 400, 200, 200]


@pytest.mark.parametrize("arguments, environment", [(["--password", ""], None), ([], "")])
def test_an_empty_password_is_refused(capsys, monkeypatch, arguments, environment):
    if environment is not None:
        monkeypatch.setenv("LLADA_UNI_PASSWORD", environment)
    with pytest.raises(SystemExit) as end:
        main(["demo", *arguments])
    assert end.value.code == 2 and "`password` must not be empty" in capsys.readouterr().err
