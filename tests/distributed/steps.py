"""Training steps of a tiny model over several ranks, compared with those of one process."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from duetvl.core.backend import Backend
from duetvl.core.batch import IGNORE, Batch, Pair, Sample
from duetvl.core.boxes import Slices
from duetvl.core.collectives import Collectives, Group, Pending, Receive, Send
from duetvl.core.composed import ComposedCollectives
from duetvl.core.errors import ConfigError
from duetvl.core.mesh import Mesh
from duetvl.core.params import Parameter
from duetvl.core.random import philox
from duetvl.core.stages import Stages
from duetvl.data.loading.loader import Step
from duetvl.models.lora import Adapters, Size
from duetvl.models.qwen_vl.config import ModelConfig
from duetvl.models.qwen_vl.model import QwenVL
from duetvl.models.qwen_vl.parameters import parameter_shapes
from duetvl.models.qwen_vl.sharding import Heads
from duetvl.parallel.division import Division, VisionMode, ZeroMode
from duetvl.parallel.pipeline import passes_of, placed
from duetvl.parallel.zero import Zero
from duetvl.training.objective import Objective, TokenLoss
from duetvl.training.preference.dpo import PreferenceObjective, reference_of
from duetvl.training.recipe.sections import DpoSection, OptimSection
from duetvl.training.step import NonFiniteError, Outlook, StepResult, Trainer

VOCABULARY = 99  # no number of ranks divides it
IMAGE, START, END = 91, 92, 93
VISION = {
    "qwen2_vl": {"depth": 1, "embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2, "num_heads": 4},
    "qwen2_5_vl": {
        "depth": 1, "hidden_size": 32, "intermediate_size": 42, "out_hidden_size": 32, "num_heads": 4,
        "tokens_per_second": 2, "fullatt_block_indexes": [0], "window_size": 112,
    },
}  # fmt: skip
ADAPTED = (
    "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj", "model.layers.0.mlp.down_proj",
    "model.layers.0.self_attn.o_proj", "visual.blocks.0.attn.qkv", "visual.merger.mlp.2",
)  # fmt: skip
PLAIN = OptimSection(lr=1e-3, weight_decay=0.1, clip=0.5, eps=1e-4)


# -- the ranks of a run ------------------------------------------------------------------------------------------------


def alone(be: Backend) -> Backend:
    """The backend of a run of one process."""
    return replace(be, collectives=ComposedCollectives(be.ops))


class Some:
    """The collectives of the first ranks of the world as a run of their own."""

    def __init__(self, world: Collectives, count: int):
        self.world, self.count = world, count
        self.rank, self.size, self.traffic, self.calls = world.rank, count, world.traffic, world.calls
        self.everyone = self._group([list(range(count))])

    def _group(self, ranks: Sequence[Sequence[int]]) -> Group:
        return self.world.groups([*ranks, *([rank] for rank in range(self.count, self.world.size))])

    def groups(self, ranks: Sequence[Sequence[int]]) -> Group:
        return self.everyone if len(ranks) == 1 else self._group(ranks)

    def group_ranks(self, group: Group) -> Sequence[int]:
        return self.world.group_ranks(group or self.everyone)

    def all_reduce(self, x: Any, group: Group = None, op: str = "sum") -> Any:
        return self.world.all_reduce(x, group or self.everyone, op)

    def all_gather(self, x: Any, group: Group = None, sizes: Sequence[int] | None = None) -> Any:
        return self.world.all_gather(x, group or self.everyone, sizes)

    def reduce_scatter(self, x: Any, group: Group = None, sizes: Sequence[int] | None = None) -> Any:
        return self.reduce_scatter_later(x, group, sizes).wait()

    def reduce_scatter_later(self, x: Any, group: Group = None, sizes: Sequence[int] | None = None) -> Pending:
        return self.world.reduce_scatter_later(x, group or self.everyone, sizes)

    def exchange(self, sends: Sequence[Send], receives: Sequence[Receive]) -> list[Any]:
        return self.world.exchange(sends, receives)

    def gather_objects(self, value: Any, group: Group = None) -> list[Any]:
        return self.world.gather_objects(value, group or self.everyone)


def first_ranks(be: Backend, count: int) -> Backend | None:
    """The backend of a run of the first `count` ranks of the world; None on the others. All ranks call it."""
    if count == be.collectives.size:
        return be
    some = Some(be.collectives, count)
    return replace(be, collectives=some) if be.collectives.rank < count else None


# -- a model and its packs ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tiny:
    """A tiny model: its family, heads of queries and of keys, the dtype of its weights, the dropout of its adapters;
    how it is divided over ranks of tensor parallelism."""

    family: str = "qwen2_vl"
    heads: int = 4
    kv_heads: int = 2
    dtype: str = "float32"
    dropout: float | None = None  # None: without adapters
    sequence: bool = False
    vision: VisionMode = "shard"
    stages: Stages | None = None  # of a pipeline; they say how many layers there are
    ulysses: int | None = None  # ranks that exchange heads; None: all of context parallelism
    zero: ZeroMode = 1

    def config(self) -> ModelConfig:
        depth, layers = self.stages.layers if self.stages else (1, 1)
        return ModelConfig.from_dict(
            {
                "model_type": self.family, "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 50,
                "num_hidden_layers": layers, "num_attention_heads": self.heads, "num_key_value_heads": self.kv_heads,
                "rms_norm_eps": 1e-6, "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 16 // self.heads - 2]},
                "tie_word_embeddings": self.family == "qwen2_5_vl", "vision_start_token_id": START,
                "vision_end_token_id": END, "image_token_id": IMAGE, "video_token_id": 90,
                "vision_config": VISION[self.family] | {"depth": depth},
            }
        )  # fmt: skip

    def division(self, mesh: Mesh, rank: int) -> Division:
        how = {"sequence": self.sequence, "vision": self.vision, "stages": self.stages, "ulysses": self.ulysses}
        return Division.of(self.config(), mesh, rank, zero=self.zero, **how)

    def model(self, be: Backend, division: Division) -> QwenVL:
        """What this rank has of it."""
        given, shapes = self.config(), dict(parameter_shapes(self.config()))

        def held(shapes: Mapping[str, tuple[int, ...]]) -> list[tuple[str, tuple[int, ...]]]:
            return [(path, shape) for path, shape in shapes.items() if division.holds(path)]

        def parameter(path: str, shape: tuple[int, ...], dtype: str) -> Parameter:
            array = philox(3, path).standard_normal(shape, dtype=np.float32)
            array = array / np.float32(np.sqrt(np.prod(shape[1:]))) if len(shape) > 1 else 1 + array * np.float32(0.1)
            part = division.part(path, shape)
            tensor = be.ops.from_numpy(np.ascontiguousarray(cut(array, part.slices), np.float32), dtype)
            return Parameter(path, tensor, part=None if part.shape == shape else part)

        model = QwenVL(
            given,
            be,
            {path: parameter(path, shape, self.dtype) for path, shape in shapes.items() if division.holds(path)},
        )
        if self.dropout is not None:
            adapters = Adapters({module: Size(3, 6.0) for module in ADAPTED}, dropout=self.dropout)
            own = {
                path: parameter(path, shape, "float32")
                for path, shape in adapters.shapes(shapes).items()
                if division.holds(path)
            }
            model.put_adapters(adapters, own)
        model.recompute = "full" if self.zero == 3 else "none"
        return placed(model, division, be)


def cut(array: np.ndarray, part: Slices) -> np.ndarray:
    return np.concatenate([array[box.slices] for box in part.boxes], part.axis)


def sample(number: int, *, picture: bool = False, trained: bool = True) -> Sample:
    rng = np.random.default_rng(number)
    head = [START, *[IMAGE] * 6, END] if picture else []
    ids = np.array([*head, *rng.integers(0, 90, 5 + number % 4)])
    labels = np.where(np.arange(len(ids)) >= len(head) + 2, ids, IGNORE) if trained else np.full(len(ids), IGNORE)
    media = {
        "pixel_values": rng.standard_normal((24, 1176)).astype(np.float32),
        "image_grid_thw": np.array([[1, 4, 6]]),
    }
    return Sample(ids, labels, id=f"s{number}", **(media if picture else {}))


def pair(number: int, *, picture: bool = False) -> Pair:
    chosen, other = sample(number, picture=picture), sample(number + 20, picture=picture)
    return Pair(chosen, replace(other, pixel_values=None))


Packs = Sequence[Sequence[Sample | Pair]]
Dealt = Sequence[Packs]  # the packs of each place of data parallelism


def mixed() -> Packs:
    """Five packs: a picture and a text, a text, two texts, a picture, a text."""
    seen = [sample(1, picture=True), sample(4, picture=True)]
    return [[seen[0], sample(2)], [sample(3)], [sample(5), sample(6)], [seen[1]], [sample(7)]]


def text(first: int = 11) -> Packs:
    """Four packs without a picture."""
    return [[sample(first + i)] for i in range(4)]


def untrained(number: int = 31) -> Packs:
    """A pack with a picture and without a trained token."""
    return [[sample(number, picture=True, trained=False)]]


def deal(packs: Packs, count: int) -> Dealt:
    """One after the other."""
    return [packs[place::count] for place in range(count)]


def work(model: QwenVL, dealt: Dealt, place: int | None) -> Step:
    """The step of one place of data parallelism, or of one process that has all packs."""
    first = np.cumsum([0, *map(len, dealt)])
    names = tuple(s.id for packs in dealt for pack in packs for s in pack)
    own = range(int(first[-1])) if place is None else range(first[place], first[place + 1])
    packs = [pack for packs in dealt for pack in packs]
    return Step(tuple(model.pack(packs[i]) for i in own), names, numbers=tuple(own))


# -- equal to one process ----------------------------------------------------------------------------------------------


class Spoiled(TokenLoss):
    """The loss of packs that hold the sample `name` is multiplied by `factor`."""

    def __init__(self, ops: Any, name: str, factor: float):
        super().__init__(ops)
        self.name, self.factor = name, factor

    def prepare(self, batch: Batch, *given: Any) -> Any:
        prepared = super().prepare(batch, *given)
        return replace(prepared, scale=prepared.scale * (self.factor if self.name in batch.sample_ids else 1.0))


class Observed(Trainer):
    """Keeps what is known of gradients just before an update: those of the first step."""

    gradients: dict[str, np.ndarray] | None = None

    def _update(self, lr: float, norm: float, scale: float) -> None:
        if self.gradients is None:
            held = {path: p for path, p in self.owned.items() if p.main_grad is not None}
            self.gradients = {path: np.array(self.backend.to_numpy(p.main_grad)) for path, p in held.items()}
        super()._update(lr, norm, scale)


@dataclass(frozen=True)
class Trained:
    """After some steps: what each gave, gradients of the first, weights, and the optimizer's state, in numpy."""

    results: list[StepResult | None]
    gradients: dict[str, np.ndarray]
    weights: dict[str, np.ndarray]
    steps: dict[str, int]
    slots: dict[str, dict[str, np.ndarray]]


def trained(be: Backend, trainer: Observed, results: list[StepResult | None]) -> Trained:
    def arrays(tensors: Mapping[str, Any]) -> dict[str, np.ndarray]:
        return {path: np.array(be.to_numpy(tensor), np.float32) for path, tensor in tensors.items()}

    weights = arrays({path: p.tensor for path, p in trainer.model.parameters.items()})
    slots = {kind: arrays(tensors) for kind, tensors in trainer.state.slots().items()}
    return Trained(results, trainer.gradients or {}, weights, dict(trainer.state.step), slots)


def train(
    be: Backend, tiny: Tiny, mesh: Mesh, schedule: Sequence[Dealt], optim: OptimSection = PLAIN,
    objective: Callable[[Backend], Objective] = lambda be: TokenLoss(be.ops), **how: Any,
) -> tuple[Observed, Trained]:  # fmt: skip
    """The steps of a schedule on this rank of a run."""
    division = tiny.division(mesh, be.collectives.rank)
    model, goal = tiny.model(be, division), objective(be)
    if goal.needs_reference:
        how["reference"] = reference_of(passes_of(tiny.model(be, division), be, division), be.ops)
    trainer = Observed(model, goal, be, optim, division=division, **how)
    place = None if mesh.size == 1 else division.place("dp")
    results = [trainer.step(work(model, dealt, place), optim.lr, number) for number, dealt in enumerate(schedule)]
    return trainer, trained(be, trainer, results)


@dataclass(frozen=True)
class Compared:
    """One process and this rank of a run after the same steps."""

    whole: Trained
    part: Trained
    trainer: Trainer

    def mine(self, path: str, array: np.ndarray) -> np.ndarray:
        """Of what one process has of a parameter, the rows that this rank owns."""
        return cut(array, self.trainer.owned[path].place.slices)


def compared(
    be: Backend, tiny: Tiny, mesh: Mesh, schedule: Sequence[Dealt], optim: OptimSection = PLAIN,
    weights: float = 1e-6, **how: Any,
) -> Compared | None:  # fmt: skip
    """Losses, first gradients, last weights and numbers of updates are those of one process, which is rank 0.

    None on ranks that take no part. `weights`: how much each may differ, as a share of its norm.
    """
    run = first_ranks(be, mesh.size)
    if run is None:
        return None
    one = train(alone(be), tiny, Mesh(), schedule, optim, **how)[1] if run.collectives.rank == 0 else None
    whole = run.collectives.gather_objects(one)[0]
    trainer, part = train(run, tiny, mesh, schedule, optim, **how)
    found = Compared(whole, part, trainer)
    for a, b in zip(whole.results, part.results, strict=True):
        assert (a is None) == (b is None), (a, b)
        if a is not None and b is not None:
            assert a.skipped == b.skipped, (a.skipped, b.skipped)
            np.testing.assert_allclose([b.loss, b.grad_norm], [a.loss, a.grad_norm], rtol=1e-5)
    check_gradients(found)
    for path, p in trainer.model.parameters.items():
        mine = cut(whole.weights[path], p.place.slices)
        assert off(part.weights[path], mine) <= weights * np.linalg.norm(mine), (path, off(part.weights[path], mine))
    assert part.steps == {path: whole.steps[path] for path in trainer.owned}
    return found


def off(found: np.ndarray, wanted: np.ndarray) -> float:
    assert found.shape == wanted.shape, (found.shape, wanted.shape)
    return float(np.linalg.norm(found - wanted))


def check_gradients(found: Compared) -> None:
    """The rows that this rank owns have their rows of one process's gradient."""
    expected = found.whole.gradients
    total = np.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in expected.values()))
    assert found.part.gradients.keys() == expected.keys() & found.trainer.owned.keys()
    for path, gradient in found.part.gradients.items():
        mine = found.mine(path, expected[path])
        allowed = 1e-5 * max(float(np.linalg.norm(mine)), 1e-3 * total)
        if path.endswith("k_proj.bias"):
            allowed *= 4  # it adds the same to all scores of a query: its gradient is 0 but for rounding
        assert off(gradient, mine) <= allowed, (path, off(gradient, mine), allowed)


def same_state(found: Compared, share: float) -> None:
    """Moments and masters of the owned rows are bit for bit those of one process, but for a share of the second
    moments, whose rounding shows whether its random bits are."""
    for kind, slots in found.part.slots.items():
        theirs = found.whole.slots[kind]
        assert slots.keys() == theirs.keys() & found.trainer.owned.keys(), kind
        for path, array in slots.items():
            other = (array != found.mine(path, theirs[path])).mean()
            if kind == "exp_avg_sq" or not share:
                assert other <= share, (kind, path, other)


# -- the checks --------------------------------------------------------------------------------------------------------


def check_training_stages(be: Backend) -> None:
    """Pipelines, with text alone in one step, the tower in one stage and in two, more stages than packs."""
    schedule = [deal(mixed(), 1), deal(text(), 1), deal(mixed()[:1], 1)]
    for family in VISION:
        compared(be, Tiny(family, stages=Stages((2, 0), (1, 1))), Mesh(pp=2), schedule)
        compared(be, Tiny(family, stages=Stages((1, 1), (0, 3))), Mesh(pp=2), schedule)
    compared(be, Tiny(stages=Stages((1, 1, 0, 0), (0, 1, 1, 2))), Mesh(pp=4), schedule)


def check_virtual_stages(be: Backend) -> None:
    """Stages without any layer of one tower, and the first and last of the language model on one rank."""
    schedule = [deal(mixed(), 1), deal(text(), 1)]
    for family in VISION:
        compared(be, Tiny(family, stages=Stages((1, 1, 0, 0), (0, 1, 1, 1))), Mesh(pp=2), schedule)
    compared(be, Tiny("qwen2_5_vl", stages=Stages((2, 0, 0, 0), (0, 0, 1, 1))), Mesh(pp=2), schedule)


def check_pipelines_together(be: Backend) -> None:
    """With data and tensor parallelism, adapters, and preferences."""
    two = Stages((1, 0), (1, 2))
    compared(be, Tiny("qwen2_5_vl", stages=two), Mesh(pp=2, dp=2), [deal(mixed(), 2), deal(text(), 2)])
    compared(be, Tiny(stages=two, sequence=True, vision="divide"), Mesh(pp=2, tp=2), [deal(mixed(), 1)] * 2)
    compared(be, Tiny(stages=two, dropout=0.3), Mesh(pp=2), [deal(mixed(), 1)] * 2, weights=1e-4)
    pairs = [[pair(1, picture=True)], [pair(2), pair(3)], [pair(4, picture=True)]]
    compared(
        be, Tiny(stages=two), Mesh(pp=2), [deal(pairs, 1)] * 2,
        objective=lambda be: PreferenceObjective(DpoSection(), be),
    )  # fmt: skip


def check_plain(be: Backend) -> None:
    """Five steps on two ranks, the second of text alone, and at AdamW's usual epsilon, which amplifies rounding."""
    schedule = [deal(mixed(), 2), deal(text(), 2), *[deal(mixed(), 2)] * 3]
    if found := compared(be, Tiny("qwen2_vl"), Mesh(dp=2), schedule):
        assert {n for path, n in found.part.steps.items() if path.startswith("visual.")} == {4}
        assert {n for path, n in found.part.steps.items() if not path.startswith("visual.")} == {5}
    usual = PLAIN.model_copy(update={"eps": 1e-8})
    if found := compared(be, Tiny("qwen2_5_vl"), Mesh(dp=2), schedule, usual, weights=1e-3):
        for path, weight in found.part.weights.items():
            difference = np.abs(weight - found.whole.weights[path]).mean()
            # The gradient of a key's bias is rounding alone, which AdamW makes as large as any other.
            assert difference < (8e-3 if path.endswith("k_proj.bias") else 2e-3) * usual.lr, (path, difference)


def check_uneven(be: Backend) -> None:
    """Three ranks with different numbers of packs, one without any, one without a trained token, all without one; a
    rank with pictures beside others without."""
    a, b, c, d, e = mixed()
    schedule = [
        [[a, b, c, d], [e], []],
        [untrained(), [a], [b, c]],
        [untrained(31), untrained(32), []],
        [[], text(), untrained()],
        [[], [b, e], [d]],
    ]
    if found := compared(be, Tiny("qwen2_5_vl"), Mesh(dp=3), schedule):
        assert [result is None for result in found.part.results] == [False, False, True, False, False]


def check_divided(be: Backend) -> None:
    """Two by two ranks: copies of a key head, a divided sequence and a tower of divided frames; and none of these."""
    schedule = [deal(mixed(), 2), [mixed(), []], deal(text(), 2), *[deal(mixed(), 2)] * 2]
    for tiny in (Tiny("qwen2_vl", 4, 1, sequence=True, vision="divide"), Tiny("qwen2_5_vl", 4, 2)):
        compared(be, tiny, Mesh(dp=2, tp=2), schedule)


def check_adapters(be: Backend) -> None:
    """Tensors of three rows on four ranks, with dropout: every rank owns some, and draws the masks of one process."""
    found = compared(be, Tiny("qwen2_vl", dropout=0.2), Mesh(dp=4), [deal(mixed(), 4)] * 5)
    assert found is not None
    owned = be.collectives.gather_objects(len(found.trainer.owned))
    assert 0 < min(owned) < len(found.trainer.trained), owned
    tiny = Tiny("qwen2_5_vl", dropout=0.2, sequence=True)
    compared(be, tiny, Mesh(dp=2, tp=2), [deal(mixed(), 2)] * 5)


def check_preferences(be: Backend) -> None:
    """DPO against a reference beside the policy, on two by two ranks."""
    packs = [[pair(1, picture=True), pair(2)], [pair(3)], [pair(4, picture=True)]]
    dpo = lambda be: PreferenceObjective(DpoSection(beta=0.3), be)  # noqa: E731
    schedule = [deal(packs, 2), [[], packs[1:2]], *[deal(packs, 2)] * 3]
    found = compared(be, Tiny("qwen2_5_vl"), Mesh(dp=2, tp=2), schedule, objective=dpo)
    assert found is not None
    for a, b in zip(found.whole.results, found.part.results, strict=True):
        assert a is not None and b is not None
        np.testing.assert_allclose(list(b.values.values()), list(a.values.values()), rtol=1e-4, atol=1e-6)


def check_sharded(be: Backend) -> None:
    """Weights divided over replicas: with uneven packs, a picture on one rank alone, a rank without packs; in half
    precision bit for bit; together with context and tensor parallelism, key heads that ranks have in common too."""
    seen, none = mixed(), ()
    schedule = [deal(mixed(), 2), deal(text(), 2), [seen[3:4], seen[1:2]], [none, seen[:3]], [text(), none]]
    if found := compared(be, Tiny("qwen2_vl", zero=3), Mesh(dp=2), schedule):
        trainer = found.trainer
        held, batch = trainer.model.parameters, trainer.model.pack(seen[0])
        assert held["model.layers.0.mlp.up_proj.weight"].shape == (25, 32)
        assert trainer.owned["visual.merger.mlp.0.weight"] is held["visual.merger.mlp.0.weight"]
        assert held["model.norm.weight"].part is None
        assert trainer.evaluate([batch] * trainer.ranks.index).tokens == batch.trained_tokens
        calls, place = trainer.backend.collectives.calls, trainer.ranks.index
        calls.clear()
        trainer.step(work(trainer.model, [seen[:3], none], place), 1e-3)
        # Of three passes one has a picture: gathers of two blocks and of the merger, else of the layer alone; twice.
        # The rest of tower and language model are two buckets.
        assert calls == {"gather_objects": 3, "all_gather": 2 * 5 + 2, "reduce_scatter": 5 + 2}, calls
    exact = be.capabilities.bitwise_repeatable
    halves = Tiny("qwen2_5_vl", dtype="bfloat16", zero=3)
    compared(be, halves, Mesh(dp=2), [[mixed(), none], [none, text()]], weights=0.0 if exact else 1e-3)
    for family, mesh in (("qwen2_vl", Mesh(dp=2, cp=2)), ("qwen2_5_vl", Mesh(tp=3)), ("qwen2_vl", Mesh(dp=2, tp=2))):
        tiny = Tiny(family, zero=3, sequence=mesh.tp == 2, vision="divide" if mesh.tp == 2 else "shard")
        compared(be, tiny, mesh, [deal(mixed(), mesh.dp), deal(text(), mesh.dp)])


def check_half(be: Backend) -> None:
    """bfloat16 with moments of bfloat16 and with offload: where one rank has all packs, the bits are those of one
    process, as far as the backend repeats its own."""
    optim = PLAIN.model_copy(update={"state_dtype": "bfloat16", "offload": True})
    schedule = [[mixed(), []], [[], text()], [mixed(), []]]
    exact = be.capabilities.bitwise_repeatable
    weights = 0.0 if exact else 1e-3
    if found := compared(be, Tiny("qwen2_5_vl", dtype="bfloat16"), Mesh(dp=2), schedule, optim, weights):
        same_state(found, 0.0 if exact else 0.01)


def check_overflow(be: Backend) -> None:
    """float16 overflows on one rank alone: no rank updates, and the scale halves on all."""
    schedule = [deal(mixed(), 2), deal(text(), 2), deal(mixed(), 2)]
    optim = PLAIN.model_copy(update={"loss_scale": 1024.0})
    spoiled = lambda be: Spoiled(be.ops, "s12", 1e30)  # noqa: E731 - a sample of the second rank in the second step
    if found := compared(
        be, Tiny("qwen2_vl", dtype="float16"), Mesh(dp=2), schedule, optim, objective=spoiled, weights=1e-3
    ):
        results = found.part.results
        assert [result is not None and result.skipped is not None for result in results] == [False, True, False]
        scale = found.trainer.loss_scale
        assert scale is not None and scale.scale == 512.0


def check_not_finite(be: Backend) -> None:
    """A loss that is not finite on one rank alone is skipped, or stops all with one message."""
    schedule = [deal(mixed(), 3), deal(text(), 3)]
    spoiled = lambda be: Spoiled(be.ops, "s12", float("nan"))  # noqa: E731 - of the second rank in the second step
    found = compared(be, Tiny(), Mesh(dp=3), schedule, objective=spoiled, on_nonfinite="skip")
    if found:
        last = found.part.results[-1]
        assert last is not None and last.skipped == "the loss is not finite; samples of the step: s12"
    run = first_ranks(be, 3)
    if run is None:
        return
    division = Tiny().division(Mesh(dp=3), run.collectives.rank)
    model = Tiny().model(run, division)
    trainer = Trainer(model, spoiled(run), run, PLAIN, division=division)
    before = {path: np.array(be.to_numpy(p.tensor)) for path, p in model.parameters.items()}
    said = error_of(NonFiniteError, lambda: trainer.step(work(model, schedule[1], division.place("dp")), 0.1))
    assert said.startswith("step 1: the loss is not finite; samples of the step: s12; no update"), said
    assert all((before[path] == be.to_numpy(p.tensor)).all() for path, p in model.parameters.items())
    assert all(p.main_grad is None for p in (*model.parameters.values(), *trainer.owned.values()))
    assert trainer.is_sound()


def check_edges(be: Backend) -> None:
    """Evaluation counts each batch once; before a step all ranks know the same."""
    tiny, mesh, rank = Tiny("qwen2_5_vl", 4, 2), Mesh(dp=2, tp=2), be.collectives.rank
    division = tiny.division(mesh, rank)
    model, whole = tiny.model(be, division), tiny.model(alone(be), Division())
    trainer = Trainer(model, TokenLoss(be.ops), be, PLAIN, division=division)
    expected = Trainer(whole, TokenLoss(be.ops), alone(be), PLAIN).evaluate(work(whole, [mixed()], None).batches)
    step = work(model, [mixed(), []], division.place("dp"))
    found = trainer.evaluate(step.batches)
    assert (found.tokens, found.weight) == (expected.tokens, expected.weight)
    np.testing.assert_allclose(found.loss, expected.loss, rtol=1e-5)
    outlook = trainer.outlook(step, Outlook(stops=rank == 3, late=rank == 1))
    assert outlook == Outlook(expected.weight, pictures=True, stops=True, late=False), outlook
    assert trainer.outlook(None, Outlook(late=rank == 0)) == Outlook(late=True)


def check_rows(be: Backend) -> None:
    """Exact numbers: gradients of every kind of sharing are summed to the rows that a rank owns, in several buckets;
    new rows reach every copy."""
    rank, shapes = be.collectives.rank, {
        "visual.merger.ln_q.weight": (3,),
        "model.layers.0.self_attn.q_proj.weight": (12, 4),
        "model.layers.0.self_attn.k_proj.weight": (6, 4),  # three heads of two rows; each rank has two of them
        "model.layers.0.self_attn.o_proj.weight": (4, 12),
        "model.norm.weight": (5,),
    }  # fmt: skip
    views = [Division(Mesh(dp=2, tp=2), Heads(6, 3, 2), r, vision="shard") for r in range(4)]
    for dtype in ("float32", "bfloat16"):
        parameters = [started(be, views[rank], path, shape, dtype) for path, shape in shapes.items()]
        zero = Zero(be, views[rank], parameters, bucket=6)
        assert {p.path for p in parameters if zero.owned.get(p.path) is p} == set()
        for p in zero.owned.values():
            np.testing.assert_array_equal(be.to_numpy(p.tensor), cut(numbers(p.place.whole), p.place.slices))
        for conditional in (True, False):
            zero.begin(conditional)
            arrive(be, zero, parameters, views[rank])
            zero.reduce()
            for path, p in zero.owned.items():
                if path.startswith("visual.") and not conditional:
                    assert p.main_grad is None
                else:
                    np.testing.assert_array_equal(be.to_numpy(p.main_grad), summed(views, p))
                p.main_grad = None  # as the optimizer leaves it
        for p in zero.owned.values():
            be.ops.assign(p.tensor, be.ops.from_numpy(cut(-numbers(p.place.whole), p.place.slices), dtype))
        zero.begin(True)
        zero.publish()
        for p in parameters:
            np.testing.assert_array_equal(be.to_numpy(p.tensor), cut(-numbers(p.place.whole), p.place.slices))


def numbers(shape: tuple[int, ...]) -> np.ndarray:
    """Exact in bfloat16."""
    return np.arange(np.prod(shape)).reshape(shape).astype(np.float32)


def started(be: Backend, view: Division, path: str, shape: tuple[int, ...], dtype: str) -> Parameter:
    part = view.part(path, shape)
    tensor = be.ops.from_numpy(np.ascontiguousarray(cut(numbers(shape), part.slices)), dtype)
    return Parameter(path, tensor, conditional=path.startswith("visual."), part=part)


def arrive(be: Backend, zero: Zero, parameters: Sequence[Parameter], view: Division) -> None:
    """Gradients arrive in the expected order, in another one, of some parameters alone, and not at all."""
    order = [[4, 3, 2, 1, 0], [0, 2, 4, 1, 3], [4, 1], []][view.rank]
    for p in (parameters[i] for i in order):
        p.main_grad = be.ops.from_numpy(gradient_of(view, p.path, p.shape))
        zero.ready(p)
    if order:
        assert parameters[4].main_grad is None, "it was the first bucket and is on its way"


def gradient_of(view: Division, path: str, shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng([view.rank, len(path)]).integers(-8, 8, shape).astype(np.float32)


def summed(views: Sequence[Division], p: Parameter) -> np.ndarray:
    """The rows that one rank owns of what all ranks' gradients add up to."""
    arrived = {0: None, 1: None, 2: ("model.norm.weight", "model.layers.0.self_attn.q_proj.weight"), 3: ()}
    total = np.zeros(p.place.whole, np.float32)
    for view in views:
        only = arrived[view.rank]
        if only is not None and p.path not in only:
            continue
        part = view.part(p.path, p.place.whole)
        (box,) = part.slices.boxes
        total[box.slices] += gradient_of(view, p.path, part.shape)
    copies = views[0].sharing(p.path, p.place.whole).copies
    return cut(total, p.place.slices) / copies


def check_stages(be: Backend) -> None:
    """Exact numbers in a pipeline: each rank has its stages' parameters, or none; a tied embedding is summed over both
    its stages. Nothing is sent before all backward passes."""
    grids = [Mesh(pp=2, dp=2), Mesh(pp=2, tp=2), Mesh(pp=2, cp=2), Mesh(pp=4)]
    for mesh, virtual, dtype in zip(grids, (1, 2, 2, 1), ("float32", "bfloat16") * 2, strict=True):
        stages = Stages.even(1, 4, mesh.pp, virtual)
        first = Division(mesh, Heads(6, 3, 2), vision="shard", stages=stages, tied=True)
        check_pipeline(be, [first.of_rank(rank) for rank in range(mesh.size)], dtype)


def check_pipeline(be: Backend, views: Sequence[Division], dtype: str) -> None:
    rank, shapes = be.collectives.rank, {
        "model.embed_tokens.weight": (9, 4),
        "model.layers.0.self_attn.k_proj.weight": (6, 4),
        "model.layers.3.self_attn.k_proj.weight": (6, 4),
        "model.layers.3.self_attn.o_proj.weight": (4, 12),
        "model.norm.weight": (5,),
    }  # fmt: skip
    held = {path: shape for path, shape in shapes.items() if views[rank].holds(path)}
    parameters = [started(be, views[rank], path, shape, dtype) for path, shape in held.items()]
    zero = Zero(be, views[rank], parameters, bucket=6)
    zero.begin(True)
    for p in reversed(parameters):
        p.main_grad = be.ops.from_numpy(gradient_of(views[rank], p.path, p.shape))
        zero.ready(p)
    assert all(p.main_grad is not None for p in parameters)
    zero.reduce()
    for path, p in zero.owned.items():
        total = np.zeros(p.place.whole, np.float32)
        for view in (view for view in views if view.holds(path)):
            part = view.part(path, p.place.whole)
            (box,) = part.slices.boxes
            total[box.slices] += gradient_of(view, path, part.shape)
        copies = views[rank].sharing(path, p.place.whole).copies
        np.testing.assert_array_equal(be.to_numpy(p.main_grad), cut(total, p.place.slices) / copies)
        be.ops.assign(p.tensor, be.ops.from_numpy(cut(-numbers(p.place.whole), p.place.slices), dtype))
    zero.publish()
    for p in parameters:
        np.testing.assert_array_equal(be.to_numpy(p.tensor), cut(-numbers(p.place.whole), p.place.slices))


def check_traffic(be: Backend) -> None:
    """Where the rows divide evenly a step moves what it must and no more; two small exchanges are all beside."""
    shapes = {"model.embed_tokens.weight": (8, 6), "model.norm.weight": (12,), "lm_head.weight": (4, 3)}
    counted = be.collectives
    for dtype, size in (("float32", 4), ("bfloat16", 2)):
        division = Division(Mesh(dp=4), rank=counted.rank)
        parameters = [started(be, division, path, shape, dtype) for path, shape in shapes.items()]
        zero = Zero(be, division, parameters)
        counted.traffic.clear()
        zero.begin(True)
        zero.reduce()
        zero.publish()
        count = sum(int(np.prod(shape)) for shape in shapes.values())
        assert counted.traffic == {"reduce_scatter": count * 4 * 3 // 4, "all_gather": count * size * 3 // 4}
    tiny, mesh = Tiny(), Mesh(dp=4)
    division = tiny.division(mesh, counted.rank)
    model = tiny.model(be, division)
    trainer = Trainer(model, TokenLoss(be.ops), be, PLAIN, division=division)
    for packs, buckets in ((mixed(), 2), (text(), 1)):  # one of the tower, one of the language model
        counted.calls.clear()
        trainer.step(work(model, deal(packs, 4), division.place("dp")), 1e-3)
        assert counted.calls == {"gather_objects": 2, "reduce_scatter": buckets, "all_gather": buckets}, counted.calls


def check_another_world(be: Backend) -> None:
    """A division over another number of ranks is refused."""
    assert "divided over 2 ranks and the run has 4" in error_of(ConfigError, lambda: Zero(be, Division(Mesh(dp=2)), []))


def error_of(kind: type[Exception], call: Callable[[], Any]) -> str:
    """What the error says that the call raises."""
    try:
        call()
    except kind as error:
        return str(error)
    raise AssertionError(f"no {kind.__name__}")
