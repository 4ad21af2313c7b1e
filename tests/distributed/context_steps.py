"""Steps of training with context parallelism against those of one process (steps.py)."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
from steps import PLAIN, VISION, Spoiled, Tiny, compared, deal, mixed, pair, sample, text, work

from duetvl.core.backend import Backend
from duetvl.core.mesh import Mesh
from duetvl.core.spans import Spans
from duetvl.core.stages import Stages
from duetvl.models.attention import Attend, attend_within
from duetvl.models.qwen_vl.memory import Load
from duetvl.models.qwen_vl.memory import Trained as Weights
from duetvl.models.qwen_vl.sharding import Heads
from duetvl.parallel.context import Context, HeadShare
from duetvl.parallel.traffic import step_traffic
from duetvl.training.objective import TokenLoss
from duetvl.training.preference.dpo import PreferenceObjective
from duetvl.training.recipe.sections import DpoSection
from duetvl.training.step import StepResult, Trainer

sys.path.append(str(Path(__file__).parents[1] / "conformance"))
from tolerances import TOLERANCES, error  # after its directory is known


def check_context(be: Backend) -> None:
    """With data and tensor parallelism; ranks without a row, without a trained one, and without a pack."""
    schedule = [deal(mixed(), 2), deal(text(), 2), [mixed(), []]]
    for family in VISION:
        compared(be, Tiny(family), Mesh(dp=2, cp=2), schedule)
    samples = lambda be: TokenLoss(be.ops, "sample")  # noqa: E731
    once = [deal(mixed(), 1), deal(text(), 1)]
    compared(be, Tiny("qwen2_5_vl", sequence=True, vision="divide"), Mesh(cp=2, tp=2), once, objective=samples)
    compared(be, Tiny("qwen2_vl", ulysses=2, dropout=0.2), Mesh(cp=4), once, weights=1e-4)


def check_context_in_pipelines(be: Backend) -> None:
    """Features travel to the stage that places them, and from there to the ranks that have their tokens."""
    schedule = [deal(mixed(), 1), deal(text(), 1)]
    for ulysses, family in zip((1, 2), VISION, strict=True):
        compared(be, Tiny(family, stages=Stages((1, 1), (0, 3)), ulysses=ulysses), Mesh(pp=2, cp=2), schedule)
    compared(be, Tiny("qwen2_5_vl", stages=Stages((1, 1, 0, 0), (0, 1, 1, 1))), Mesh(pp=2, cp=2), schedule)


def check_context_of_pairs(be: Backend) -> None:
    """DPO against a held reference: losses and what is logged."""
    packs = [[pair(1, picture=True), pair(2)], [pair(3)], [pair(4, picture=True)]]
    for loss, mesh, ulysses in (("sigmoid", Mesh(dp=2, cp=2), 2), ("ipo", Mesh(pp=2, cp=2), 1)):
        stages = Stages((1, 0), (1, 1)) if mesh.pp > 1 else None
        tiny = Tiny("qwen2_5_vl", stages=stages, ulysses=ulysses)
        dpo = lambda be, loss=loss: PreferenceObjective(DpoSection(loss=loss, beta=0.3), be)  # noqa: E731
        found = compared(be, tiny, mesh, [deal(packs, mesh.dp)] * 2, objective=dpo)
        assert found is not None
        for a, b in zip(found.whole.results, found.part.results, strict=True):
            np.testing.assert_allclose(logged(b), logged(a), rtol=1e-4, atol=1e-6)


def check_context_not_finite(be: Backend) -> None:
    """The error about a loss that is not finite names its sample once, though several ranks have a part of it."""
    spoiled = lambda be: Spoiled(be.ops, "s12", float("nan"))  # noqa: E731
    schedule = [deal(mixed(), 2), deal(text(), 2)]
    found = compared(be, Tiny(), Mesh(dp=2, cp=2), schedule, PLAIN, objective=spoiled, on_nonfinite="skip")
    assert found is not None
    last = found.part.results[-1]
    assert last is not None and last.skipped is not None and last.skipped.count("s12") == 1, last


def logged(result: StepResult | None) -> list[float]:
    assert result is not None
    return list(result.values.values())


def check_context_traffic(be: Backend) -> None:
    """Two rings of two ranks that exchange heads send what is counted for them, to the byte, where rows are even."""
    tiny, mesh, counted = Tiny(ulysses=2), Mesh(cp=4), be.collectives
    division = tiny.division(mesh, counted.rank)
    model, packs = tiny.model(be, division), [[sample(3)], [sample(7)]]  # of eight tokens each
    trainer = Trainer(model, TokenLoss(be.ops), be, PLAIN, division=division)
    for mode in ("none", "full") if be.capabilities.recomputation else ("none",):
        model.recompute = mode
        before = dict(counted.traffic)
        trainer.step(work(model, [packs], 0), 1e-3)
        sent = {kind: counted.traffic[kind] - before.get(kind, 0) for kind in ("all_to_all", "exchange")}
        of_all = Weights.of(tiny.config(), "float32")
        assert sum(sent.values()) == step_traffic(tiny.config(), of_all, division, Load(8, 7), 2, mode).pieces, sent


def check_half_over_a_ring(be: Backend) -> None:
    """Attention in bfloat16 over a ring is as far from that of one process as two roundings of one result may be."""
    lengths, heads = np.array([21, 1, 9]), Heads(4, 2, 1)
    rng = np.random.default_rng(be.collectives.size)
    q, k, v, d = (rng.standard_normal((lengths.sum(), count, 8), dtype=np.float32) for count in (4, 2, 2, 4))
    context, rank = Context.of(be, [list(range(be.collectives.size))], 1), be.collectives.rank
    over_ring = context.attend(lengths, heads, HeadShare.of(heads, range(heads.query)))
    own = context.rows(lengths, rank)
    whole = attended(be, attend_within(be.ops, lambda layer: Spans.of_lengths(lengths, causal=True)), q, k, v, d)
    parts = be.collectives.gather_objects((own, attended(be, over_ring, q[own], k[own], v[own], d[own])))
    order = np.argsort(np.concatenate([rows for rows, _ in parts]))
    allowed = 2 * TOLERANCES["attention"].of("bfloat16")
    for number, expected in enumerate(whole):
        joined = np.concatenate([arrays[number] for _, arrays in parts])[order]
        assert error(joined, expected) <= allowed, (number, error(joined, expected), allowed)


def attended(be: Backend, attend: Attend, *arrays: np.ndarray) -> list[np.ndarray]:
    """What attention in bfloat16 gives of q, k and v, and the gradients of the three for that of its result."""
    *inputs, d = (be.ops.from_numpy(array, "bfloat16") for array in arrays)
    out: list[Any] = []

    def scalar(q: Any, k: Any, v: Any) -> Any:
        out.append(attend(0, q, k, v))
        return be.ops.sum(be.ops.cast(out[0], "float32") * be.ops.cast(d, "float32"))

    _, gradients = be.autograd.value_and_grad(scalar, inputs)
    return [np.array(be.to_numpy(x)) for x in (be.autograd.stop_gradient(out[0]), *gradients)]
