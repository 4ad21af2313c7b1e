"""A tiny model whole and divided over ranks, with the same weights and batches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np

from duetvl.core.backend import Backend
from duetvl.core.batch import IGNORE, Batch, Pair, Sample
from duetvl.core.kv_cache import Append
from duetvl.core.mesh import Mesh
from duetvl.core.params import Parameter
from duetvl.core.random import philox
from duetvl.models.layout import UNDIVIDED, Layout
from duetvl.models.lora import MAGNITUDE, Adapters, Size, is_adapter
from duetvl.models.qwen_vl.adapters import add_adapters, layers, load_adapter, open_adapter_for, save_adapter
from duetvl.models.qwen_vl.config import ModelConfig
from duetvl.models.qwen_vl.model import QwenVL
from duetvl.models.qwen_vl.parameters import parameter_shapes
from duetvl.models.recompute import RecomputeMode
from duetvl.models.vocabulary import LastStage
from duetvl.parallel.context import Context
from duetvl.parallel.differentiable import Team
from duetvl.parallel.division import Division
from duetvl.parallel.tensor import RankLayout
from duetvl.training.objective import Objective, TokenLoss
from duetvl.training.preference.dpo import PreferenceObjective
from duetvl.training.recipe.sections import DpoSection

VOCABULARY = 99  # no number of ranks divides it
VIDEO, IMAGE, START, END = 90, 91, 92, 93
HEAD = 8
VISION = {
    "qwen2_vl": {"depth": 2, "embed_dim": 32, "mlp_ratio": 2, "num_heads": 4},
    "qwen2_5_vl": {
        "depth": 2, "hidden_size": 32, "intermediate_size": 42, "num_heads": 4, "tokens_per_second": 2,
        "fullatt_block_indexes": [1], "window_size": 112,
    },
}  # fmt: skip
KEY = (3, 1, 4)
DORA = Adapters({}, dropout=0.3, dora=True)
Kind = Literal["full", "lora", "dora"]
Loss = Literal["sample", "ipo", "sigmoid"]


@dataclass(frozen=True)
class Whole:
    """A model on one rank: its family, heads of queries and of keys, what is trained, and what is frozen."""

    family: str
    heads: int
    kv_heads: int
    kind: Kind = "full"
    freeze: tuple[str, ...] = ()

    def config(self) -> ModelConfig:
        width = self.heads * HEAD
        wide = {"qwen2_vl": "hidden_size", "qwen2_5_vl": "out_hidden_size"}[self.family]
        return ModelConfig.from_dict(
            {
                "model_type": self.family, "vocab_size": VOCABULARY, "hidden_size": width, "intermediate_size": 50,
                "num_hidden_layers": 2, "num_attention_heads": self.heads, "num_key_value_heads": self.kv_heads,
                "rms_norm_eps": 1e-6, "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, HEAD // 2 - 2]},
                "tie_word_embeddings": self.family == "qwen2_5_vl", "vision_start_token_id": START,
                "vision_end_token_id": END, "image_token_id": IMAGE, "video_token_id": VIDEO,
                "vision_config": VISION[self.family] | {wide: width},
            }
        )  # fmt: skip

    def adapters(self) -> Adapters | None:
        """On linear layers of every kind: all of the first block of each tower, and the merger's."""
        if self.kind == "full":
            return None
        sizes = {module: Size(3, 0.6) for module in layers(self.config()).modules if ".1." not in module}
        return replace(DORA, sizes=sizes, dora=self.kind == "dora")


def values(path: str, shape: tuple[int, ...]) -> np.ndarray:
    array = philox(3, path).standard_normal(shape, dtype=np.float32)
    if path.endswith(MAGNITUDE):
        return 1 + 0.1 * np.abs(array)
    return array / np.float32(np.sqrt(np.prod(shape[1:]))) if len(shape) > 1 else 1 + array * np.float32(0.1)


def model_of(be: Backend, of: Whole, layout: Layout = UNDIVIDED) -> QwenVL:
    """The model, or the part of it that this rank has."""
    given, own = of.config(), of.adapters()
    shapes = dict(parameter_shapes(given))

    def parameter(path: str, shape: tuple[int, ...]) -> Parameter:
        part = layout.part(path, shape)
        return Parameter.of(path, be.ops.from_numpy(np.array(part.of(values(path, shape)), np.float32)), part)

    model = QwenVL(given, be, {path: parameter(path, shape) for path, shape in shapes.items()})
    model.layout = layout
    if own is not None:
        model.put_adapters(own, {path: parameter(path, shape) for path, shape in own.shapes(shapes).items()})
    model.freeze(of.freeze)
    return model


# -- batches -----------------------------------------------------------------------------------------------------------


def sample(seed: int, text: int, image: tuple[int, ...] | None = None, video: tuple[int, ...] | None = None) -> Sample:
    """A picture, a video, and so many tokens of text, of which all but the first two are trained."""
    rng = np.random.default_rng(seed)
    ids, media = [], {}
    for token, grid, rows, grids in (
        (IMAGE, image, "pixel_values", "image_grid_thw"),
        (VIDEO, video, "pixel_values_videos", "video_grid_thw"),
    ):
        if grid:
            ids += [START, *[token] * (np.prod(grid) // 4), END]
            media |= {rows: rng.standard_normal((np.prod(grid), 1176)).astype(np.float32), grids: np.array([grid])}
    tokens = np.array([*ids, *rng.integers(0, 90, text)])
    labels = np.where(np.arange(len(tokens)) >= len(ids) + 2, tokens, IGNORE)
    return Sample(tokens, labels, id=f"s{seed}", **media)


@cache
def packs() -> list[list[Sample | Pair]]:
    """Pictures of different sizes, a video and text; no picture; one frame for all ranks, which two answers share;
    fewer rows than ranks; and pairs."""
    mixed = [sample(1, 9, (1, 8, 12), (3, 4, 4)), sample(2, 7), sample(3, 5, (1, 4, 6)), sample(4, 6, (1, 10, 4))]
    pairs = [pair(sample(8, 9, (1, 4, 6))), pair(sample(9, 5))]
    return [mixed, [sample(5, 11)], [pair(sample(6, 4, (1, 4, 4)))], [sample(7, 3)], pairs]


def pair(chosen: Sample) -> Pair:
    """Another answer to the same picture, one token longer."""
    ids = np.append(chosen.input_ids[:-1], [11, 12])
    labels = np.append(chosen.labels[:-1], [11, 12])
    return Pair(chosen, Sample(ids, labels, image_grid_thw=chosen.image_grid_thw, id=chosen.id))


# -- what a model gives ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Given:
    """The packs' losses and the gradients of all of them together; in evaluation, the loss and logits of the first pack
    and the log-probabilities of the last."""

    losses: list[float]
    evaluated: float
    logits: np.ndarray
    logprobs: np.ndarray
    gradients: dict[str, np.ndarray | None]


def run(be: Backend, model: QwenVL, chosen: list[list[Sample | Pair]], loss: Loss = "sample") -> Given:
    """Forward and backward of the packs as micro-batches of a step, with dropout."""
    objective, losses = objective_of(be, loss), []
    batches = [model.pack(samples) for samples in chosen]
    lasts = [last_of(be, objective, model, batch) for batch in batches]
    for number, batch in enumerate(batches):
        (found, *logged), tape = model.forward(batch, lasts[number], key=(*KEY, number))
        one = be.ops.from_numpy(np.array(1, np.float32))
        be.autograd.backward(tape, [one, *[None] * len(logged)], last=number == len(batches) - 1)
        losses.append(total(be, objective, model.layout, found))
    trained = [p for p in model.parameters.values() if p.trainable]
    return Given(
        losses,
        total(be, objective, model.layout, model.evaluate(batches[0], lasts[0])[0]),
        array(be, model.logits(batches[0])),
        array(be, model.logprobs(batches[-1])),
        {p.path: None if p.main_grad is None else array(be, p.main_grad) for p in trained},
    )


def objective_of(be: Backend, loss: Loss) -> Objective:
    """Samples' means, which have weights, or a loss of pairs."""
    if loss == "sample":
        return TokenLoss(be.ops, "sample")
    return PreferenceObjective(DpoSection(loss=loss, beta=0.3, pref_ftx=0.2), be)


def last_of(be: Backend, objective: Objective, model: QwenVL, batch: Batch) -> LastStage:
    """The objective's, which compares with a reference that says the same of every answer."""
    reference = be.ops.from_numpy(np.full(len(batch.cu_seqlens) - 1, -9, np.float32))
    return partial(objective.loss, prepared=objective.prepare(batch, reference, model.trained(batch)))


def total(be: Backend, objective: Objective, layout: Layout, loss: Any) -> float:
    """The loss of a batch, of which each rank along `cp` may have a part."""
    parts = isinstance(layout, RankLayout) and objective.adds_up
    return float(be.to_numpy(be.collectives.all_reduce(loss[None], layout.context.team.group)[0] if parts else loss))


def array(be: Backend, x: Any) -> np.ndarray:
    return np.array(be.to_numpy(x))


@cache
def expected(be: Backend, of: Whole, chosen: tuple[int, ...], loss: Loss) -> Given:
    """What the whole model gives of these packs."""
    return run(be, model_of(be, of), [packs()[number] for number in chosen], loss)


def complete(be: Backend, layout: Layout, path: str, whole: tuple[int, ...], own: np.ndarray | None) -> Any:
    """The unit that the ranks hold of a parameter, and its gradient: their parts summed as `Division.sharing` says."""
    part = layout.part(path, whole)
    if own is None:
        own = np.zeros(part.shape, np.float32)
    assert own.shape == part.shape, (path, own.shape, part.shape)
    if not isinstance(layout, RankLayout):
        return part, own
    sharing = layout.division.sharing(path, whole)
    rows = np.zeros(sharing.unit.shape, np.float32)
    rows[sharing.first : sharing.first + len(own)] = own
    total = be.ops.from_numpy(rows)
    for axis, team in (("cp", layout.context.team), ("tp", layout.team)):
        if axis in sharing.axes:
            total = be.collectives.all_reduce(total, team.group)
    return sharing.unit, array(be, total) / sharing.copies


def close(found: float, wanted: float) -> bool:
    return abs(found - wanted) <= 1e-5 * abs(wanted)


def check(
    be: Backend, of: Whole, mesh: Mesh, *, recompute: RecomputeMode = "none",
    chosen: tuple[int, ...] = (0, 1, 2, 3), loss: Loss = "sample", **how: Any,
) -> None:  # fmt: skip
    """Losses, gradients, log-probabilities and logits of the parts are those of the whole."""
    layout = layout_over(be, of, mesh, **how)
    part, wanted = model_of(be, of, layout), expected(be, of, chosen, loss)
    part.recompute = recompute
    found = run(be, part, [packs()[number] for number in chosen], loss)
    assert all(map(close, found.losses, wanted.losses)), (found.losses, wanted.losses)
    assert close(found.evaluated, wanted.evaluated), (found.evaluated, wanted.evaluated)
    np.testing.assert_allclose(found.logits, wanted.logits, rtol=0, atol=3e-5)
    np.testing.assert_allclose(found.logprobs, wanted.logprobs, rtol=0, atol=3e-5)
    check_gradients(be, layout, found, wanted)


def layout_over(be: Backend, of: Whole, mesh: Mesh, **how: Any) -> Layout:
    """This rank's of `parallel.tensor.layout_of`, where the ranks behind those of the mesh are alone."""
    alone = [[rank] for rank in range(mesh.size, be.collectives.size)]
    division = Division.of(of.config(), mesh, min(be.collectives.rank, mesh.size - 1), **how)
    team = Team.of(be, [*mesh.groups("tp"), *alone])
    context = Context.of(be, [*mesh.groups("cp"), *alone], division.ulysses)
    return UNDIVIDED if be.collectives.rank >= mesh.size else RankLayout(division, team, context)


def check_gradients(be: Backend, layout: Layout, found: Given, wanted: Given) -> None:
    assert list(found.gradients) == list(wanted.gradients)
    total = np.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in wanted.gradients.values()))
    for path, gradient in wanted.gradients.items():
        unit, mine = complete(be, layout, path, gradient.shape, found.gradients[path])
        theirs = unit.of(gradient)
        # In exact arithmetic the softmax does not feel a key's bias: its gradient is rounding, here and in the whole.
        floor = 2e-3 if path.endswith("k_proj.bias") else 1e-3
        allowed = 1e-5 * max(float(np.linalg.norm(theirs)), floor * total)
        off = float(np.linalg.norm(mine - theirs))
        assert off < allowed, (path, off, allowed, float(np.linalg.norm(theirs)), float(np.linalg.norm(mine)))


# -- adapters ----------------------------------------------------------------------------------------------------------


def check_adapters(be: Backend, of: Whole, mesh: Mesh, **how: Any) -> None:
    """They start and are read from PEFT's files as the cut of those of one process; without them the model is plain."""
    whole, part = model_of(be, of), model_of(be, of, layout_over(be, of, mesh, **how))
    plain = part.logprobs(part.pack(packs()[0]))
    for model in (whole, part):
        add_adapters(model, replace(DORA, sizes={module: Size(3, 0.6) for module in layers(of.config()).modules}), 5)
    for path, mine, theirs in cut_alike(be, part, whole):
        np.testing.assert_allclose(mine, theirs, rtol=1e-6 if path.endswith(MAGNITUDE) else 0, err_msg=path)
    for path, parameter in whole.parameters.items():
        if is_adapter(path):
            be.ops.assign(parameter.tensor, be.ops.from_numpy(values(path, parameter.shape)))
    with TemporaryDirectory() as place:
        save_adapter(whole, Path(place) / "adapter")
        load_adapter(part, open_adapter_for(of.config(), Path(place) / "adapter"))
    for path, mine, theirs in cut_alike(be, part, whole):
        np.testing.assert_array_equal(mine, theirs, err_msg=path)
    reference = array(be, part.without_adapters().logprobs(part.pack(packs()[0])))
    np.testing.assert_allclose(reference, array(be, plain), rtol=1e-6)
    same = be.collectives.gather_objects(reference.tobytes(), part.layout.team.group)
    assert len(set(same)) == 1  # on all ranks


def cut_alike(be: Backend, part: QwenVL, whole: QwenVL) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Path, what the rank has and what it should have, of each tensor of the adapters."""
    for path, parameter in part.parameters.items():
        if is_adapter(path):
            shape = whole.parameters[path].shape
            assert parameter.place == part.layout.part(path, shape), path
            yield path, array(be, parameter.tensor), parameter.place.of(array(be, whole.parameters[path].tensor))


# -- generation --------------------------------------------------------------------------------------------------------


def check_cache(be: Backend, of: Whole, mesh: Mesh, **how: Any) -> None:
    """A prompt with pictures and one without, then one more token of each, give the logits of the whole model."""
    whole = model_of(be, of)
    part = model_of(be, of, layout_over(be, of, mesh, **how))
    for mine, theirs in zip(grown(be, part), grown(be, whole), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=3e-5)


def grown(be: Backend, model: QwenVL) -> list[np.ndarray]:
    prompts = model.pack(packs()[0][:2])
    lengths = np.diff(prompts.cu_seqlens)
    blocks = -(-int(lengths.max() + 1) // be.kv_cache.block_size)
    tables = np.arange(2 * blocks, dtype=np.int32).reshape(2, blocks)
    features = model.features(prompts)
    with_cache, one = model.create_cache(2 * blocks), np.ones_like(lengths)
    first = model.extend(prompts, features, with_cache, Append(tables, np.zeros_like(lengths), lengths))
    new = Batch.of_tokens(np.array([5, 7]), np.tile(lengths, (3, 1)).astype(np.int32), one)
    second = model.extend(new, None, with_cache, Append(tables, lengths, one))
    return [array(be, x) for x in (features, first, second)]
