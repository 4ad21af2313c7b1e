"""Which rows of a pack each rank of context parallelism has, and which keys they see: numbers alone."""

from __future__ import annotations

import numpy as np
import pytest

from duetvl.core.errors import ConfigError
from duetvl.core.mesh import Mesh
from duetvl.core.spans import Spans
from duetvl.core.stages import even_split
from duetvl.models.qwen_vl.config import ModelConfig
from duetvl.models.qwen_vl.sharding import Heads
from duetvl.parallel.context import HeadShare, Pieces
from duetvl.parallel.division import Division

LENGTHS = ([17], [1], [3, 1, 12, 2], [8, 8], [30, 0, 5], [], [2, 1, 1])


def seen(spans: Spans, rows: np.ndarray, keys: np.ndarray, whole: np.ndarray) -> None:
    """Count in `whole` (T, T) what `rows` see of `keys`."""
    assert (spans.rows, spans.key_rows) == (len(rows), len(keys))
    ends = zip(spans.cu_seqlens[:-1], spans.cu_seqlens[1:], spans.key_offsets[:-1], spans.key_offsets[1:], strict=True)
    for a, b, c, d in ends:
        for row in range(a, b):
            stop = d - (b - 1 - row) if spans.causal else d
            for key in range(c, stop):
                whole[rows[row], keys[key]] += 1


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("ring", [1, 2, 3, 5])
def test_a_ring_sees_what_causal_attention_sees_once(lengths: list[int], ring: int) -> None:
    pieces, total = Pieces(np.array(lengths, np.int64), ring, 1), sum(lengths)
    found, wanted = np.zeros((2, total, total), int)
    rows = [pieces.rows(member) for member in range(ring)]
    for member in range(ring):
        assert len(rows[member]) == pieces.count(member)
        for source in range(ring):
            seen(pieces.spans(member, source), rows[member], rows[source], found)
    seen(Spans.of_lengths(lengths, causal=True), np.arange(total), np.arange(total), wanted)
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize(("ring", "ulysses"), [(1, 1), (1, 4), (2, 2), (3, 2)])
def test_every_row_is_somewhere_once(lengths: list[int], ring: int, ulysses: int) -> None:
    pieces = Pieces(np.array(lengths, np.int64), ring, ulysses)
    rows = [pieces.rows(place) for place in range(ring * ulysses)]
    assert all((np.diff(own) > 0).all() for own in rows)
    assert sorted(np.concatenate(rows).tolist()) == list(range(sum(lengths)))
    for member in range(ring):
        sizes = [len(own) for own in rows[member * ulysses : (member + 1) * ulysses]]
        assert sizes == pieces.sizes(member) == list(even_split(sum(sizes), ulysses))


def test_a_long_sequence_is_as_much_work_for_all() -> None:
    pieces = Pieces(np.array([4096]), 4, 1)
    work = [sum(int(row) + 1 for row in pieces.rows(member)) for member in range(4)]
    assert len(set(work)) == 1


@pytest.mark.parametrize(("query", "kv"), [(8, 2), (14, 2), (28, 4), (12, 12), (7, 1)])
@pytest.mark.parametrize("tp", [1, 2, 3])
@pytest.mark.parametrize("ulysses", [1, 2, 3])
def test_every_query_head_gets_its_key_head(query: int, kv: int, tp: int, ulysses: int) -> None:
    heads, taken = Heads(query, kv, 1), []
    for share in HeadShare.of(heads, range(query)).divided(heads, tp):
        for part in share.divided(heads, ulysses):
            keys = list(part.keys) if part.spread is None else [part.keys[place] for place in part.spread]
            assert part.kv_heads == len(keys)
            assert set(part.keys) <= set(share.keys)
            taken += [(q, keys[i * len(keys) // len(part.queries)]) for i, q in enumerate(part.queries)]
    assert taken == [(head, head * kv // query) for head in range(query)]


def test_more_ranks_than_heads_are_refused() -> None:
    config = ModelConfig.from_dict(
        {
            "model_type": "qwen2_vl", "vocab_size": 99, "hidden_size": 32, "intermediate_size": 50,
            "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-6,
            "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}, "tie_word_embeddings": False,
            "vision_start_token_id": 92, "vision_end_token_id": 93, "image_token_id": 91, "video_token_id": 90,
            "vision_config": {"depth": 1, "embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2, "num_heads": 4},
        }
    )  # fmt: skip
    with pytest.raises(ConfigError, match=r"parallel\.cp 4: 4 ranks .* has 2 query heads; .*ring, or hybrid .* most 2"):
        Division.of(config, Mesh(cp=4, tp=2), 0)
    assert Division.of(config, Mesh(cp=4, tp=2), 0, ulysses=2).ulysses == 2
