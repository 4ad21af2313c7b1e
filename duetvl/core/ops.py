"""Protocol of the tensor functions. A method's docstring is its specification; backends are tested against it.

A tensor is the framework's own. Above the seam it has `+ - * /`, unary minus, comparisons, basic slices,
`.shape` and `.ndim`; everything else is one of these functions. They never write to an argument, except the two
mutators at the end. dtypes are named by strings: float32, bfloat16, float16, int32, int64, bool. There is no
promotion: both sides of an arithmetic operation have one dtype, `cast` changes it.

A dtype in the backend's `capabilities.storage_only` is for weights: these functions take it and compute in float32,
but a tensor's own arithmetic and slices need not work, nor be differentiable, in it.

Shapes in this file: T rows (tokens or patches), D width, H heads, K head size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from duetvl.core.errors import BackendError
from duetvl.core.spans import Spans

Tensor = Any


class Ops(Protocol):
    """Every function differentiates with respect to its floating-point tensor arguments unless it says otherwise."""

    # -- creation and conversion -----------------------------------------------------------------------------------

    def from_numpy(self, array: np.ndarray, dtype: str | None = None) -> Tensor:
        """A tensor on the backend's device holding `array`, cast to `dtype` if given.

        The tensor may share the array's memory: do not write to the array afterwards.
        """
        ...

    def to_numpy(self, x: Tensor) -> np.ndarray:
        """The values on the host, bfloat16 widened to float32. May share the tensor's memory: read only."""
        ...

    def dtype_of(self, x: Tensor) -> str:
        """The dtype's name, such as "float32"."""
        ...

    def cast(self, x: Tensor, dtype: str) -> Tensor:
        """`x` in `dtype`; `x` itself where it has it already. Gradient: cast back."""
        ...

    def zeros(self, shape: Sequence[int], dtype: str = "float32") -> Tensor:
        """Zeros, not differentiable."""
        ...

    # -- element by element ----------------------------------------------------------------------------------------

    def exp(self, x: Tensor) -> Tensor: ...

    def log(self, x: Tensor) -> Tensor: ...

    def rsqrt(self, x: Tensor) -> Tensor:
        """1 / sqrt(x)"""
        ...

    def sigmoid(self, x: Tensor) -> Tensor: ...

    def silu(self, x: Tensor) -> Tensor:
        """x * sigmoid(x)"""
        ...

    def gelu(self, x: Tensor) -> Tensor:
        """x * Phi(x) with the exact normal distribution, not the tanh approximation."""
        ...

    def quick_gelu(self, x: Tensor) -> Tensor:
        """x * sigmoid(1.702 x)"""
        ...

    def where(self, condition: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """`a` where the bool `condition` holds, else `b`; all of one shape. Gradient: to a and b."""
        ...

    # -- reductions ------------------------------------------------------------------------------------------------

    def sum(self, x: Tensor, axis: int | None = None, keepdims: bool = False) -> Tensor:
        """Sum over one axis, or of everything (a 0-d tensor)."""
        ...

    def mean(self, x: Tensor, axis: int, keepdims: bool = False) -> Tensor:
        """Mean over one axis."""
        ...

    def max(self, x: Tensor, axis: int, keepdims: bool = False) -> Tensor:
        """Largest value along one axis. Not differentiable."""
        ...

    def argmax(self, x: Tensor, axis: int) -> Tensor:
        """Index of the largest value along one axis, the first of equals. Not differentiable."""
        ...

    # -- shape -----------------------------------------------------------------------------------------------------

    def reshape(self, x: Tensor, shape: Sequence[int]) -> Tensor:
        """Same numbers in row-major order, other shape; one size may be -1."""
        ...

    def transpose(self, x: Tensor, axes: Sequence[int]) -> Tensor:
        """Permute the axes."""
        ...

    def broadcast_to(self, x: Tensor, shape: Sequence[int]) -> Tensor:
        """Repeat along axes of size 1, numpy's rules."""
        ...

    def concat(self, xs: Sequence[Tensor], axis: int) -> Tensor:
        """Join along an existing axis; pieces may be empty along it."""
        ...

    def split(self, x: Tensor, sizes: Sequence[int], axis: int) -> tuple[Tensor, ...]:
        """Cut along an axis into pieces of the given sizes, which add up to the axis."""
        ...

    # -- matrices --------------------------------------------------------------------------------------------------

    def matmul(self, a: Tensor, b: Tensor, *, transpose_a: bool = False, transpose_b: bool = False) -> Tensor:
        """Matrix product over the last two axes, leading axes equal. Sums are accumulated in float32."""
        ...

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """x (..., I), weight (O, I), bias (O,) -> (..., O)"""
        ...

    # -- rows ------------------------------------------------------------------------------------------------------

    def take_rows(self, x: Tensor, index: Tensor) -> Tensor:
        """Rows `index` (N,) int32 of x (T, ...) -> (N, ...). Gradient: to x, repeated rows add up."""
        ...

    def scatter_rows(self, x: Tensor, index: Tensor, rows: Tensor) -> Tensor:
        """A copy of x (T, ...) whose rows `index` (N,) int32, all different, are `rows` (N, ...).

        Gradient: to rows, and to x where it was kept.
        """
        ...

    def gather_last(self, x: Tensor, index: Tensor) -> Tensor:
        """x (..., N), index (...) int32 -> (...): one element from the last axis of each row."""
        ...

    def add_at_last(self, x: Tensor, index: Tensor, values: Tensor | float) -> Tensor:
        """x (N, M) with values (N,) or a number added at column `index[i]` of row i. Not differentiable.

        Uses up x: its storage may become the result's.
        """
        ...

    # -- coarse operations -----------------------------------------------------------------------------------------

    def rms_norm(self, x: Tensor, scale: Tensor, *, eps: float) -> Tensor:
        """Scale `x` to unit root-mean-square over its last axis.

        x (..., D), scale (D,) -> (..., D) in x's dtype: x / sqrt(mean(x^2) + eps) * scale, computed in float32.
        """
        ...

    def layer_norm(self, x: Tensor, scale: Tensor, bias: Tensor, *, eps: float) -> Tensor:
        """x (..., D), scale and bias (D,) -> (..., D) in x's dtype; biased variance, computed in float32."""
        ...

    def rope(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotate the two halves of each head: (a, b) -> (a cos - b sin, b cos + a sin).

        x (T, H, K), cos and sin (T, K / 2) float32 -> (T, H, K) in x's dtype, computed in float32.
        Gradient: to x only.
        """
        ...

    def swiglu(self, gate: Tensor, up: Tensor) -> Tensor:
        """silu(gate) * up"""
        ...

    def dropout(
        self, x: Tensor, p: float, key: Sequence[int], rows: np.ndarray | None = None, column: int = 0
    ) -> Tensor:
        """x (..., D) with a share `p` of its elements set to zero and the rest divided by 1 - p, 0 <= p < 1.

        Which ones is a hash, specified in counter_hash.py to the bit, of the integers in `key` (what the pass is: a
        seed, a step, a pack of the step, a place in the model) and of each element's row and column in the whole
        tensor. Where x is a part of it, `rows` (N,) integers are the numbers of its rows there, in any order, and
        `column` is that of its first column; leading axes count as one. The mask is recomputed for the gradient, not
        stored. Computed in float32, rounded once. Raises ConfigError where `rows` does not number x's rows.
        """
        ...

    def low_rank_row_norms(self, weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
        """Euclidean norms of the rows of weight + scale * b a, float32 and never 0. Not differentiable.

        weight (O, I), a (R, I) and b (O, R) float32 -> (O,). Computed in float32; the sum is never held whole.
        """
        ...

    def attention(self, q: Tensor, k: Tensor, v: Tensor, spans: Spans) -> tuple[Tensor, Tensor]:
        """Softmax attention inside each span, scores scaled by K ** -0.5.

        q (T, H, K), k and v (N, G, K) where G divides H: head h uses group h * G // H. `spans` covers the T query and
        the N key rows, which are the same rows unless it says otherwise. Returns out (T, H, K) in q's dtype and
        lse (H, T) float32, the log of the summed exponentials. A row that sees no key has out 0 and lse -inf.
        Gradient: from out to q, k, v; none through lse. Raises ConfigError where G does not divide H, or shapes and
        spans do not fit together.
        """
        ...

    def attention_grad(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, spans: Spans
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of `attention` to q, k and v for the cotangent `dout` of out.

        `out` and `lse` may come from a softmax over more keys than k holds (ring attention). Rows that see no key, and
        keys that no row sees, have gradient 0, whatever their lse. Not differentiable. Raises as `attention` does.
        """
        ...

    def linear_cross_entropy(self, h: Tensor, weight: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
        """Sum over rows of weights * (logsumexp(h W^T) - (h W^T)[label]), a float32 0-d tensor.

        h (N, D), weight (V, D), labels (N,) int32 in [0, V), weights (N,) float32 (all one when None).
        The logits are never held whole. Gradient: to h and weight, made in the forward pass.
        """
        ...

    def linear_logprobs(self, h: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """log softmax(h W^T)[label] and logsumexp(h W^T) of each row, both (N,) float32.

        h (N, D), weight (V, D), labels (N,) int32. The logits are never held whole.
        Gradient: from the first result to h and weight; none through the second.
        """
        ...

    def linear_logprobs_grad(
        self,
        dlogp: Tensor,
        h: Tensor,
        weight: Tensor,
        labels: Tensor,
        lse: Tensor,
        needs: tuple[bool, bool] = (True, True),
    ) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of `linear_logprobs` to h and weight, each in its dtype, for the cotangent `dlogp` (N,) float32.

        `lse` (N,) may come from a softmax over more rows than weight holds (a vocabulary in parts): a label outside
        [0, V) is then a row of another part. `needs`: which of the two are computed, the other is None. Not
        differentiable.
        """
        ...

    # -- mutators: never while a tape that saw `dst` is in flight --------------------------------------------------

    def assign(self, dst: Tensor, src: Tensor) -> None:
        """Overwrite all of `dst` with `src`, of the same shape, cast to dst's dtype. The storage stays the same.

        `dst` is a whole tensor. A slice of one, or another view, raises BackendError: on some backends what is written
        into it would be lost.
        """
        ...

    def write_slice(self, dst: Tensor, start: int, src: Tensor) -> None:
        """Overwrite rows start, start + 1, ... of `dst`, whole as in `assign`, with `src`, cast to dst's dtype."""
        ...


def write_refused(dst: Tensor) -> BackendError:
    """The error of a write into a slice or another view."""
    return BackendError(
        f"a write into a slice or a view of shape {tuple(dst.shape)}: on some backends it would be lost; write into "
        f"the whole tensor (write_slice), or into a tensor of its own and from there with assign"
    )
