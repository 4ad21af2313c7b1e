"""Training steps of a tiny model over several ranks, compared with those of one process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from duetvl.core.backend import Backend
from duetvl.core.batch import IGNORE, Batch, Sample
from duetvl.core.boxes import Slices
from duetvl.core.collectives import Collectives, Group, Pending
from duetvl.core.composed import ComposedCollectives
from duetvl.core.mesh import Mesh
from duetvl.core.params import Parameter
from duetvl.core.random import philox
from duetvl.data.loading.loader import Step
from duetvl.models.lora import Adapters, Size
from duetvl.models.qwen_vl.config import ModelConfig
from duetvl.models.qwen_vl.model import QwenVL
from duetvl.models.qwen_vl.parameters import parameter_shapes
from duetvl.models.qwen_vl.sharding import Heads
from duetvl.parallel.differentiable import Team
from duetvl.parallel.division import Division
from duetvl.parallel.tensor import TensorLayout
from duetvl.training.objective import TokenLoss
from duetvl.training.recipe.sections import OptimSection
from duetvl.training.step import StepResult, Trainer

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
        self.rank, self.size, self.traffic = world.rank, count, world.traffic
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

    def reduce_scatter_later(self, x: Any, group: Group = None, sizes: Sequence[int] | None = None) -> Pending:
        return self.world.reduce_scatter_later(x, group or self.everyone, sizes)

    def gather_objects(self, value: Any, group: Group = None) -> list[Any]:
        return self.world.gather_objects(value, group or self.everyone)


def first_ranks(be: Backend, count: int) -> Backend | None:
    """The backend of a run of the first `count` ranks of the world; None on the others. All ranks call it."""
    some = Some(be.collectives, count)
    return replace(be, collectives=some) if be.collectives.rank < count else None


# -- a model and its packs ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tiny:
    """A tiny model: its family, its heads of queries and of keys, the dtype of its weights, whether it has adapters."""

    family: str = "qwen2_vl"
    heads: int = 4
    kv_heads: int = 2
    dtype: str = "float32"
    lora: bool = False

    def config(self) -> ModelConfig:
        return ModelConfig.from_dict(
            {
                "model_type": self.family, "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 50,
                "num_hidden_layers": 1, "num_attention_heads": self.heads, "num_key_value_heads": self.kv_heads,
                "rms_norm_eps": 1e-6, "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 16 // self.heads - 2]},
                "tie_word_embeddings": self.family == "qwen2_5_vl", "vision_start_token_id": START,
                "vision_end_token_id": END, "image_token_id": IMAGE, "video_token_id": 90,
                "vision_config": VISION[self.family],
            }
        )  # fmt: skip

    def division(self, mesh: Mesh, rank: int) -> Division:
        config = self.config()
        heads = Heads(config.text.num_heads, config.text.num_kv_heads, config.vision.num_heads)
        return Division(mesh, heads, rank, vision="shard")

    def model(self, be: Backend, division: Division) -> QwenVL:
        """What this rank has of it."""
        given, shapes = self.config(), dict(parameter_shapes(self.config()))

        def parameter(path: str, shape: tuple[int, ...], dtype: str) -> Parameter:
            array = philox(3, path).standard_normal(shape, dtype=np.float32)
            array = array / np.float32(np.sqrt(np.prod(shape[1:]))) if len(shape) > 1 else 1 + array * np.float32(0.1)
            part = division.part(path, shape)
            tensor = be.ops.from_numpy(np.ascontiguousarray(cut(array, part.slices), np.float32), dtype)
            return Parameter(path, tensor, part=part)

        model = QwenVL(given, be, {path: parameter(path, shape, self.dtype) for path, shape in shapes.items()})
        if self.lora:
            adapters = Adapters({module: Size(3, 6.0) for module in ADAPTED}, dropout=0.0)
            own = {path: parameter(path, shape, "float32") for path, shape in adapters.shapes(shapes).items()}
            model.put_adapters(adapters, {path: p.tensor for path, p in own.items()})
            for path, p in own.items():
                model.parameters[path].part = p.part
        if division.mesh.tp > 1:
            team = Team.of(be, division.mesh.groups("tp"))
            model.layout = TensorLayout(team, division.heads, VOCABULARY)
        return model


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


Packs = Sequence[Sequence[Sample]]
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

    name, factor = "", 1.0

    def prepare(self, batch: Batch, reference: Any = None) -> Any:
        prepared = super().prepare(batch, reference)
        return replace(prepared, scale=prepared.scale * (self.factor if self.name in batch.sample_ids else 1.0))


class Observed(Trainer):
    """Keeps what is known of gradients just before an update: those of the first step."""

    gradients: dict[str, np.ndarray] | None = None

    def _update(self, lr: float, norm: float, scale: float) -> None:
        if self.gradients is None:
            held = {path: p for path, p in self.owned.items() if p.main_grad is not None}
            self.gradients = {path: np.array(self.backend.to_numpy(p.main_grad)) for path, p in held.items()}
        super()._update(lr, norm, scale)


@dataclass
class Trained:
    trainer: Observed
    results: list[StepResult | None]

    def weight(self, path: str) -> np.ndarray:
        return np.array(self.trainer.backend.to_numpy(self.trainer.model.parameters[path].tensor), np.float32)


def train(
    be: Backend, tiny: Tiny, mesh: Mesh, schedule: Sequence[Dealt], optim: OptimSection = PLAIN,
    objective: Callable[[Any], TokenLoss] = TokenLoss, **how: Any,
) -> Trained:  # fmt: skip
    """The steps of a schedule on this rank of a run."""
    division = tiny.division(mesh, be.collectives.rank)
    model = tiny.model(be, division)
    trainer = Observed(model, objective(be.ops), be, optim, division=division, **how)
    place = None if mesh.size == 1 else division.place("dp")
    results = [trainer.step(work(model, dealt, place), optim.lr, number) for number, dealt in enumerate(schedule)]
    return Trained(trainer, results)


def compared(
    be: Backend, tiny: Tiny, mesh: Mesh, schedule: Sequence[Dealt], optim: OptimSection = PLAIN,
    tolerance: float = 1e-5, **how: Any,
) -> tuple[Trained, Trained] | None:  # fmt: skip
    """(one process, this rank) after the same steps, whose losses and first gradients are equal. None on other ranks.

    How much they may differ: losses and gradients by `tolerance`, weights by a tenth of it.
    """
    run = first_ranks(be, mesh.size)
    if run is None:
        return None
    whole = train(alone(be), tiny, Mesh(), schedule, optim, **how)
    part = train(run, tiny, mesh, schedule, optim, **how)
    for one, other in zip(whole.results, part.results, strict=True):
        assert (one is None) == (other is None), (one, other)
        if one is not None and other is not None:
            assert one.skipped == other.skipped, (one.skipped, other.skipped)
            for a, b in ((one.loss, other.loss), (one.grad_norm, other.grad_norm)):
                assert a == b or abs(a - b) <= tolerance * abs(a) or not np.isfinite([a, b]).any(), (a, b)
    check_gradients(whole, part, tolerance)
    check_weights(whole, part, tolerance / 10)
    return whole, part


def check_gradients(whole: Trained, part: Trained, tolerance: float) -> None:
    """The rows that this rank owns have their rows of one process's gradient."""
    expected, found = whole.trainer.gradients or {}, part.trainer.gradients or {}
    total = np.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in expected.values()))
    owned = part.trainer.owned
    assert found.keys() == expected.keys() & owned.keys()
    for path, gradient in found.items():
        mine = cut(expected[path], owned[path].place.slices)
        allowed = tolerance * max(float(np.linalg.norm(mine)), 1e-3 * total)
        assert gradient.shape == mine.shape, (path, gradient.shape, mine.shape)
        assert np.linalg.norm(gradient - mine) <= allowed, (path, np.abs(gradient - mine).max(), allowed)


def check_weights(whole: Trained, part: Trained, tolerance: float) -> None:
    for path, p in part.trainer.model.parameters.items():
        mine = cut(whole.weight(path), p.place.slices)
        allowed = tolerance * np.linalg.norm(mine)
        found = part.weight(path)
        assert np.linalg.norm(found - mine) <= allowed, (path, np.abs(found - mine).max(), allowed)


def same_state(whole: Trained, part: Trained) -> None:
    """Moments, masters and numbers of updates of the owned rows are bit for bit those of one process."""
    ours, theirs, owned = part.trainer.state, whole.trainer.state, part.trainer.owned
    to_numpy = part.trainer.backend.to_numpy
    assert ours.step == {path: theirs.step[path] for path in owned}
    for kind, slots in ours.slots().items():
        assert slots.keys() == theirs.slots()[kind].keys() & owned.keys(), kind
        for path, tensor in slots.items():
            wanted = cut(np.array(to_numpy(theirs.slots()[kind][path])), owned[path].place.slices)
            np.testing.assert_array_equal(to_numpy(tensor), wanted, err_msg=f"{kind} of {path}")
