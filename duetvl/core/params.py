"""Parameters: a path, a tensor, and how it is trained. The path is the name on disk in the Hugging Face layout."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

Tensor = Any


@dataclass(eq=False)
class Parameter:
    """One tensor of a model.

    `tensor` is in the storage dtype. `main_grad` is float32 and None until a gradient arrives; the optimizer step
    sets it back to None. A `conditional` parameter may go without a gradient in a step (the vision tower when a
    step has no picture).
    """

    path: str
    tensor: Tensor
    trainable: bool = True
    conditional: bool = False
    main_grad: Any = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The tensor's shape."""
        return tuple(self.tensor.shape)


class Weights:
    """A view of flat paths as a tree: `w.layers[3].self_attn.q_proj.weight`.

    Leaves are tensors, or records of what belongs to them. `get` answers None where a leaf is optional, such as a
    bias.
    """

    __slots__ = ("_children",)

    def __init__(self, leaves: Mapping[str, Any]):
        nested: dict[str, dict[str, Any]] = {}
        self._children: dict[str, Any] = {}
        for path, tensor in leaves.items():
            head, _, rest = path.partition(".")
            if rest:
                nested.setdefault(head, {})[rest] = tensor
            else:
                self._children[head] = tensor
        for head, below in nested.items():
            self._children[head] = Weights(below)

    def __getattr__(self, name: str) -> Any:
        try:
            return self._children[name]
        except KeyError:
            raise AttributeError(f"no weight {name!r} here; there are {', '.join(sorted(self._children))}") from None

    def __getitem__(self, index: int) -> Any:
        return self._children[str(index)]

    def get(self, name: str) -> Any | None:
        """The leaf or branch of this name, or None."""
        return self._children.get(name)


def split_trainable(parameters: Iterable[Parameter]) -> tuple[list[Parameter], list[Parameter]]:
    """(trainable, frozen), each in the given order."""
    chosen = list(parameters)
    return [p for p in chosen if p.trainable], [p for p in chosen if not p.trainable]
