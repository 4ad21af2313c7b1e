"""A run that cannot be resumed as it is asked for says how to start another one from its weights: that works."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import tiny_run

from duetvl.core.errors import CheckpointError, ConfigError, DataError, DuetvlError
from duetvl.storage.finding import find_checkpoint
from duetvl.training.check import check
from duetvl.training.train import train
from duetvl.training.watching.metrics import read_metrics

PAIR = (
    '{"messages": [{"role": "user", "content": "say hello"}], "chosen": "hello", "rejected": "go away", "images": []}\n'
)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("from-weights")
    tiny_run.write_recipe(directory)
    return directory


def advised(error: DuetvlError) -> list[str]:
    """The overrides that a message says to add to the command."""
    assert "\n" not in str(error)
    return re.search(r"start a new run from these weights.*: add (.*) to the command", str(error))[1].split()


def losses(run: Path) -> list[tuple[int, float]]:
    return [(row["step"], row["eval_loss"]) for row in read_metrics(run) if "eval_loss" in row]


def test_another_recipe_or_other_data_start_from_the_weights(home, tmp_path):
    recipe, run = home / "tiny.json", tmp_path / "run"
    usual = [f"train.output_dir={run}", "train.steps=2"]
    train(recipe, usual)
    other = [*usual, "optim.lr=2e-3", "data.max_pixels=5000", "train.steps=3"]
    with pytest.raises(ConfigError, match=r"another recipe: data.max_pixels None -> 5000, optim.lr 0.001 -> 0.002; "
                       r"restore these to resume it \(train.steps 2 -> 3 may stay\), or ") as caught:  # fmt: skip
        train(recipe, other)
    words = advised(caught.value)
    assert words == [f"model.path={run}@2", f"train.output_dir={run}-1"]
    unscaled = [word for word in other if "pixels" not in word]
    train(recipe, [*unscaled, *words, "train.eval_first=true"])
    assert losses(Path(f"{run}-1"))[0] == (0, pytest.approx(losses(run)[-1][1], abs=1e-6))

    lines = (home / "data.jsonl").read_text().splitlines()
    (home / "fewer.jsonl").write_text("\n".join(lines[:9]))
    fewer = [*usual, f"data.train={home}/fewer.jsonl", "train.steps=3"]
    with pytest.raises(DataError, match="has 9 records, but the checkpoint's data position is one of 12") as caught:
        train(recipe, fewer)
    assert advised(caught.value) == [f"model.path={run}@2", f"train.output_dir={run}-2"]
    train(recipe, [*fewer, *advised(caught.value)])


def test_weights_alone_are_read_and_not_resumed(home, tmp_path, capsys):
    recipe, run = home / "tiny.json", tmp_path / "run"
    usual = [f"train.output_dir={run}", "train.steps=2", "checkpoint.save_only_model=true", "lora.rank=2"]
    train(recipe, [*usual, "checkpoint.export=merged"])
    ref = find_checkpoint(run)
    assert ref.weights_only and {file.name for file in ref.path.iterdir()} == {
        "manifest.json", "weights-00000-of-00001.safetensors",
    }  # fmt: skip
    assert (run / "export" / "config.json").is_file()
    train(recipe, usual)
    assert "all 2 steps are done already" in capsys.readouterr().out
    more = [*usual, "train.steps=3"]
    for start in (train, check):
        with pytest.raises(CheckpointError, match=r"has weights alone .*resuming needs AdamW's moments") as caught:
            list(start(recipe, more))
    assert "(its adapter merged)" in str(caught.value)
    words = advised(caught.value)
    train(recipe, [*more, *words, "train.eval_first=true"])
    assert losses(Path(f"{run}-1"))[0] == (0, pytest.approx(losses(run)[-1][1], abs=1e-5))


def test_a_policy_keeps_its_reference(home, tmp_path):
    (tmp_path / "pairs.jsonl").write_text(PAIR * 4)
    usual = [f"data.train={tmp_path}/pairs.jsonl", f"train.output_dir={tmp_path}/run", "train.steps=1", "data.val=null"]
    train(home / "tiny.json", [*usual, "dpo.beta=0.1"])
    with pytest.raises(ConfigError) as caught:
        train(home / "tiny.json", [*usual, "dpo.beta=0.2"])
    words = advised(caught.value)
    assert words[1] == f"dpo.reference={home}/model"
    train(home / "tiny.json", [*usual, "dpo.beta=0.2", *words])
    (row,) = read_metrics(tmp_path / "run-1")
    assert row["rewards/chosen"] != 0, "it was compared with the weights that it started from"
