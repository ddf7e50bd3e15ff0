"""The converter writes all or nothing, checks what it wrote, and needs the memory of one shard, not of the model."""

import json
import multiprocessing
import os
import re
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import diffusers_llada_uni  # noqa: F401 (registers)
from llada_uni.conversion import output_plan, tensor_files
from llada_uni.conversion.convert_llada_uni_checkpoint import convert_to_diffusers, main
from tests.conversion.conversion_common import (
    ROOT,
    SHARD,
    SIGVQ,
    assert_equal,
    backbone_of,
    merged,
    read_tensors,
)


# Files


def test_writer_writes_what_safetensors_writes(tmp_path):
    torch.manual_seed(0)
    tensors = {
        "b.half": torch.randn(3, 5).to(torch.bfloat16),
        "a": torch.randn(7),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 4),
        "flags": torch.tensor([True, False, True]),
        "long": torch.arange(4),
        "nan": torch.tensor([float("nan"), -0.0]),
    }
    save_file(tensors, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    refs = tensor_files.list_tensors(tmp_path / "theirs.safetensors")
    outputs = [tensor_files.OutputTensor(name, ref, ref.dtype) for name, ref in refs.items()]
    reported = []
    path = tmp_path / "ours.safetensors"
    tensor_files.write_safetensors(path, outputs, lambda output, tensor: reported.append(tensor.nbytes))
    assert sum(reported) == sum(tensor.nbytes for tensor in tensors.values())
    assert (tmp_path / "ours.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()
    tensor_files.verify_tensors(path, outputs, lambda *_: None)


@pytest.mark.parametrize("file", ["model/model-00002-of-00003.safetensors", "vae/diffusion_pytorch_model.safetensors"])
def test_verification_finds_a_flipped_bit(official_tiny, tmp_path, monkeypatch, file):
    write = tensor_files.write_safetensors

    def write_badly(path, outputs, report):
        write(path, outputs, report)
        if str(path).endswith(file):
            content = bytearray(path.read_bytes())
            content[-1] ^= 1
            path.write_bytes(content)

    monkeypatch.setattr(tensor_files, "write_safetensors", write_badly)
    with pytest.raises(ValueError, match="differs from its source"):
        convert_to_diffusers(official_tiny, tmp_path / "out" / "ours", progress=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, MemoryError])
@pytest.mark.parametrize("moment", ["write_safetensors", "verify_tensors"])
def test_nothing_is_left_behind(official_tiny, tmp_path, monkeypatch, error, moment):
    calls = []
    work = getattr(tensor_files, moment)

    def fail_at_the_third(*args):
        calls.append(args)
        if len(calls) == 3:
            raise error("stop")
        work(*args)

    monkeypatch.setattr(tensor_files, moment, fail_at_the_third)
    with pytest.raises(error):
        convert_to_diffusers(official_tiny, tmp_path / "deep" / "er" / "ours", progress=False)
    assert len(calls) == 3
    assert list(tmp_path.iterdir()) == []


def test_full_disk_is_refused_before_any_work(official_tiny, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=10**6)
    monkeypatch.setattr(output_plan.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OSError, match=r"\d,\d{3},\d{3} bytes are needed .* only 1,000,000 are free"):
        convert_to_diffusers(official_tiny, tmp_path / "ours", progress=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("limit", "file"), [(100, ".json"), (300_000, ".safetensors")], ids=["a small file", "tensors"]
)
def test_file_that_cannot_be_written_is_named(official_tiny, tmp_path, limit, file):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(OSError, match=re.escape(file)):
            convert_to_diffusers(official_tiny, tmp_path / "ours", progress=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_state_dict_that_cannot_be_written_is_named(official_tiny, tmp_path):
    refs = tensor_files.list_tensors(official_tiny / SIGVQ)
    outputs = [tensor_files.OutputTensor(name, ref, ref.dtype) for name, ref in refs.items()]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(OSError, match=r"out\.pt"):
            tensor_files.write_pickled(tmp_path / "out.pt", outputs, lambda *_: None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_killed_conversion_is_told_and_cleaned_up(official_tiny, tmp_path, monkeypatch, caplog):
    child = os.fork()
    if child == 0:
        try:
            monkeypatch.setattr(tensor_files, "verify_tensors", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
            convert_to_diffusers(official_tiny, tmp_path / "ours", progress=False)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    (leftover,) = tmp_path.iterdir()
    assert leftover.suffix == ".partial"
    usage, was_there = shutil.disk_usage, []
    monkeypatch.setattr(
        output_plan.shutil, "disk_usage", lambda path: was_there.append(leftover.exists()) or usage(path)
    )
    convert_to_diffusers(official_tiny, tmp_path / "ours", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]
    assert was_there == [False]  # its room is free again when that is looked at
    assert leftover.name in caplog.text and "killed" in caplog.text


# Values


def test_weights_that_are_not_finite_are_copied_with_a_warning(released, tmp_path, caplog):
    tensors = load_file(released / SHARD)
    tensors["lm_head.weight"][3, 4] = float("nan")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = float("inf")
    save_file(tensors, released / SHARD)
    folder = convert_to_diffusers(released, tmp_path / "ours", progress=False)
    (record,) = caplog.records
    assert "2 tensors" in record.message and "NaN" in record.message
    assert "lm_head.weight" in record.message and "language_model.layers.0.mlp.up_proj.weight" in record.message
    written = merged(read_tensors(folder / "model", released=False))["lm_head.weight"]
    assert torch.equal(written.view(torch.int32), tensors["lm_head.weight"].view(torch.int32))


@pytest.mark.parametrize(
    ("values", "dtype", "finite"),
    [
        ([1.0, -2.0], torch.bfloat16, True),
        ([3e38, 3e38], torch.float32, True),  # whose sum is infinite
        ([6e4, 6e4], torch.float16, True),
        ([448.0] * 500, torch.float8_e4m3fn, True),
        ([float("inf"), float("-inf")], torch.float32, False),
        ([1.0, float("nan")], torch.bfloat16, False),
        ([1.0, float("nan")], torch.float8_e4m3fn, False),
        ([], torch.float32, True),
    ],
)
def test_what_is_finite(values, dtype, finite):
    assert tensor_files.is_finite(torch.tensor(values).to(dtype)) == finite


# The command


def test_command_reports_errors_without_a_traceback(released, tmp_path, capsys):
    (released / SHARD).unlink()
    assert main([str(released), str(tmp_path / "out")]) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert SHARD in err
    assert not (tmp_path / "out").exists()


def test_command_both_ways(official_tiny, tmp_path, capsys):
    assert main([str(official_tiny), str(tmp_path / "ours"), "--decoder", "turbo", "--dtype", "bfloat16"]) == 0
    assert main([str(tmp_path / "ours"), str(tmp_path / "back"), "--to-released"]) == 0
    assert str(tmp_path / "back") in capsys.readouterr().out
    assert backbone_of(tmp_path / "back")["model.norm.weight"].dtype == torch.bfloat16


def convert_slowly(source, target, connection):
    """Run in a process of its own, to be interrupted after the first file."""
    write = tensor_files.write_safetensors

    def slowly(*args):
        write(*args)
        connection.send("wrote")
        time.sleep(60)

    tensor_files.write_safetensors = slowly
    signal.signal(signal.SIGINT, signal.default_int_handler)  # pytest's workers ignore it
    sys.exit(main([source, target]))


@pytest.mark.parametrize(
    "run",
    [
        lambda: runpy.run_path(str(ROOT / "conversion" / "convert_llada_uni_checkpoint.py"), run_name="__main__"),
        lambda: runpy.run_module("llada_uni.conversion.convert_llada_uni_checkpoint", run_name="__main__"),
    ],
    ids=["file", "module"],
)
@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
def test_command_runs_as_a_file_and_as_a_module(run, official_tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["convert", str(official_tiny), str(tmp_path / "ours"), "--decoder", "turbo"])
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as info:
        run()
    signal.signal(signal.SIGTERM, before)
    assert info.value.code == 0
    assert capsys.readouterr().out == f"{tmp_path / 'ours'}\n"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_command_leaves_nothing(official_tiny, tmp_path, number, code):
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=convert_slowly, args=(str(official_tiny), str(tmp_path / "out"), theirs))
    process.start()
    try:
        assert ours.poll(60) and ours.recv() == "wrote"
        assert [path.suffix for path in tmp_path.iterdir()] == [".partial"]
        os.kill(process.pid, number)
        process.join(30)
        assert process.exitcode == code
    finally:
        process.kill()
    assert list(tmp_path.iterdir()) == []


# Memory

MEASURE = """
import sys, threading, time
sys.path.insert(0, {root!r})
import torch
from llada_uni.conversion.convert_llada_uni_checkpoint import convert_to_diffusers, convert_to_released

def anonymous_memory():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))

def watch():
    while not done.is_set():
        peak[0] = max(peak[0], anonymous_memory())
        time.sleep(0.001)

convert_to_diffusers({tiny!r}, {target!r} + "-warm", progress=False)
for convert, source, target, dtype in [
    (convert_to_diffusers, {source!r}, {target!r}, None),
    (convert_to_diffusers, {source!r}, {target!r} + "-half", torch.bfloat16),
    (convert_to_released, {target!r}, {target!r} + "-back", None),
]:
    done, peak, before = threading.Event(), [0], anonymous_memory()
    thread = threading.Thread(target=watch)
    thread.start()
    convert(source, target, dtype=dtype, progress=False)
    done.set()
    thread.join()
    print(peak[0] - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads RssAnon from /proc")
def test_memory_is_that_of_one_shard_not_of_the_model(released, official_tiny, tmp_path):
    layers, width = 7, 2048
    file = released / "config.json"
    config = json.loads(file.read_text()) | {"num_hidden_layers": layers, "moe_intermediate_size": width}
    file.write_text(json.dumps(config))
    tensors = backbone_of(released)
    for path in released.glob("model-*.safetensors"):
        path.unlink()
    shapes = {"gate_proj": (width, 64), "up_proj": (width, 64), "down_proj": (64, width)}
    weight_map = {}
    for layer in range(layers + 1):  # one shard for each layer, and one for what is not a layer
        shard = {k: t for k, t in tensors.items() if f"layers.{min(layer, 1)}." in k and layer < layers}
        if layer == layers:
            shard = {k: t for k, t in tensors.items() if "layers." not in k}
        elif layer:
            shard = {k.replace("layers.1.", f"layers.{layer}."): t.clone() for k, t in shard.items()}
            for name in shard:
                part = name.split(".")[-2]
                if "experts" in name:
                    shard[name] = torch.full(shapes[part], float(layer))
        name = f"model-{layer + 1:05d}-of-{layers + 1:05d}.safetensors"
        save_file(shard, released / name)
        weight_map |= dict.fromkeys(shard, name)
    (released / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    shard_size = (released / f"model-00003-of-{layers + 1:05d}.safetensors").stat().st_size
    assert shard_size > 20e6

    program = MEASURE.format(
        root=str(ROOT), source=str(released), target=str(tmp_path / "out"), tiny=str(official_tiny)
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    peaks = [int(line) for line in run.stdout.split()]
    assert len(peaks) == 3
    assert max(peaks) < shard_size, f"peaks {peaks} for shards of {shard_size}"
    assert_equal(backbone_of(tmp_path / "out-back"), backbone_of(released))


def test_only_one_source_file_is_open_at_a_time(official_tiny, tmp_path, monkeypatch):
    is_open, most = [], []

    class Counting:
        def __init__(self, path, framework):
            self.file = safe_open(path, framework=framework)

        def __enter__(self):
            is_open.append(self)
            most.append(len(is_open))
            return self.file.__enter__()

        def __getattr__(self, name):
            return getattr(self.file, name)

        def __exit__(self, *error):
            is_open.remove(self)
            return self.file.__exit__(*error)

    monkeypatch.setattr(tensor_files, "safe_open", Counting)
    convert_to_diffusers(official_tiny, tmp_path / "ours", progress=False)
    assert max(most) == 2  # the source and, while verifying, its copy
    assert not is_open
