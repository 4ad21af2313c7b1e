"""`duetvl check` walks over all records; `duetvl data preview` shows the first."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterable
from pathlib import Path

import pytest
import tiny_run
from PIL import Image

from duetvl.cli import main
from duetvl.core.errors import ConfigError, DataError
from duetvl.training.check import check
from duetvl.training.preview import preview
from duetvl.training.train import train


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("check")
    tiny_run.write_recipe(directory)
    return directory


def with_truncated_picture(home: Path) -> str:
    """One more data file, whose third picture has a whole header and half of its pixels."""
    lines = (home / "data.jsonl").read_text().splitlines()[:6]
    picture = home / "cut.png"
    Image.effect_noise((112, 112), 80).convert("RGB").save(picture)
    picture.write_bytes(picture.read_bytes()[:8000])
    bad = json.loads(lines[4]) | {"images": ["cut.png"]}
    lines[4] = json.dumps(bad)
    (home / "cut.jsonl").write_text("\n".join(lines))
    return f"data.train={home}/cut.jsonl"


def test_every_record_is_counted_and_measured(home, tmp_path):
    lines = list(check(home / "tiny.json", [f"train.output_dir={tmp_path}/run"]))
    assert "data.train: 12 records: 12 good, 0 left out, 0 bad" in lines
    assert any(line.startswith("  shares: images ") and "(8)" in line for line in lines)
    train = lines[: lines.index("data.val: 12 records: 12 good, 0 left out, 0 bad")]
    assert sum(int(line.split()[-1]) for line in train if " tokens  " in line) == 12


def tree(*directories: Path) -> dict[str, tuple[int, int]]:
    """Every file below, with its size and time of change, and every directory."""
    entries = [entry for directory in directories for entry in directory.rglob("*")]
    return {str(entry): (entry.stat().st_size * entry.is_file(), entry.stat().st_mtime_ns) for entry in entries}


def test_nothing_is_written_unless_asked_for(home, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    overrides = [f"train.output_dir={tmp_path}/run", f"data.cache={tmp_path}/cache", "data.val=null"]
    before = tree(home, tmp_path)
    for options in ([], ["data.streaming=true"], ["lora={}", "data.val_rate=0.5"]):
        list(check(home / "tiny.json", [*overrides, *options], decode=not options))
    assert tree(home, tmp_path) == before
    list(check(home / "tiny.json", [*overrides, "data.cutoff_len=79", "data.too_long=drop"], output=tmp_path / "out"))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"data.train.lengths.png", "data.train.left_out.txt"}


def without_times(lines: Iterable[str]) -> list[str]:
    """The seconds of a step come from a product that is measured."""
    return [line for line in lines if not line.startswith("expected on this machine")]


def test_a_sample_of_the_records(home, tmp_path):
    usual = [f"train.output_dir={tmp_path}/run"]
    lines = list(check(home / "tiny.json", usual, sample=5))
    for name in ("data.train", "data.val"):
        at = lines.index(f"{name}: a sample, 5 of 12 records")
        assert lines[at + 1] == f"{name}: 5 records: 5 good, 0 left out, 0 bad"
    assert without_times(lines) == without_times(check(home / "tiny.json", usual, sample=5)), "it is drawn by data.seed"
    assert without_times(lines) != without_times(check(home / "tiny.json", [*usual, "data.seed=1"], sample=5))
    streamed = list(check(home / "tiny.json", [*usual, "data.streaming=true", "data.val=null"], sample=5))
    assert "data.train: a sample, 5 of a stream, its first" in streamed
    assert without_times(check(home / "tiny.json", usual, sample=12)) == without_times(check(home / "tiny.json", usual))
    with pytest.raises(ConfigError, match="a sample of 0 records"):
        list(check(home / "tiny.json", usual, sample=0))


def test_seconds_that_a_step_is_expected_to_take(home, tmp_path):
    overrides = [f"train.output_dir={tmp_path}/run", "backend.device=cpu", "parallel.pp=2", "model.dtype=bfloat16"]
    seconds = {}
    for kind in (None, "910B3", "H100"):
        line = next(x for x in check(home / "tiny.json", overrides, device_type=kind) if x.startswith("expected"))
        where = f"on {kind}" if kind else "on this machine's processor, measured at a product"
        assert line.startswith(f"expected {where}: about ") and "waiting for other stages" in line
        seconds[kind] = float(re.search(r"about (\S+) s a step", line)[1])
    assert seconds["H100"] < seconds["910B3"] < seconds[None]
    unknown = list(check(home / "tiny.json", [*overrides, "model.dtype=float32"], device_type="910B3"))
    assert "expected: unknown, as the table of devices has no float32 for 910B3" in unknown
    with pytest.raises(ConfigError, match="'H999' is not in the table"):
        list(check(home / "tiny.json", overrides, device_type="H999"))


def test_what_a_rule_leaves_out_is_told_and_is_no_error(home, tmp_path):
    overrides = [f"train.output_dir={tmp_path}/run", "data.cutoff_len=79", "data.too_long=drop"]
    lines = list(check(home / "tiny.json", overrides))
    counts = next(line for line in lines if line.startswith("data.train: 12 records"))
    assert ", 0 bad" in counts and "12 good" not in counts
    assert any("data.jsonl" in line and line.startswith("    left out: ") for line in lines)


def test_samples_beyond_the_positions_of_the_model(home, tmp_path):
    model = shutil.copytree(json.loads((home / "tiny.json").read_text())["model"]["path"], tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 79}))
    overrides = [f"train.output_dir={tmp_path}/run", "data.val=null"]
    assert not any("positions" in line for line in check(home / "tiny.json", overrides))
    lines = list(check(home / "tiny.json", [*overrides, f"model.path={model}"]))
    (warning,) = (line for line in lines if "positions" in line)
    assert warning.startswith("  warning: ") and " of 12 samples have more tokens than the 79 positions" in warning


def test_truncated_pictures_are_found_by_decoding_alone(home, tmp_path):
    overrides = [with_truncated_picture(home), "data.val=null", f"train.output_dir={tmp_path}/run"]
    assert "data.train: 6 records: 6 good, 0 left out, 0 bad" in list(check(home / "tiny.json", overrides))
    with pytest.raises(
        DataError, match=r"training would meet 1 bad record, the first of them: .*cut\.jsonl:5: .*cut\.png"
    ):
        list(check(home / "tiny.json", overrides, decode=True))
    lines = list(check(home / "tiny.json", [*overrides, "data.on_bad_sample=skip"], decode=True))
    assert "data.train: 6 records: 5 good, 0 left out, 1 bad" in lines


def test_keys_that_are_not_read_are_named_by_check_and_in_training(home, tmp_path, capsys):
    lines = [json.loads(line) for line in (home / "data.jsonl").read_text().splitlines()]
    for record in lines:
        record["messages"][1]["reasoning_content"] = "hm"
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    overrides = [f"data.train={tmp_path}/a.jsonl", f"data.image_root={home}", f"train.output_dir={tmp_path}/run"]
    told = f"{tmp_path}/a.jsonl:1: a message's key 'reasoning_content' is not read (named once for a file)"
    assert f"  {told}" in list(check(home / "tiny.json", overrides))
    for more in ((), ("data.streaming=true", "data.val=null")):
        shown = list(preview(home / "tiny.json", [*overrides, "data.shuffle=false", *more], count=99))
        assert len(shown) == len(lines) + 1 and shown[-1] == f"warning: {told}"
    train(home / "tiny.json", [*overrides, "data.shuffle=false"])
    assert capsys.readouterr().out.count("reasoning_content") == 1


@pytest.mark.parametrize("records", [9, 45])
def test_a_run_whose_pictures_are_nowhere_is_an_error_and_no_skip(home, tmp_path, records):
    """Every third record is text alone; all others have a picture. Text alone would not be told from a good run."""
    lines = (home / "data.jsonl").read_text().splitlines()[:9] * (records // 9)
    (tmp_path / "far.jsonl").write_text("\n".join(lines))
    overrides = [f"data.train={tmp_path}/far.jsonl", "data.val=null", f"train.output_dir={tmp_path}/run"]
    for made in (check, train):
        with pytest.raises(DataError, match="records with pictures or videos have a missing one"):
            list(made(home / "tiny.json", [*overrides, "data.on_bad_sample=skip", "train.steps=20"]))
    found = list(check(home / "tiny.json", [*overrides, f"data.image_root={home}"]))
    assert f"  media: {records // 3 * 2} found in {home}" in found


def test_the_command_line_prints_the_findings_before_the_error(home, tmp_path, capsys):
    (home / "bad.jsonl").write_text('{"messages": []}\n' + (home / "data.jsonl").read_text())
    argv = [str(home / "tiny.json"), f"data.train={home}/bad.jsonl", f"train.output_dir={tmp_path}/run"]
    assert main(["check", *argv, "-o", f"{tmp_path}/found"]) == 2
    shown = capsys.readouterr()
    assert "data.train: 13 records: 12 good, 0 left out, 1 bad" in shown.out
    assert "bad.jsonl:1" in shown.err and shown.err.count("\n") == 1
    listed = tmp_path / "found" / "data.train.left_out.txt"
    assert list((tmp_path / "found").iterdir()) == [listed]
    assert listed.read_text() == f"bad: {home}/bad.jsonl:1: messages is empty\n"
    assert main(["check", *argv, "-o", f"{tmp_path}/found", "--sample", "99", "data.on_bad_sample=skip"]) == 0
    assert listed.is_file()
    assert main(["check", argv[0], argv[2], "-o", f"{tmp_path}/found"]) == 0
    assert not listed.exists(), "it was of other data"


def test_what_cannot_be_written_is_one_line(home, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["check", str(home / "tiny.json"), "-o", f"{tmp_path}/file/found"]) == 2
    preview_argv = [str(home / "tiny.json"), "data.shuffle=false", "-o", f"{tmp_path}/file/sheet.png"]
    assert main(["data", "preview", *preview_argv]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert errors == [
        f"error: -o {tmp_path}/file/found: cannot be written: Not a directory",
        f"error: -o {tmp_path}/file/sheet.png: there is no directory {tmp_path}/file; create it, or choose another "
        "place",
    ]


def test_preview_leaves_out_what_training_would(home, tmp_path, capsys):
    (home / "some.jsonl").write_text('{"messages": []}\n' + (home / "data.jsonl").read_text())
    argv = [str(home / "tiny.json"), f"data.train={home}/some.jsonl", "data.shuffle=false", "-n", "1"]
    argv += ["-o", f"{tmp_path}/sheet.png"]
    assert main(["data", "preview", *argv]) == 2
    assert "some.jsonl:1: messages is empty" in capsys.readouterr().err
    assert main(["data", "preview", *argv, "data.on_bad_sample=skip"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"bad: {home}/some.jsonl:1: messages is empty\nsome.jsonl:2: ")


def test_preview_shows_samples_in_training_order_and_draws_their_pixels(home, tmp_path, capsys):
    argv = [str(home / "tiny.json"), "data.shuffle=false", "-n", "2", "-o", str(tmp_path / "sheet.png")]
    assert main(["data", "preview", *argv]) == 0
    shown = capsys.readouterr().out
    assert shown.index("data.jsonl:1: ") < shown.index("data.jsonl:2: ")
    assert "«hello<|im_end|>" in shown and "image 1: grid 1 x 4 x 4, 56 x 56 pixels, 4 tokens" in shown
    assert Image.open(tmp_path / "sheet.png").size == (68, 68)


def test_preview_tells_what_is_left_out_and_stops_at_the_end_of_the_data(home):
    shown = list(preview(home / "tiny.json", ["data.cutoff_len=79", "data.too_long=drop"], count=50))
    assert len(shown) == 12
    assert any(text.startswith("left out: ") for text in shown)
    with pytest.raises(DataError, match="no such file"):
        list(preview(home / "tiny.json", ["data.train=nowhere.jsonl"]))


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_a_system_prompt_of_the_recipe_is_for_records_without_one(home, tmp_path, kind):
    question = {"role": "user", "content": "say hello"}
    answers = {"chosen": "hello", "rejected": "no"} if kind == "dpo" else {}
    last = [] if kind == "dpo" else [{"role": "assistant", "content": "hello"}]
    records = [
        {"messages": [*first, question, *last], **answers} for first in ([{"role": "system", "content": "Shout."}], [])
    ]
    (tmp_path / "some.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    options = [
        f"data.train={tmp_path}/some.jsonl",
        "data.val=null",
        "data.shuffle=false",
        *["dpo.beta=0.1"] * bool(answers),
    ]
    own, given = preview(home / "tiny.json", [*options, "data.system=Be terse."], count=2)
    assert "Shout." in own and "Be terse." not in own
    assert given.count("Be terse.") == (2 if answers else 1) and "helpful assistant" not in given
    usual = list(preview(home / "tiny.json", options, count=2))[1]
    assert "You are a helpful assistant." in usual


def test_a_warning_is_one_line(home, tmp_path, capsys):
    """Of a shard without its end, and of nothing that Pillow finds odd about a picture that it reads."""
    Image.new("RGB", (56, 56)).save(tmp_path / "a.jpg")
    content = (tmp_path / "a.jpg").read_bytes()
    odd = content[:2] + b"\xff\xe2\0\x0cMPF\0II*\0\x08\0" + content[2:]
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        for name, body in (("a.jpg", odd), ("a.txt", b"a cat")):
            info = tarfile.TarInfo(name)
            info.size = len(body)
            tar.addfile(info, io.BytesIO(body))
        end = tar.offset
    (tmp_path / "s.tar").write_bytes((tmp_path / "s.tar").read_bytes()[:end])
    given = [f"data.train={tmp_path}/s.tar", "data.val=null", f"train.output_dir={tmp_path}/run"]
    assert main(["check", str(home / "tiny.json"), "--decode", *given]) == 0
    shown = capsys.readouterr()
    assert "data.train: 1 record: 1 good" in shown.out
    (warning,) = (line for line in shown.err.splitlines() if "arning" in line)
    assert warning.startswith(f"warning: {tmp_path}/s.tar: ends after a complete member") and "MPO" not in shown.err


def test_what_a_run_takes_of_disk_and_memory_is_told(home, tmp_path):
    place = f"train.output_dir={tmp_path}/run"
    lines = list(check(home / "tiny.json", [place]))
    assert any(line.startswith("disk: a checkpoint takes ") for line in lines)
    tensors = next(number for number, line in enumerate(lines) if line.startswith("memory: tensors of about "))
    assert lines[tensors + 1].startswith("memory: about 0.3")
    assert "of freed memory kept by glibc's malloc (MALLOC_MMAP_THRESHOLD_=262144 in the" in lines[tensors + 1]
    assert not any("MALLOC_" in line for line in check(home / "tiny.json", [place, "backend.device=npu"]))
    assert not [line for line in lines if line.startswith("warning")]
    lines = list(check(home / "tiny.json", [place, "train.global_batch=100000000", "data.pack_tokens=1000000000"]))
    assert any("are expected at the peak, cpu has " in line for line in lines if line.startswith("warning: "))


def test_a_disk_that_is_too_small_is_warned_of(home, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    mounted = f"mount -t tmpfs -o size=300k none {disk}"
    if shutil.which("unshare") is None or subprocess.run([*mount, mounted], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    command = f"{sys.executable} -m duetvl check {home}/tiny.json train.output_dir={disk}/run"
    done = subprocess.run([*mount, f"{mounted} && {command}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"warning: train.output_dir {disk}/run: a checkpoint takes " in done.stdout


def test_results_that_training_would_refuse_to_empty_are_found(home, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/metrics.jsonl").write_text('{"step": 9}\n')
    with pytest.raises(ConfigError, match=r"run: holds metrics\.jsonl and no checkpoint to go on from"):
        list(check(home / "tiny.json", [f"train.output_dir={tmp_path}/run"]))
