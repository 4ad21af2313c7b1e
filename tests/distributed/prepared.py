"""What a recipe for several ranks prepares: the model and its reference, divided."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from duetvl.core.backend import Backend
from duetvl.core.batch import Batch, Pair, Sample
from duetvl.models.qwen_vl.loading import load_model
from duetvl.training.job import Job
from duetvl.training.preference.dpo import answer_sums
from duetvl.training.recipe.reading import make_recipe
from duetvl.training.sft import prepare

sys.path.append(str(Path(__file__).parents[1] / "training"))
from tiny_run import write_recipe  # after its directory is known

PARALLEL = {"dp": 2, "tp": 2, "sequence": True}


def check_prepared(be: Backend) -> None:
    """Logits, and what the kinds of reference say of pairs, are those of one process, the same on all ranks."""
    with TemporaryDirectory() as place:
        file = write_recipe(Path(place), std=0.2)
        cache = be.collectives.gather_objects(f"{place}/cache")[0]  # one directory for all ranks, as on one file system
        for sections in ({"dpo": {}}, {"dpo": {}, "lora": {"rank": 2}}, {"dpo": {"cache": cache}}):
            job = made(be, file, sections)
            whole = load_model(Path(place) / "model", backend=be)
            assert job.division.mesh.tp == 2
            assert job.model.parameters["model.norm.weight"].part is None
            assert job.model.parameters["model.embed_tokens.weight"].part is not None
            batch = replace(whole.pack([Pair(answer(5), answer(8))]), digests=(bytes(16),))
            np.testing.assert_allclose(
                be.to_numpy(job.model.logits(batch)), be.to_numpy(whole.logits(batch)), rtol=0, atol=3e-5
            )
            wanted = be.to_numpy(answer_sums(be.ops, batch, whole.logprobs(batch)))
            compare(be, job, batch, np.array(wanted))
        be.collectives.barrier()  # the cache lies in the directory of rank 0


def made(be: Backend, file: Path, sections: Mapping[str, Any]) -> Job:
    return prepare(make_recipe({**json.loads(file.read_text()), "parallel": PARALLEL, **sections}), be)


def compare(be: Backend, job: Job, batch: Batch, wanted: np.ndarray) -> None:
    if job.before is not None:
        job.before(Pairs(batch))
        job.before(Pairs(batch))  # it is complete then, and nothing is run
    (sums,) = job.compared_with([batch])
    found = np.array(be.to_numpy(sums))
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    assert len(set(be.collectives.gather_objects(found.tobytes()))) == 1


@dataclass
class Pairs:
    """Data of one micro-batch."""

    batch: Batch
    files: tuple[Path, ...] = ()
    count: int = 1

    def everything(self) -> Iterator[tuple[Batch, ...]]:
        yield (self.batch,)


def answer(count: int) -> Sample:
    ids = np.arange(3, 9 + count)
    return Sample(ids, np.where(np.arange(len(ids)) >= 6, ids, -100), id=f"a{count}")
