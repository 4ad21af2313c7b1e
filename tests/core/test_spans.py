"""Spans: runs, parts, and what is left of them where rows see nothing."""

from __future__ import annotations

import numpy as np
import pytest

from duetvl.core.errors import ConfigError
from duetvl.core.spans import EqualSpans, Spans


def test_lengths_of_zero_are_left_out_unless_there_are_keys() -> None:
    assert Spans.of_lengths([3, 0, 2], causal=True).cu_seqlens.tolist() == [0, 3, 5]
    spans = Spans.of_lengths([3, 0, 2, 0], [1, 4, 0, 0], causal=True)
    assert (spans.lengths.tolist(), spans.key_lengths.tolist()) == ([3, 0, 2, 0], [1, 4, 0, 0])
    assert (spans.rows, spans.key_rows, spans.longest, spans.most_keys) == (5, 5, 3, 4)


def test_runs_join_spans_of_equal_rows_and_keys() -> None:
    assert Spans.of_lengths([2, 2, 2, 5], [4, 4, 3, 3], causal=True).runs == (
        EqualSpans(0, 2, 2, 0, 4), EqualSpans(4, 1, 2, 8, 3), EqualSpans(6, 1, 5, 11, 3),
    )  # fmt: skip
    assert Spans.of_lengths([2, 2, 5], causal=True).runs == (EqualSpans(0, 2, 2, 0, 2), EqualSpans(4, 1, 5, 4, 5))


def test_parts_count_from_their_own_rows_and_keys() -> None:
    parts = list(Spans.of_lengths([2, 1, 3], [4, 5, 6], causal=False).parts(2))
    assert [(p.rows, p.keys) for p in parts] == [(slice(0, 3), slice(0, 9)), (slice(3, 6), slice(9, 15))]
    assert [p.spans.cu_seqlens.tolist() for p in parts] == [[0, 2, 3], [0, 3]]
    assert [p.spans.key_offsets.tolist() for p in parts] == [[0, 4, 9], [0, 6]]


@pytest.mark.parametrize("causal", [True, False])
def test_what_sees_and_is_seen(causal: bool) -> None:
    """Span by span: more rows than keys, no keys, no rows, neither, more keys than rows."""
    seeing, places = Spans.of_lengths([3, 2, 0, 0, 1], [1, 0, 4, 0, 5], causal=causal).seeing
    assert places is not None
    assert (seeing.lengths.tolist(), seeing.key_lengths.tolist()) == ([1 if causal else 3, 1], [1, 5])
    assert places.rows.tolist() == ([2, 5] if causal else [0, 1, 2, 5])
    assert places.keys.tolist() == [0, 5, 6, 7, 8, 9]


def test_nothing_is_taken_away_where_all_see() -> None:
    spans = Spans.of_lengths([3, 2], [3, 7], causal=True)
    assert spans.seeing == (spans, None)
    seeing, places = Spans.of_lengths([3, 0, 2], [3, 0, 7], causal=True).seeing
    assert places is None and seeing.lengths.tolist() == [3, 2]
    assert Spans.of_lengths([], causal=True).seeing[1] is None


def test_spans_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ConfigError, match="2 spans of queries and 1 of keys"):
        Spans.of_lengths([3, 2], [5], causal=True)
    with pytest.raises(ConfigError, match="negative"):
        Spans.of_lengths([3, -2], causal=True)
    with pytest.raises(ConfigError, match="negative"):
        Spans(np.array([0, 2], np.int32), True, np.array([0, -2], np.int32))
