"""Folders appear whole or not at all; what killed processes left is told and removed, what others write stays."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from transformers_llada_uni.loading.folder_writing import folder_at_once


def killed(work: Callable[[], object]) -> None:
    """Does the work in a process of its own that must not live to its end."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def write(destination: Path, text: str, before_the_end: Callable[[], object] = lambda: None, **settings) -> None:
    with folder_at_once(destination, **settings) as folder:
        (folder / "file").write_text(text)
        before_the_end()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_it_appears_at_the_end(tmp_path):
    destination = tmp_path / "deep" / "er" / "out"
    write(destination, "new", lambda: (destination.exists() and 1 / 0, names(destination.parent)))
    assert (destination / "file").read_text() == "new"
    assert names(destination.parent) == ["out"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failure_leaves_what_was_there(tmp_path, error):
    def fail() -> None:
        raise error

    with pytest.raises(error):
        write(tmp_path / "deep" / "out", "new", fail)
    assert names(tmp_path) == []
    write(tmp_path / "out", "old")
    with pytest.raises(error):
        write(tmp_path / "out", "new", fail, replace=True)
    assert names(tmp_path) == ["out"] and (tmp_path / "out" / "file").read_text() == "old"


def test_a_failure_between_the_renames_brings_the_old_one_back(tmp_path, monkeypatch):
    write(tmp_path / "out", "old")
    rename = Path.rename

    def fail_at_the_second(path: Path, target: Path) -> None:
        if path.suffix == ".partial":
            raise KeyboardInterrupt
        rename(path, target)

    monkeypatch.setattr(Path, "rename", fail_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "out", "new", replace=True)
    assert names(tmp_path) == ["out"] and (tmp_path / "out" / "file").read_text() == "old"


def test_only_with_replace_does_a_folder_give_way(tmp_path):
    write(tmp_path / "out", "old")
    with pytest.raises(OSError, match="out"):
        write(tmp_path / "out", "new")
    assert names(tmp_path) == ["out"] and (tmp_path / "out" / "file").read_text() == "old"
    write(tmp_path / "out", "new", replace=True)
    assert names(tmp_path) == ["out"] and (tmp_path / "out" / "file").read_text() == "new"


def test_who_comes_second_is_told_by_the_folder_s_own_name(tmp_path):
    folder = tmp_path / "folder"
    with pytest.raises(FileExistsError, match="'.*/folder' exists already"), folder_at_once(folder) as mine:
        (mine / "file").write_text("mine")
        with folder_at_once(folder) as theirs:
            (theirs / "file").write_text("theirs")
    assert (folder / "file").read_text() == "theirs" and list(tmp_path.iterdir()) == [folder]


def test_leftovers_are_told_and_removed(tmp_path, caplog):
    killed(lambda: write(tmp_path / "out", "half", die))
    killed(lambda: write(tmp_path / "other", "half", die))
    out, other = sorted(names(tmp_path), key=lambda name: "other" in name)
    write(tmp_path / "out", "new")
    assert names(tmp_path) == sorted([other, "out"])
    assert out in caplog.text and "killed" in caplog.text and other not in caplog.text


def test_a_kill_between_the_renames_loses_nothing(tmp_path, caplog):
    write(tmp_path / "out", "old")

    def work() -> None:
        rename = Path.rename
        Path.rename = lambda path, target: die() if path.suffix == ".partial" else rename(path, target)
        write(tmp_path / "out", "new", replace=True)

    killed(work)
    assert "out" not in names(tmp_path) and len(names(tmp_path)) == 2
    seen = []
    write(tmp_path / "out", "newer", lambda: seen.append((tmp_path / "out" / "file").read_text()), replace=True)
    assert seen == ["old"]  # it was back while the new one was written
    assert names(tmp_path) == ["out"] and (tmp_path / "out" / "file").read_text() == "newer"
    assert "is back" in caplog.text


def test_what_a_running_process_writes_stays(tmp_path, caplog):
    def meanwhile() -> None:
        with pytest.raises(ZeroDivisionError):
            write(tmp_path / "out", "second", lambda: 1 / 0)

    write(tmp_path / "out", "first", meanwhile)
    assert (tmp_path / "out" / "file").read_text() == "first"
    assert caplog.text == ""


def test_names_with_signs_of_patterns(tmp_path):
    killed(lambda: write(tmp_path / "run[1]*", "half", die))
    write(tmp_path / "run[1]*", "new")
    assert names(tmp_path) == ["run[1]*"]
