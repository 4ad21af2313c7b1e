"""Parameters: a path, a tensor, and how it is trained. The path is the name on disk in the Hugging Face layout."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from duetvl.core.boxes import LocalPart

Tensor = Any


@dataclass(eq=False)
class Parameter:
    """One tensor of a model.

    `tensor` is in the storage dtype. `main_grad` is float32 and None until a gradient arrives; the optimizer step
    sets it back to None. A `conditional` parameter may go without a gradient in a step (the vision tower when a
    step has no picture). `part` says which part of a tensor that is divided over ranks it is; None: it is the whole.
    """

    path: str
    tensor: Tensor
    trainable: bool = True
    conditional: bool = False
    main_grad: Any = None
    part: LocalPart | None = None

    @classmethod
    def of(cls, path: str, tensor: Tensor, part: LocalPart) -> Parameter:
        """One whose tensor is this part of the whole, or all of it."""
        return cls(path, tensor, part=None if part.is_all else part)

    @property
    def shape(self) -> tuple[int, ...]:
        """The tensor's shape."""
        return tuple(self.tensor.shape)

    @property
    def place(self) -> LocalPart:
        """Which part it is, where it is the whole too."""
        return self.part or LocalPart.all_of(self.shape)


class Weights:
    """A view of flat paths as a tree: `w.layers[3].self_attn.q_proj.weight`.

    Leaves are tensors, or records of what belongs to them; each is looked up in `leaves` when it is used. An item, as
    `w.layers[3]`, is a block: all its leaves are looked up when it is taken, before anything of the block is computed
    (`Leaves` in core/autograd.py says why). `get` answers None where a leaf is optional, such as a bias.
    """

    __slots__ = ("_children", "_leaves")

    def __init__(self, leaves: Mapping[str, Any], prefix: str = "", below: Iterable[str] | None = None):
        """The leaves whose paths begin with `prefix`, the rest of which is `below` (by default: all of them)."""
        nested: dict[str, list[str]] = {}
        self._leaves = leaves
        self._children: dict[str, str | Weights] = {}
        for path in leaves if below is None else below:
            head, _, rest = path.partition(".")
            if rest:
                nested.setdefault(head, []).append(rest)
            else:
                self._children[head] = prefix + head
        for head, rests in nested.items():
            self._children[head] = Weights(leaves, f"{prefix}{head}.", rests)

    def __getattr__(self, name: str) -> Any:
        found = self.get(name)
        if found is None:
            raise AttributeError(f"no weight {name!r} here; there are {', '.join(sorted(self._children))}")
        return found

    def __getitem__(self, index: int) -> Any:
        block = self._children[str(index)]
        assert isinstance(block, Weights)
        return block.taken()

    def get(self, name: str) -> Any | None:
        """The leaf or branch of this name, or None."""
        child = self._children.get(name)
        return self._leaves[child] if isinstance(child, str) else child

    @property
    def leaves(self) -> Mapping[str, Any]:
        """All leaves of the tree that this is a branch of, by their whole paths."""
        return self._leaves

    def taken(self) -> Weights:
        """This branch as a block."""
        for child in self._children.values():
            if isinstance(child, str):
                self._leaves[child]
            else:
                child.taken()
        return self

    def over(self, leaves: Mapping[str, Any]) -> Weights:
        """The same branch, in which these leaves, by their whole paths, stand in the place of its own."""
        return self._on(ChainMap(leaves, self._leaves))  # type: ignore[arg-type]  # it is never written to

    def _on(self, leaves: Mapping[str, Any]) -> Weights:
        branch = Weights(leaves, below=())
        branch._children = {n: c if isinstance(c, str) else c._on(leaves) for n, c in self._children.items()}
        return branch


def split_trainable(parameters: Iterable[Parameter]) -> tuple[list[Parameter], list[Parameter]]:
    """(trainable, frozen), each in the given order."""
    chosen = list(parameters)
    return [p for p in chosen if p.trainable], [p for p in chosen if not p.trainable]
