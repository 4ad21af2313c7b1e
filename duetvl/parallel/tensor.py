"""Tensor parallelism (Megatron's, arXiv:1909.08053) of a model on one rank: what its tree must know, and its gradients.

How each tensor is cut says the table beside the model (models/qwen_vl/sharding.py). Attention and MLP begin with
column-parallel layers and end with a row-parallel one, whose parts are summed; embedding and vocabulary are cut along
the vocabulary, and no logits are put together for a loss.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from duetvl.core.params import Parameter
from duetvl.core.stages import even_range
from duetvl.models.attention import Attend
from duetvl.models.qwen_vl.sharding import Heads, shard_of
from duetvl.parallel.differentiable import Team, copy_to, gather_from, reduce_from

Tensor = Any

VOCABULARY = ("model.embed_tokens", "lm_head")


@dataclass(frozen=True)
class TensorLayout:
    """A `models.layout.Layout`: the division of a model over the ranks of a team. vocabulary: rows in the whole."""

    team: Team
    heads: Heads
    vocabulary: int

    def records(self, paths: Iterable[str]) -> Mapping[str, Any]:
        """`leave` beside the weight of each row-parallel layer, `shard` beside the vocabulary's matrices."""
        found: dict[str, Any] = {}
        for path in paths:
            module, _, leaf = path.rpartition(".")
            if leaf == "weight" and module in VOCABULARY:
                found[f"{module}.shard"] = VocabularyPart(self.team, self.vocabulary)
            elif leaf == "weight" and shard_of(path).axis == 1 and "lora_" not in path:
                found[f"{module}.leave"] = self._leave
        return found

    def enter(self, x: Tensor) -> Tensor:
        """x; the gradients that the ranks' columns give it are summed."""
        return copy_to(self.team, x)

    def attend(self, attend: Attend) -> Attend:
        """Where this rank's query heads do not fall evenly on its key and value heads, each gets its own copy."""
        spread = self._spread
        if spread is None:
            return attend
        return lambda layer, q, k, v: attend(layer, q, *(self._repeated(x, spread) for x in (k, v)))

    def kv_heads(self, whole: int) -> int:
        """Those that its query heads need, or one for each of these where they do not fall evenly."""
        return len(self._held) if self._spread is None else len(self._spread)

    def _leave(self, x: Tensor) -> Tensor:
        return reduce_from(self.team, x)

    @cached_property
    def _queries(self) -> range:
        return even_range(self.heads.query, self.team.index, self.team.size)

    @property
    def _held(self) -> range:
        """The key heads that one of this rank's query heads needs."""
        group = self.heads.query // self.heads.kv
        return range(self._queries.start // group, -(-self._queries.stop // group))

    @cached_property
    def _spread(self) -> Sequence[int] | None:
        """For each query head of this rank the place among its key heads; None where that is i * G // H anyway."""
        group, held, count = self.heads.query // self.heads.kv, self._held, len(self._queries)
        places = [head // group - held.start for head in self._queries]
        return None if places == [i * len(held) // count for i in range(count)] else places

    def _repeated(self, x: Tensor, places: Sequence[int]) -> Tensor:
        """(T, G, K) -> (T, H, K)"""
        ops = self.team.ops
        heads = ops.take_rows(ops.transpose(x, (1, 0, 2)), ops.from_numpy(np.array(places, np.int32)))
        return ops.transpose(heads, (1, 0, 2))


@dataclass(frozen=True)
class VocabularyPart:
    """A `models.vocabulary.VocabularyShard`: this rank's rows of `whole` ones."""

    team: Team
    whole: int

    def embed(self, weight: Tensor, ids: Tensor) -> Tensor:
        """Rows that are here, zeros for the others, summed over the ranks."""
        ops = self.team.ops
        inside, local = self._local(ids)
        rows = ops.take_rows(weight, local)
        return reduce_from(self.team, rows * ops.cast(inside, ops.dtype_of(rows))[:, None])

    def logits(self, weight: Tensor, hidden: Tensor) -> Tensor:
        """The ranks' logits joined."""
        sizes = [len(even_range(self.whole, rank, self.team.size)) for rank in range(self.team.size)]
        return gather_from(self.team, self.team.ops.linear(copy_to(self.team, hidden), weight), 1, sizes)

    def logprobs(self, weight: Tensor, hidden: Tensor, labels: Tensor) -> Tensor:
        """From each rank's logits of the labels that are its own, and its log of summed exponentials (N,)."""
        ops = self.team.ops
        inside, local = self._local(labels)

        def forward(needs: tuple[bool, ...], h: Tensor, w: Tensor) -> tuple[Tensor, tuple[Any, ...]]:
            logp, lse = ops.linear_logprobs(h, w, local)
            whole = self._joined(lse)
            return self._sum((logp + lse) * ops.cast(inside, "float32")) - whole, (h, w, whole)

        def backward(needs: tuple[bool, ...], kept: tuple[Any, ...], d: Tensor) -> tuple[Any, ...]:
            h, w, whole = kept
            return ops.linear_logprobs_grad(d, h, w, labels - self._rows.start, whole, (needs[0], needs[1]))

        return self.team.autograd.custom_vjp(forward, backward)(copy_to(self.team, hidden), weight)

    @property
    def _rows(self) -> range:
        return even_range(self.whole, self.team.index, self.team.size)

    def _local(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """(1 for tokens that are here and 0 for others, int32; their rows here, row 0 for others)"""
        cast, rows = self.team.ops.cast, self._rows
        inside = cast(ids >= rows.start, "int32") * cast(ids < rows.stop, "int32")
        return inside, (ids - rows.start) * inside

    def _joined(self, lse: Tensor) -> Tensor:
        """log of the sum over the ranks of exp(lse), without overflow."""
        largest = self.team.collectives.all_reduce(lse, self.team.group, "max")
        return largest + self.team.ops.log(self._sum(self.team.ops.exp(lse - largest)))

    def _sum(self, x: Tensor) -> Tensor:
        return self.team.collectives.all_reduce(x, self.team.group)


def sum_partial_gradients(team: Team, heads: Heads, parameters: Iterable[Parameter]) -> None:
    """Add up the main gradients of what several ranks hold and each has computed but a part of.

    These are key and value heads that several ranks hold, A of adapters on column-parallel layers and B on row-parallel
    ones. All ranks call it with the same parameters, once their gradients are complete.
    """
    for parameter in parameters:
        if parameter.main_grad is None:
            continue
        if shard_of(parameter.path).unit == "kv_head":
            parameter.main_grad = _over_copies(team, heads, parameter.main_grad)
        elif is_partial(parameter.path):
            parameter.main_grad = team.collectives.all_reduce(parameter.main_grad, team.group)


def is_partial(path: str) -> bool:
    """Whether every rank has all of a parameter and computes a part of its gradient: the half of an adapter on a
    divided layer that is not divided with it."""
    module, _, leaf = path.removesuffix(".weight").rpartition(".")
    whole = shard_of(path).axis is None
    return whole and leaf in ("lora_A", "lora_B") and shard_of(f"{module}.weight").axis is not None


def _over_copies(team: Team, heads: Heads, gradient: Tensor) -> Tensor:
    """The gradient (heads of this rank * K, ...) of key or value heads, each summed over the ranks that hold it."""
    held = [heads.held("kv_head", rank, team.size) for rank in range(team.size)]
    ranges = [found[0] for found in held if found is not None]
    if sum(map(len, ranges)) == heads.kv:
        return gradient
    ops, own = team.ops, ranges[team.index]
    size = gradient.shape[0] // len(own)
    rest = tuple(gradient.shape[1:])
    before, after = own.start * size, (heads.kv - own.stop) * size
    padded = ops.concat([ops.zeros((before, *rest)), gradient, ops.zeros((after, *rest))], 0)
    return team.collectives.all_reduce(padded, team.group)[before : before + len(own) * size]
