"""What four ranks agree on before a run, as cases.py runs it: one of them has something otherwise."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import divided_models
import pytest

from duetvl.core.backend import Backend
from duetvl.core.errors import CheckpointError, ConfigError, DuetvlError, RankFailed
from duetvl.core.ranks import Ranks
from duetvl.models.qwen_vl.loading import write_random_model
from duetvl.training.agreement import check_data, check_model, check_one_disk, check_program
from duetvl.training.feed import DataSets
from duetvl.training.recipe.reading import make_recipe
from duetvl.training.recipe.sections import Recipe


def failing(error: Exception) -> Any:
    raise error


def refused(run: Callable[[], Any], kind: type[DuetvlError], words: str) -> None:
    """Every rank gets this error, and knows that all do."""
    with pytest.raises(kind, match=words) as found:
        run()
    assert found.value.agreed


def errors_are_shared(be: Backend) -> None:
    ranks = Ranks(be.collectives)
    me = ranks.index
    assert ranks.first(lambda: f"of {me}") == "of 0"
    assert ranks.together(lambda: me) == me
    assert ranks.each(me * me) == [0, 1, 4, 9]
    missing = CheckpointError("a file is missing")
    on_two = partial(ranks.together, lambda: failing(missing) if me in (1, 3) else me)
    refused(on_two, CheckpointError, r"^rank 1 \(.*\): a file is missing$")
    refused(lambda: ranks.together(lambda: failing(missing)), CheckpointError, "^a file is missing$")
    refused(lambda: ranks.first(lambda: failing(missing)), CheckpointError, "^a file is missing$")
    unreadable = OSError(13, "Permission denied", "/a/file")
    refused(lambda: ranks.together(lambda: failing(unreadable)), DuetvlError, "^/a/file: Permission denied$")
    bug = ValueError("of ours")
    with pytest.raises(ValueError if me == 2 else RankFailed, match="of ours") as found:
        ranks.together(lambda: failing(bug) if me == 2 else me)
    assert found.value is bug if me == 2 else not found.value.agreed
    before = partial(ranks.together, lambda: failing(missing) if me == 1 else ranks.agree(me))
    refused(before, CheckpointError, r"^rank 1 \(.*\): a file is missing$")
    assert ranks.agree(me) == 0  # they are still in step


def recipe_of(place: Path, *overrides: str) -> Recipe:
    return make_recipe({"model": {"path": str(place / "model")}, "data": {"train": "-"}}, overrides)


def a_start_is_refused(be: Backend) -> None:
    """Each kind of difference, in one start of four processes."""
    ranks = Ranks(be.collectives)
    me = ranks.index
    place = Path(ranks.first(lambda: tempfile.mkdtemp()))
    ranks.first(lambda: [write(place / name, seed) for seed, name in enumerate(("model", "other"))])
    check_program(ranks, recipe_of(place), be)
    other = recipe_of(place, *(["optim.lr=3e-4", "train.steps=7"] if me == 2 else []))
    words = (
        r"^rank 2 \(.*\) has other values in its recipe than rank 0 \(.*\): train.steps 7, not None, optim.lr 0.0003"
    )
    refused(lambda: check_program(ranks, other, be), ConfigError, words)

    check_one_disk(ranks, place)
    blind = place / f"elsewhere{me}" if me in (1, 3) else place
    blind.mkdir(exist_ok=True)
    words = r"^train.output_dir .*: ranks 1 \(.*\), 3 \(.*\) have another directory of that name than rank 0 \("
    refused(lambda: check_one_disk(ranks, blind, patience=0.3), ConfigError, words)
    assert not list(place.glob(".ranks*"))

    check_model(ranks, recipe_of(place))
    elsewhere = recipe_of(place, *([f"model.path={place / 'other'}"] if me == 3 else []))
    words = r"^rank 3 \(.*\) has other model files than rank 0 \(.*\): weights '.*', not '.*' \(of rank 3\); give every"
    refused(lambda: check_model(ranks, elsewhere), ConfigError, words)
    gone = recipe_of(place, *([f"model.path={place / 'none'}"] if me == 1 else []))
    refused(lambda: check_model(ranks, gone), CheckpointError, r"^rank 1 \(.*none")
    refused(
        lambda: check_model(ranks, recipe_of(place, "parallel.tp=9")), ConfigError, "^parallel.tp 9: .* 8 query heads"
    )
    data_is_compared(ranks, place)
    ranks.first(lambda: shutil.rmtree(place))


def data_is_compared(ranks: Ranks, place: Path) -> None:
    """Each rank in a directory of its own, where a file of one name may hold something else."""
    before, own = Path.cwd(), place / f"node{ranks.index}"
    own.mkdir()
    os.chdir(own)
    try:
        file = Path("data.jsonl")
        data = recipe_of(place, f"data.train={file}").data
        file.write_text("{}\n{}\n")
        check_data(ranks, DataSets(data))
        file.write_text("{}\n{}\n{}\n" if ranks.index == 1 else "{}\n{ }\n")
        words = (
            r"^rank 1 \(.*\) has other data than rank 0 \(.*\): training records 3, not 2, data.jsonl \(bytes\) 9, "
            r"not 7 \(of rank 1\); give every node the same files$"
        )
        refused(lambda: check_data(ranks, DataSets(data)), ConfigError, words)
    finally:
        os.chdir(before)


def write(target: Path, seed: int) -> None:
    write_random_model(
        divided_models.Whole("qwen2_vl", 8, 2).config(), target, seed=seed, settings=lambda directory: None
    )
