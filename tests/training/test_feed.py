"""A recipe's data sets: which records are trained on and which evaluated, what is told; whole runs over streams."""

from __future__ import annotations

import json
import os
from pathlib import Path

import bag_model
import pytest
from bag_model import BagEncoder, write_records

from duetvl.core.backend import load_backend
from duetvl.core.errors import ConfigError, DataError
from duetvl.data.sources.fingerprint import check_same_data
from duetvl.training.feed import DataSets, Feed
from duetvl.training.recipe.reading import make_recipe
from duetvl.training.train import train
from duetvl.training.watching.metrics import read_metrics


def recipe_of(tmp_path, **data):
    data = {"train": str(tmp_path / "a.jsonl"), "pack_tokens": 32, **data}
    return make_recipe({"model": {"path": "-"}, "data": data, "train": {"global_batch": 4, "steps": 10}})


@pytest.fixture
def files(tmp_path):
    for name, count in (("a", 20), ("b", 10)):
        write_records(tmp_path / f"{name}.jsonl", count)
    return tmp_path


def names(refs, sets: DataSets) -> list[str]:
    return [sets.files[ref.file].read(ref.at, ref.number).id for ref in refs]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_fingerprint_tells_data_from_others(files, streaming):
    data = recipe_of(files, val=str(files / "b.jsonl"), streaming=streaming).data
    ours = DataSets(data).fingerprint()
    assert [(Path(path).name, records) for path, _, records in ours] == [
        ("a.jsonl", None if streaming else 20),
        ("b.jsonl", 10),
    ]
    check_same_data([ours, DataSets(data).fingerprint()], ["here", "there"])
    with open(files / "a.jsonl", "a") as file:
        file.write((files / "b.jsonl").read_text())
    theirs = DataSets(data).fingerprint()
    with pytest.raises(
        DataError, match=r"rank 1 \(there\) has found .*a.jsonl with .*, where rank 0 \(here\) has .*a.jsonl with"
    ):
        check_same_data([ours, theirs], ["here", "there"])


# -- which records ----------------------------------------------------------------------------------------------------


def test_weights_and_choices(files):
    sources = [
        {"path": str(files / "a.jsonl"), "weight": 2.0, "max_samples": 5},
        {"path": str(files / "b.jsonl"), "weight": 0.5},
    ]
    sets = DataSets(recipe_of(files, train=sources).data)
    assert (sets.per_epoch, sets.train_count) == (15, 15)
    epochs = [names(cursor.take(15), sets) for cursor in [sets.cursor()] for _ in range(2)]
    chosen = {name for name in epochs[0] if name.startswith("a")}
    assert len(chosen) == 5 and all(epoch.count(name) == 2 for epoch in epochs for name in chosen)
    halves = [{name for name in epoch if name.startswith("b")} for epoch in epochs]
    assert [len(half) for half in halves] == [5, 5] and not halves[0] & halves[1]


def test_a_share_for_evaluation_is_not_trained_on(files):
    both = [str(files / "a.jsonl"), str(files / "b.jsonl")]
    sets = DataSets(recipe_of(files, train=both, val_rate=0.2).data)
    held, rest = names(sets.val_refs(), sets), names(sets.train_refs(), sets)
    assert (len(held), len(rest), sets.per_epoch) == (6, 24, 24)
    assert not set(held) & set(rest)
    assert set(names(sets.cursor().take(48), sets)) == set(rest)
    assert held == names(DataSets(recipe_of(files, train=both, val_rate=0.2).data).val_refs(), sets)
    fewer = DataSets(recipe_of(files, train=both, val_rate=0.2, val_max_samples=2).data)
    assert len(names(fewer.val_refs(), fewer)) == 2 and fewer.train_count == 24
    with pytest.raises(DataError, match=r"data\.val_rate 0.99 of 20 records leaves none to train on"):
        DataSets(recipe_of(files, val_rate=0.99).data)


def test_a_bound_on_all_sets_takes_the_first_records(files):
    """As MindSpeed-MM's max_samples, before a share is kept for evaluation."""
    both = [str(files / "a.jsonl"), str(files / "b.jsonl")]
    sets = DataSets(recipe_of(files, train=both, max_samples=23).data)
    assert names(sets.train_refs(), sets) == [f"a.jsonl:{n}" for n in range(1, 21)] + [
        f"b.jsonl:{n}" for n in (1, 2, 3)
    ]
    assert (sets.per_epoch, sets.train_count) == (23, 23)
    assert sorted(names(sets.cursor().take(23), sets)) == sorted(names(sets.train_refs(), sets))
    one = DataSets(recipe_of(files, train=both, max_samples=10, val_rate=0.2).data)
    assert (len(names(one.val_refs(), one)), one.train_count) == (2, 8)
    assert all(name.startswith("a.jsonl:") for name in names(one.cursor().take(16), one))
    assert DataSets(recipe_of(files, train=both, max_samples=99).data).train_count == 30


def test_validation_files_are_read_beside_the_training_files(files):
    for streaming in (False, True):
        sets = DataSets(recipe_of(files, val=str(files / "b.jsonl"), streaming=streaming, val_max_samples=3).data)
        assert len(names(sets.val_refs(), sets)) == sets.val_count == 3
        assert all(name.startswith("b.jsonl:") for name in names(sets.val_refs(), sets))
    assert len(list(sets.train_refs())) == 20 and sets.per_epoch is None and sets.train_count is None


def test_settings_of_a_source_travel_with_its_records(files):
    source = {"path": str(files / "a.jsonl"), "format": "messages", "columns": {"messages": "m"}, "boxes": "pixels"}
    for given, expected in ((None, "root"), ("own", "own")):
        sets = DataSets(recipe_of(files, train=[{**source, "image_root": given}], image_root="root").data)
        reading = sets.files[0].reading
        assert (reading.format, reading.columns, reading.boxes) == ("messages", {"messages": "m"}, "pixels")
        assert reading.image_root == expected


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({"streaming": True, "train": [{"path": "a", "max_samples": 3}]}, "max_samples does not apply to a stream"),
        (
            {"streaming": True, "max_samples": 3},
            r"data\.max_samples does not apply to a stream; limit train\.steps instead",
        ),
        ({"streaming": True, "val_rate": 0.1}, "val_rate cannot hold out records of a stream"),
    ],
)
def test_contradictions_are_refused(tmp_path, data, expected):
    with pytest.raises(ConfigError, match=expected):
        recipe_of(tmp_path, **data)


def test_a_position_in_other_data_is_refused(files):
    recipe = recipe_of(files, streaming=True)
    position = Feed(recipe, DataSets(recipe.data), BagEncoder()).position
    with open(files / "a.jsonl", "a") as file:
        file.write("\n")
    with pytest.raises(
        DataError, match=r"has \d+ bytes in 1 file, but the checkpoint's data position is one of \d+ bytes in 1"
    ):
        Feed(recipe, DataSets(recipe.data), BagEncoder(), position)
    with pytest.raises(DataError, match=r"is not that of a stream; set data\.streaming as it was"):
        Feed(recipe, DataSets(recipe.data), BagEncoder(), {"epoch": 0, "index": 0, "records": 20})


# -- runs -------------------------------------------------------------------------------------------------------------


class Interrupted(BaseException):
    """As a kill, but in this process."""


def run(tmp_path, name, *overrides, stop_at=None):
    values = {
        "model": {"path": "-", "dtype": "float32"},
        "data": {"train": [str(tmp_path / "a.jsonl"), {"path": str(tmp_path / "b.jsonl"), "weight": 1.5}]},
        "train": {"steps": 12, "global_batch": 4, "output_dir": str(tmp_path / name)},
        "optim": {"lr": 0.05, "schedule": "constant"},
        "checkpoint": {"every": 3},
        "log": {"tensorboard": False, "plot": False},
    }

    def prepare(recipe, backend):
        job = bag_model.prepare(recipe, backend)
        plain, seen = job.model.forward, []

        def forward(batch, last, **options):
            seen.append(batch)
            if len(seen) == stop_at:
                raise Interrupted
            return plain(batch, last, **options)

        job.model.forward = forward
        return job

    be = load_backend("torch_npu", "cpu")
    return train(values, ("data.pack_tokens=400", *overrides), backend=be, prepare=prepare)


def losses(run_dir) -> list[float]:
    return [row["loss"] for row in read_metrics(run_dir) if "loss" in row]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_run_is_gone_on_with_in_mid_epoch_with_other_workers(files, streaming):
    kind = (f"data.streaming={'true' if streaming else 'false'}", "data.shuffle_buffer=6")
    run(files, "whole", *kind)
    with pytest.raises(Interrupted):
        run(files, "other", *kind, "data.workers=1", stop_at=9)
    assert 6 <= len(losses(files / "other")) < 12
    run(files, "other", *kind, "data.workers=2", "data.prefetch=3")
    assert losses(files / "other") == losses(files / "whole")
    manifest = json.loads((files / "whole" / "checkpoints" / "step-0000012" / "manifest.json").read_text())
    assert set(manifest["data_position"]) == (
        {"epoch", "next", "open", "buffer", "draws", "files", "bytes"} if streaming else {"epoch", "index", "records"}
    )


def test_a_cache_changes_nothing(files):
    run(files, "plain", "train.steps=4")
    for name in ("cold", "warm"):
        run(files, name, "train.steps=4", f"data.cache={files}/cache", "data.workers=1")
        assert losses(files / name) == losses(files / "plain")
    assert sum(len(found) for _, _, found in os.walk(files / "cache")) > 10


def test_records_left_out_are_told_and_counted(files, capsys):
    lines = (files / "a.jsonl").read_text().splitlines()
    lines[3] = lines[3].replace("assistant", "user", 1).replace('"content": "', '"content": "x ')
    (files / "a.jsonl").write_text("\n".join([*lines, "{"]))
    with pytest.raises(DataError, match=r"a\.jsonl:(4: not numbers|21: not JSON)"):
        run(files, "error")
    run(files, "skip", "data.on_bad_sample=skip", "data.streaming=true")
    out = capsys.readouterr().out
    assert "warning: left out, bad: " in out
    assert out.count("a.jsonl:4: not numbers") == out.count("a.jsonl:21: not JSON") == 1, "once, in several epochs"
    run(files, "skip", "data.on_bad_sample=skip", "data.streaming=true", "train.steps=16")
    bad = sum(row.get("data_bad", 0) for row in read_metrics(files / "skip"))
    assert bad >= 3 and f"records: {bad} bad" in capsys.readouterr().out, "of the whole run, not of this start"


def test_a_bad_record_that_is_met_late_costs_no_step(files, capsys):
    lines = (files / "a.jsonl").read_text().splitlines()
    (files / "a.jsonl").write_text("\n".join([*lines[:15], "[]"]))
    late = f"data.train={files}/a.jsonl", "data.shuffle=false", "train.global_batch=5", "train.steps=4"
    with pytest.raises(DataError, match=r"a\.jsonl:16: expected an object"):
        run(files, "run", *late)
    assert "saved" in capsys.readouterr().out
    run(files, "run", *late, "data.on_bad_sample=skip")
    assert "step-0000003 (step 3)" in capsys.readouterr().out
    whole = run(files, "whole", *late, "data.on_bad_sample=skip")
    assert read_metrics(files / "run")[-1]["loss"] == whole.loss


def test_samples_to_answer_are_chosen_by_the_rules_of_an_evaluation(files):
    lines = (files / "b.jsonl").read_text().splitlines()
    (files / "b.jsonl").write_text("\n".join(["3", *lines]))
    val = {"val": str(files / "b.jsonl")}
    recipe = recipe_of(files, **val, on_bad_sample="skip")
    found = Feed(recipe, DataSets(recipe.data), BagEncoder()).val_samples(3)
    assert [sample.id for sample in found] == ["b.jsonl:2", "b.jsonl:3", "b.jsonl:4"]
    recipe = recipe_of(files, **val)
    with pytest.raises(DataError, match=r"b\.jsonl:1: expected an object"):
        Feed(recipe, DataSets(recipe.data), BagEncoder()).val_samples(3)


def test_an_evaluation_skips_bad_records_too(files, capsys):
    with open(files / "b.jsonl", "a") as file:
        file.write("[]\n")
    val = f"data.val={files}/b.jsonl", f"data.train={files}/a.jsonl", "train.steps=2"
    with pytest.raises(DataError, match=r"b\.jsonl:11: expected an object"):
        run(files, "run", *val)
    result = run(files, "run", *val, "data.on_bad_sample=skip")
    assert result.eval_loss is not None
    assert [row["step"] for row in read_metrics(files / "run") if "loss" in row] == [1, 2]
    assert "b.jsonl:11: expected an object" in capsys.readouterr().out
