"""The tensors of a tiny run, whole and as any rank of any layout holds them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from duetvl.core.half import narrowed
from duetvl.core.mesh import Mesh
from duetvl.core.optimizer import AdamWState
from duetvl.core.params import Parameter
from duetvl.core.stages import Stages
from duetvl.models.qwen_vl.sharding import Heads
from duetvl.parallel.division import Division, owned_rows
from duetvl.parallel.inventory import Entry, Inventory
from duetvl.storage.checkpoint_format import Meta
from duetvl.training.checkpoints.checkpoint import take_snapshot

HEADS = Heads(14, 2, 4)  # over three ranks: 5, 5 and 4, of which the second needs both key heads
LAYER = "model.layers.0"
SHAPES = {
    "visual.patch_embed.proj.weight": (8, 3, 2, 2, 2),
    "visual.blocks.0.attn.qkv.weight": (24, 8),
    "visual.blocks.0.attn.qkv.bias": (24,),
    "visual.blocks.0.attn.proj.weight": (8, 8),
    "model.embed_tokens.weight": (11, 6),
    f"{LAYER}.self_attn.q_proj.weight": (28, 6),
    f"{LAYER}.self_attn.k_proj.weight": (6, 6),
    f"{LAYER}.self_attn.k_proj.bias": (6,),
    f"{LAYER}.self_attn.v_proj.weight": (6, 6),
    f"{LAYER}.self_attn.o_proj.weight": (6, 28),
    f"{LAYER}.mlp.down_proj.weight": (6, 10),
    f"{LAYER}.mlp.down_proj.lora_A.weight": (2, 10),
    f"{LAYER}.mlp.down_proj.lora_B.weight": (6, 2),
    f"{LAYER}.input_layernorm.weight": (6,),
    "model.layers.1.mlp.up_proj.weight": (10, 6),
    "model.layers.2.self_attn.k_proj.weight": (6, 6),
    "model.norm.weight": (2,),
}
FROZEN = (
    "visual.blocks.0.attn.qkv.weight", "visual.blocks.0.attn.proj.weight", f"{LAYER}.self_attn.k_proj.weight",
    f"{LAYER}.self_attn.k_proj.bias", f"{LAYER}.mlp.down_proj.weight", f"{LAYER}.input_layernorm.weight",
    "model.layers.2.self_attn.k_proj.weight",
)  # fmt: skip
EVEN, ENDS = Stages.even(1, 3, 2), Stages((1, 0, 0, 0), (1, 1, 0, 1))  # ENDS: two virtual stages on each of two ranks
LAYOUTS = {
    "one process": Division(),
    "dp 2 x tp 2": Division(Mesh(dp=2, tp=2), HEADS),
    "dp 3": Division(Mesh(dp=3), HEADS),
    "dp 2": Division(Mesh(dp=2), HEADS),
    "tp 3": Division(Mesh(tp=3), HEADS, vision="shard"),
    "tp 4 with sequence": Division(Mesh(tp=4), HEADS, sequence=True, vision="shard"),
    "dp 2 x tp 3": Division(Mesh(dp=2, tp=3), HEADS),
    "dp 16": Division(Mesh(dp=16), HEADS),
    "dp 2 x cp 2": Division(Mesh(dp=2, cp=2), HEADS),
    "dp 3, zero 3": Division(Mesh(dp=3), HEADS, zero=3),
    "dp 2 x tp 3, zero 3": Division(Mesh(dp=2, tp=3), HEADS, zero=3),
    "dp 2 x cp 2, zero 3": Division(Mesh(dp=2, cp=2), HEADS, vision="shard", zero=3),
    "cp 2 x tp 3": Division(Mesh(cp=2, tp=3), HEADS, vision="shard"),
    "pp 2": Division(Mesh(pp=2), HEADS, stages=EVEN),
    "pp 2 tied": Division(Mesh(pp=2), HEADS, stages=EVEN, tied=True),
    "pp 2 x tp 3 tied": Division(Mesh(pp=2, tp=3), HEADS, stages=EVEN, tied=True),
    "pp 2 x dp 2 in virtual stages": Division(Mesh(pp=2, dp=2), HEADS, stages=ENDS),
    "pp 2 x cp 2 tied in virtual stages": Division(Mesh(pp=2, cp=2), HEADS, stages=ENDS, tied=True),
    "pp 4 with empty stages": Division(Mesh(pp=4), HEADS, stages=Stages((1, 0, 0, 0), (0, 2, 0, 1)), tied=True),
}


@dataclass
class State:
    """What one rank has."""

    parameters: list[Parameter]
    owned: dict[str, Parameter]
    optimizer: AdamWState
    everything: Inventory

    def tensors(self):
        """(kind, path, part, tensor) of all that is read."""
        for p in self.parameters:
            yield "weights", p.path, p.place, p.tensor
        for path, p in self.owned.items():
            yield "weights", path, p.place, p.tensor
            for kind, slot in self.optimizer.slots().items():
                if path in slot:
                    yield kind, path, p.place, slot[path]


def whole(seed, half=False):
    """Every number of the run by kind and path, float32 as arrays; the weights' bits where they are bfloat16."""
    random = np.random.default_rng(seed)
    kinds = ("weights", "exp_avg", "exp_avg_sq", "master") if half else ("weights", "exp_avg", "exp_avg_sq")
    found = {kind: {p: random.standard_normal(s).astype(np.float32) for p, s in SHAPES.items()} for kind in kinds}
    if half:
        found["weights"] = {path: narrowed(x, "bfloat16") for path, x in found["master"].items()}
    return found


def cut(array, part):
    """The part of a whole array."""
    return np.ascontiguousarray(np.concatenate([array[box.slices] for box in part.slices.boxes], part.slices.axis))


def held(division, numbers, make=np.array, seed=0):
    """The state of a rank, of `numbers` as `whole` gives them; `make` makes a tensor of an array's bits."""
    parameters, owned, state = [], {}, AdamWState()
    dtype = "bfloat16" if "master" in numbers else "float32"
    everything = {path: Entry(shape, dtype, path not in FROZEN) for path, shape in SHAPES.items()}
    for path, shape in ((path, shape) for path, shape in SHAPES.items() if division.holds(path)):
        part = division.part(path, shape)
        p = Parameter(path, make(cut(numbers["weights"][path], part)), trainable=path not in FROZEN)
        p.part = None if division.mesh.size == 1 else part
        parameters.append(p)
        mine = rows_of(division, p, numbers, make) if p.trainable else None
        if mine is not None:
            owned[path], state.step[path] = mine, seed
            for kind, slot in state.slots().items():
                if kind in numbers:
                    slot[path] = make(cut(numbers[kind][path], mine.place))
    return State(parameters, owned, state, everything)


def rows_of(division, p, numbers, make):
    """The rows of a trained parameter that a rank updates: the parameter itself where it is alone, or none."""
    sharing = division.sharing(p.path, SHAPES[p.path])
    team = division.team(sharing.axes)
    if len(team) == 1:
        return p
    rows = owned_rows(sharing.unit.shape[0], len(team), p.path)[team.index(division.rank)]
    part = sharing.unit.rows(rows.start, rows.stop)
    return Parameter(p.path, make(cut(numbers["weights"][p.path], part)), part=part) if len(rows) else None


def snapshot(state, division, backend, step=7, copy=False):
    return take_snapshot(
        step=step,
        parameters=state.parameters,
        owned=state.owned,
        optimizer_state=state.optimizer,
        division=division,
        everything=state.everything,
        meta=Meta(recipe={"written by": step}),
        backend=backend,
        copy=copy,
    )


def ranks_of(division):
    """The division as each rank sees it."""
    return [division.of_rank(rank) for rank in range(division.mesh.size)]
