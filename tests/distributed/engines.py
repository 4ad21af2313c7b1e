"""The engine over layouts of four ranks: one rank leads, the others follow, and the tokens are those of one process."""

from __future__ import annotations

import copy
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from divided_models import Whole, model_of, sample

import duetvl
from duetvl.core.backend import Backend
from duetvl.core.batch import Sample
from duetvl.core.errors import ConfigError
from duetvl.core.mesh import Mesh
from duetvl.core.ranks import Ranks
from duetvl.inference.lead import Adapt, Follower, Lead, Load, connect
from duetvl.inference.request import Completion, Request
from duetvl.inference.sampling import Sampling
from duetvl.models.qwen_vl.adapters import save_adapter
from duetvl.models.qwen_vl.loading import save_model

NEW, BLOCK = 8, 8
CLOSE = 1e-4  # of log-probabilities; where two tokens are as close as that, either may be chosen
OLD, LATER = Whole("qwen2_vl", 4, 2, "lora"), Whole("qwen2_5_vl", 4, 1, "lora")


def check_engines(be: Backend) -> None:
    """tp 2 in two replicas, and pp 2 x tp 2: half of the cache's rows, and a quarter."""
    check(be, OLD, {Mesh(dp=2, tp=2): 2, Mesh(pp=2, tp=2): 4})


def check_engines_with_one_key_head(be: Backend) -> None:
    """tp 4, where every rank has that head, and pp 2 in two replicas."""
    check(be, LATER, {Mesh(tp=4): 1, Mesh(pp=2, dp=2): 2})


def check(be: Backend, of: Whole, layouts: Mapping[Mesh, int]) -> None:
    """One rank of each replica leads, the others follow; into so many parts is the cache divided."""
    ranks, line, be = Ranks(be.collectives), connect(be), in_small_blocks(be)
    place = Path(ranks.first(lambda: str(made(be, of))))
    wanted, block = ranks.first(lambda: alone(be, place))
    for mesh, parts in layouts.items():
        team = mesh.ranks_along("pp", "tp", rank=ranks.index)
        if team[0] == ranks.index:
            lead = Lead(ranks, line, team[1:])
            found = answers(be, place, mesh, lead, block // parts)
            lead.end()
            same(found, wanted)
        else:
            follower = Follower(ranks, line, lambda told, mesh=mesh: load(be, told, mesh), duetvl.Model.with_adapter)
            follower.follow(team[0])
            assert follower.runner is not None and len(follower.runner.features) > 0
    ranks.each(None)
    line.close()
    if ranks.writes:
        shutil.rmtree(place)


def in_small_blocks(be: Backend) -> Backend:
    """Prompts of a few dozen tokens have some."""
    store = copy.copy(be.kv_cache)
    store.block_size = BLOCK
    return replace(be, kv_cache=store)


def made(be: Backend, of: Whole) -> Path:
    """A model and an adapter."""
    place = Path(tempfile.mkdtemp())
    save_model(model_of(be, replace(of, kind="full")), place / "model")
    save_adapter(model_of(be, of), place / "adapter")
    return place


def load(be: Backend, told: Load, mesh: Mesh) -> duetvl.Model:
    """A rank's part."""
    return duetvl.load_model(told.path, backend=be, dtype=told.dtype, mesh=mesh)


def requests() -> list[Request]:
    """Text, pictures, a video, a beginning that two prompts share, an adapter, and tokens that are drawn."""
    shown, text = sample(1, 9, (1, 8, 12), (3, 4, 4)), sample(2, 27)
    longer = replace(shown, input_ids=np.append(shown.input_ids, [5, 6, 7]), labels=None)
    prompts: list[tuple[Sample, dict[str, Any]]] = [
        (shown, {}), (text, {}), (longer, {}), (sample(3, 5, (1, 4, 6)), {"adapter": "other"}), (text, {"n": 2}),
        (shown, {"adapter": "other"}), (text, {"sampling": Sampling(temperature=0.8, seed=7)}),
    ]  # fmt: skip
    common = {"sampling": Sampling(), "max_new_tokens": NEW, "stop_ids": frozenset(), "logprobs": 2}
    return [Request(prompt, f"{number}", **(common | more)) for number, (prompt, more) in enumerate(prompts)]


def alone(be: Backend, place: Path) -> tuple[list[Completion], int]:
    """What one process answers, and the bytes of a block of its cache."""
    model = duetvl.load_model(place / "model", backend=be)
    other = model.with_adapter(place / "adapter")
    found = completed(duetvl.Engine(model, adapters={"other": other}, cache_tokens=2000))
    return found, model.cache_block_bytes


def answers(be: Backend, place: Path, mesh: Mesh, lead: Lead, block: int) -> list[Completion]:
    """What this rank answers with those that follow it: prompts in chunks, and too little room for all at once."""
    with lead.telling(Load(str(place / "model"), "float32", None, None)):
        model = duetvl.load_model(place / "model", backend=be, mesh=mesh)
    other = model.with_adapter(place / "adapter")
    with lead.telling(Adapt({"other": str(place / "adapter")})):
        lead.ranks.together(lambda: None)
    assert model.cache_block_bytes == block
    adapters, small = {"other": other}, {"pass_tokens": 24, "pass_patches": 64, "max_sequences": 3}
    before = duetvl.Engine(model, adapters=adapters, cache_bytes=2**20, lead=lead)
    engine = duetvl.Engine(model, adapters=adapters, cache_tokens=104, media_tokens=60, lead=lead, **small)
    found = completed(engine)
    assert engine.scheduler.preemptions > 0
    before.submit(requests()[0])
    (refused,) = [delta.completion for delta in before.step()]
    assert isinstance(refused.error, ConfigError) and "a newer engine runs on these ranks" in str(refused.error)
    return found


def completed(engine: Any) -> list[Completion]:
    found = engine.generate(requests())
    assert all(one.error is None for one in found), [one.error for one in found]
    assert any(one.cached_tokens for one in found)
    return [replace(one, timings=None) for one in found]


def same(found: Sequence[Completion], wanted: Sequence[Completion]) -> None:
    """The same tokens, unless two were all but equally likely."""
    told = 0
    for mine, theirs in zip(found, wanted, strict=True):
        for one, other in zip(mine.logprobs or (), theirs.logprobs or (), strict=True):
            if one.token != other.token:
                (_, first), (_, second) = other.top
                assert first - second < CLOSE, (mine.id, mine.token_ids, theirs.token_ids)
                break
            assert abs(one.logprob - other.logprob) < CLOSE, (mine.id, one, other)
            told = told + 1
    assert told > 0.9 * NEW * len(wanted), f"{told} tokens are the same"
