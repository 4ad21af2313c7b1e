"""Files and directories that appear whole or not at all: errors, kills, signals, and two processes at once."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading
from itertools import product

import pytest

from duetvl.core.errors import CheckpointError, ConfigError
from duetvl.storage.files import (
    json_value,
    read_object,
    remove_temporaries,
    staged_directory,
    staged_file,
    write_bytes,
    write_text,
)
from duetvl.storage.locks import file_lock


@pytest.mark.parametrize("text", ['{"a": [1, "\\u00e9"]}', '\ufeff{"a": [1, "é"]}'])
def test_json_with_and_without_a_byte_order_mark(text):
    assert json_value(text) == json_value(text.encode("utf-8")) == {"a": [1, "é"]}


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        (b'{"a": 1, "b": {"c": 1, "c": 1}}', "the key 'c' is given twice in one object; keep one of them"),
        (b"[" * 100_000, "nested too deeply"),
        (rb'["\ud800"]', "surrogates not allowed"),
        (b"\xff", "invalid start byte"),
        (b"{", "Expecting property name"),
    ],
    ids=["twice", "deep", "surrogate", "bytes", "cut"],
)
def test_what_is_no_json(tmp_path, text, cause):
    with pytest.raises(ValueError, match=cause):
        json_value(text)
    (tmp_path / "a.json").write_bytes(text)
    with pytest.raises(ConfigError, match=rf"a\.json: cannot be read as JSON: .*{cause}"):
        read_object(tmp_path / "a.json", ConfigError)


def contents(directory):
    return {str(path.relative_to(directory)): path.read_text() for path in directory.rglob("*") if path.is_file()}


def test_staged_directory_appears_at_the_end(tmp_path):
    target = tmp_path / "deep/out"
    with staged_directory(target) as staging:
        (staging / "config.json").write_text("{}")
        assert not target.exists()
    assert [path.name for path in target.iterdir()] == ["config.json"]
    assert [path.name for path in target.parent.iterdir()] == ["out"]


def test_staged_directory_after_an_error(tmp_path):
    def fill():
        with staged_directory(tmp_path / "out") as staging:
            (staging / "config.json").write_text("{}")
            raise KeyError

    with pytest.raises(KeyError):
        fill()
    assert list(tmp_path.iterdir()) == []


def test_staged_directory_and_an_existing_one(tmp_path):
    target = tmp_path / "out"
    (target / "logs").mkdir(parents=True)
    for name in ("model-00001-of-00002.safetensors", "model.safetensors.index.json", "config.json", "notes.txt"):
        (target / name).write_text("old")
    with pytest.raises(CheckpointError, match="exists already"), staged_directory(target):
        pass
    with staged_directory(target, overwrite=True) as staging:
        (staging / "model.safetensors").write_text("new")
        (staging / "config.json").write_text("new")
    assert sorted(path.name for path in target.iterdir()) == ["config.json", "logs", "model.safetensors", "notes.txt"]
    assert (target / "config.json").read_text() == "new"
    assert (target / "notes.txt").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_staged_directory_over_a_file(tmp_path):
    (tmp_path / "out").write_text("a file")
    with (
        pytest.raises(CheckpointError, match="could not be written"),
        staged_directory(tmp_path / "out", overwrite=True),
    ):
        pass
    assert (tmp_path / "out").read_text() == "a file"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_write_text_replaces(tmp_path):
    write_text(tmp_path / "latest", "one")
    write_text(tmp_path / "latest", "two")
    assert (tmp_path / "latest").read_text() == "two"
    assert [path.name for path in tmp_path.iterdir()] == ["latest"]


def test_a_model_is_replaced_whole_and_nothing_else_is(tmp_path):
    """A merged model in the place of an adapter must not look like an adapter; parts of two are never mixed."""
    files = {
        "adapter": ["adapter_config.json", "adapter_model.safetensors"],
        "old adapter": ["adapter_config.json", "adapter_model.bin"],
        "model": ["config.json", "a.safetensors"],
        "shards": ["config.json", "model-00001-of-00001.safetensors", "model.safetensors.index.json"],
        "pickles": ["config.json", "pytorch_model.bin"],
    }
    for old, new in product(files, files):
        if old in ("model", "shards", "pickles") and "adapter" in new:
            continue
        target = tmp_path / f"{old} {new}"
        target.mkdir()
        for name in ("notes.txt", *files[old]):
            (target / name).write_text("old")
        with staged_directory(target, overwrite=True) as staging:
            for name in files[new]:
                (staging / name).write_text("new")
        assert contents(target) == {"notes.txt": "old", **dict.fromkeys(files[new], "new")}
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


def write_over(target, *names):
    with staged_directory(target, overwrite=True) as staging:
        for name in names:
            (staging / name).write_text("new")


@pytest.mark.parametrize("weights", ["model.safetensors", "model-00001-of-00002.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("new", ["adapter_config.json", "adapter_model.safetensors", "release"])
def test_a_model_is_not_taken_away_for_something_else(tmp_path, weights, new):
    """Such as the model that an adapter was trained on, by `save_adapter(its directory, overwrite=True)`."""
    target = tmp_path / "out"
    target.mkdir()
    (target / "config.json").write_text("{}")
    (target / weights).write_text("old")
    before = contents(tmp_path)
    with pytest.raises(CheckpointError, match="holds a model in the Hugging Face layout, which"):
        write_over(target, new)
    assert contents(tmp_path) == before


def test_tensors_alone_leave_a_configuration_as_it_is(tmp_path):
    """mm-convert writes adapter_model.safetensors; its configuration is the user's."""
    (tmp_path / "adapter_config.json").write_text("mine")
    (tmp_path / "adapter_model.safetensors").write_text("old")
    write_over(tmp_path, "adapter_model.safetensors")
    assert contents(tmp_path) == {"adapter_config.json": "mine", "adapter_model.safetensors": "new"}


def test_a_link_to_a_directory_stays_one(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk/notes.txt").write_text("mine")
    (tmp_path / "out").symlink_to("disk")
    with staged_directory(tmp_path / "out", overwrite=True) as staging:
        (staging / "config.json").write_text("{}")
    assert (tmp_path / "out").is_symlink()
    assert contents(tmp_path / "disk") == {"config.json": "{}", "notes.txt": "mine"}


def test_what_comes_meanwhile_is_not_replaced(tmp_path):
    target = tmp_path / "out"

    def write():
        with staged_directory(target) as staging:
            (staging / "config.json").write_text("{}")
            target.mkdir()
            (target / "notes.txt").write_text("mine")

    with pytest.raises(CheckpointError, match="out: could not be written: Directory not empty"):
        write()
    assert contents(tmp_path) == {"out/notes.txt": "mine"}


def test_made_parents_go_when_nothing_is_written(tmp_path):
    with pytest.raises(KeyError), staged_directory(tmp_path / "a/b/out"):
        raise KeyError
    assert list(tmp_path.iterdir()) == []


# -- kills and signals ------------------------------------------------------------------------------------------------

PROGRAM = """
import os, signal, sys
from pathlib import Path
from duetvl.storage import files

def die_at(moment):
    count = 0
    def counted(real):
        def call(*args, **kwargs):
            nonlocal count
            count += 1
            if count == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)
        return call
    for name in ("fsync", "rename", "unlink", "rmdir", "mkdir", "open"):
        setattr(os, name, counted(getattr(os, name)))

def write(target, moment=0, end=None):
    die_at(moment)
    with files.staged_directory(target, overwrite=True) as staging:
        (staging / "model.safetensors").write_text("new")
        (staging / "config.json").write_text("new")
        if end:
            os.kill(os.getpid(), end)
"""

KILLS = """
for moment in range(1, 1000):
    target = Path(sys.argv[1], str(moment), "out")
    (target / "logs").mkdir(parents=True)
    for name in ("model.safetensors", "config.json", "notes.txt", "logs/log.txt"):
        (target / name).write_text("old")
    child = os.fork()
    if not child:
        write(target, moment)
        os._exit(0)
    if os.waitpid(child, 0)[1] == 0:
        break
print(moment)
"""


def test_a_kill_at_any_instant_loses_nothing_of_the_user(tmp_path):
    """Killed before each call that changes the directory in turn; then somebody writes there again."""
    done = subprocess.run([sys.executable, "-c", PROGRAM + KILLS, tmp_path], capture_output=True, text=True, check=True)
    moments = int(done.stdout)
    assert moments > 15
    seen = set()
    for moment in range(1, moments):
        place = tmp_path / str(moment)
        before = contents(place)
        kept = [text for name, text in before.items() if name.endswith(("notes.txt", "log.txt"))]
        assert kept == ["old", "old"], moment
        seen.add((place / "out").exists())
        with pytest.raises(CheckpointError, match="exists already"), staged_directory(place / "out"):
            pass
        whole = contents(place)
        assert whole.pop("out/notes.txt") == whole.pop("out/logs/log.txt") == "old"
        assert whole in ({"out/model.safetensors": text, "out/config.json": text} for text in ("old", "new")), moment
    assert seen == {True, False}  # also between the two renames


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_leaves_nothing(tmp_path, number):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/notes.txt").write_text("mine")
    call = f"write(Path(sys.argv[1], 'out'), end={int(number)})"
    done = subprocess.run([sys.executable, "-c", PROGRAM + call, tmp_path], capture_output=True)
    assert done.returncode == (-number if number == signal.SIGINT else 128 + number)
    assert contents(tmp_path) == {"out/notes.txt": "mine"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_signal_that_the_program_handles_is_left_to_it(tmp_path):
    seen = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    try:
        with staged_directory(tmp_path / "out") as staging:
            os.kill(os.getpid(), signal.SIGTERM)
            (staging / "config.json").write_text("{}")
    finally:
        signal.signal(signal.SIGTERM, before)
    assert seen == [signal.SIGTERM]
    assert contents(tmp_path) == {"out/config.json": "{}"}


# -- two at once ------------------------------------------------------------------------------------------------------


def test_one_writes_to_a_target_at_a_time(tmp_path):
    with staged_directory(tmp_path / "out") as staging:
        (staging / "config.json").write_text("first")
        for overwrite in (False, True):
            second = staged_directory(tmp_path / "out", overwrite=overwrite)
            with pytest.raises(CheckpointError, match="out: another process is writing it; wait for its end"), second:
                pass
        with staged_directory(tmp_path / "out.b"):  # its neighbour is no business of the first one
            assert staging.exists()
    with staged_file(tmp_path / "a.jsonl") as file:
        file.write("first")
        with pytest.raises(CheckpointError, match="another process is writing it"), staged_file(tmp_path / "a.jsonl"):
            pass
    assert contents(tmp_path) == {"out/config.json": "first", "a.jsonl": "first"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "out", "out.b"]


def test_a_file_is_whole_whoever_wins(tmp_path):
    """Eight threads write one name at once: at the end it has the whole text of one of them."""
    texts = [str(number) * 100_000 for number in range(8)]
    threads = [threading.Thread(target=write_text, args=(tmp_path / "a", text)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tmp_path / "a").read_text() in texts
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_lock_excludes_until_it_is_given_back(tmp_path):
    path = tmp_path / "lock"
    for _ in range(2):
        with file_lock(path) as works:
            assert works
            with pytest.raises(BlockingIOError), file_lock(path):
                pass
        assert not path.exists()


def test_a_file_of_that_name_that_is_no_lock_stays(tmp_path):
    (tmp_path / ".lock").write_text("mine")
    with file_lock(tmp_path / ".lock"):
        pass
    assert contents(tmp_path) == {".lock": "mine"}


def test_a_lock_whose_file_goes_while_it_is_opened_is_taken_again(tmp_path, monkeypatch):
    """The holder removes the file between the other's opening and locking it: that lock would exclude nobody."""
    real, path = fcntl.flock, tmp_path / "lock"

    def late(descriptor, how):
        monkeypatch.setattr(fcntl, "flock", real)
        path.unlink()
        real(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with file_lock(path), pytest.raises(BlockingIOError), file_lock(path):
        pass


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def none(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    with file_lock(tmp_path / "lock") as works:
        assert not works
    with staged_directory(tmp_path / "out") as staging, staged_directory(tmp_path / "out", overwrite=True):
        assert staging.exists()  # it may be in use
        (staging / "config.json").write_text("{}")


def test_temporaries_of_killed_processes_alone_are_removed(tmp_path):
    for name in (".latest.0a1b2c3d.tmp", ".mine.tmp", "a.0a1b2c3d.tmp", "latest"):
        (tmp_path / name).write_text("")
    remove_temporaries(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".mine.tmp", "a.0a1b2c3d.tmp", "latest"]


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(OSError, match="Is a directory"):
        write_bytes(tmp_path / "a", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
