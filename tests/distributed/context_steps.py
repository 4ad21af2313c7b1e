"""Steps of training with context parallelism against those of one process (steps.py)."""

from __future__ import annotations

import numpy as np
from steps import PLAIN, VISION, Spoiled, Tiny, compared, deal, mixed, pair, text

from duetvl.core.backend import Backend
from duetvl.core.mesh import Mesh
from duetvl.core.stages import Stages
from duetvl.training.objective import TokenLoss
from duetvl.training.preference.dpo import PreferenceObjective
from duetvl.training.recipe.sections import DpoSection
from duetvl.training.step import StepResult


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
