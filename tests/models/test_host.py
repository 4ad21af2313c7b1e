"""The host side: positions, windows and tables by literals and against transformers; packing."""

import warnings
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from duetvl.core.batch import IGNORE, Sample
from duetvl.core.errors import DataError
from duetvl.models.qwen_vl.config import ModelConfig, published_config
from duetvl.models.qwen_vl.host import QwenVLFamily
from duetvl.models.qwen_vl.tables import batch_tables, rope_tables, vision_tables, window_order

START, END, IMAGE, VIDEO = 151652, 151653, 151655, 151656
QWEN2 = QwenVLFamily(published_config("Qwen2-VL-2B"))
QWEN25 = QwenVLFamily(published_config("Qwen2.5-VL-7B"))
BOTH = pytest.mark.parametrize("family", [QWEN2, QWEN25], ids=["qwen2", "qwen2.5"])
NO_GRIDS = np.zeros((0, 3), np.int64)
# Multiples of the window (8 patches) and not, smaller and larger, one and several frames.
GRIDS = [
    (1, 2, 2), (1, 8, 8), (1, 10, 6), (2, 4, 12), (1, 16, 24), (1, 26, 46), (3, 18, 8), (1, 8, 20),
    (2, 14, 30), (1, 2, 40), (5, 6, 6), (1, 52, 36),
]  # fmt: skip


def block(token: int, count: int) -> list[int]:
    return [START, *[token] * count, END]


def pixels(grids: Sequence[Sequence[int]], value: float = 0.0) -> np.ndarray:
    return np.full((int(np.prod(grids, axis=1).sum()), 1176), value, np.float32)


def video_times(family: QwenVLFamily, seconds: float, grids: int = 4) -> tuple[list[int], int]:
    """Times of the frames of a video after three tokens, and the text position that follows."""
    ids = np.array([1, 2, START, *[VIDEO] * (2 * grids), END])
    grid = np.array([[grids, 4, 2]])
    index, _ = family.position_index(ids, NO_GRIDS, grid, np.array([seconds]))
    return index[0, 3:-1:2].tolist(), int(index[0, -1])


@pytest.mark.parametrize(
    ("seconds", "times", "after"),
    [(1.0, [3, 5, 7, 9], 10), (0.5, [3, 4, 5, 6], 7), (0.75, [3, 4, 6, 7], 8), (0.0, [3] * 4, 5)],
)
def test_video_time_is_float_and_text_resumes_past_the_maximum(seconds: float, times: list[int], after: int) -> None:
    assert video_times(QWEN25, seconds) == (times, after)


@pytest.mark.parametrize("seconds", [0.5, 1.0, 3.0])
def test_qwen2_counts_frames(seconds: float) -> None:
    assert video_times(QWEN2, seconds) == ([3, 4, 5, 6], 7)


def test_qwen2_video_literal() -> None:
    index, following = QWEN2.position_index(np.array([1, 2, START, *[VIDEO] * 8, END]), NO_GRIDS, np.array([[4, 4, 2]]))
    assert index[:, -1].tolist() == [7, 7, 7] and following == 8


@BOTH
def test_image_literal(family: QwenVLFamily) -> None:
    ids = np.array([1, 2, START, *[IMAGE] * 6, END, 5])
    index, following = family.position_index(ids, np.array([[1, 4, 6]]), NO_GRIDS)
    assert index[:, :3].tolist() == [[0, 1, 2]] * 3
    assert index[0, 3:9].tolist() == [3] * 6
    assert index[1, 3:9].tolist() == [3, 3, 3, 4, 4, 4]
    assert index[2, 3:9].tolist() == [3, 4, 5, 3, 4, 5]
    assert index[:, 9:].tolist() == [[6, 7]] * 3
    assert following == 8
    assert following - len(ids) == -3


@BOTH
def test_text_positions(family: QwenVLFamily) -> None:
    index, following = family.position_index(np.arange(5), NO_GRIDS, NO_GRIDS)
    assert index.tolist() == [[0, 1, 2, 3, 4]] * 3 and following == 5
    assert index.dtype == np.int32


def test_missing_seconds_mean_one_each() -> None:
    ids = np.array([1, 2, START, *[VIDEO] * 8, END])
    given = QWEN25.position_index(ids, NO_GRIDS, np.array([[4, 4, 2]]), np.array([1.0]))
    missing = QWEN25.position_index(ids, NO_GRIDS, np.array([[4, 4, 2]]))
    assert np.array_equal(given[0], missing[0])


def test_window_order_literals() -> None:
    order, lengths = window_order([(1, 8, 8)], 2, 4)
    assert order.tolist() == list(range(16)) and lengths.tolist() == [16]
    _, lengths = window_order([(1, 10, 6)], 2, 4)
    assert (4 * np.cumsum(lengths)).tolist() == [48, 60]
    order, lengths = window_order([(2, 4, 12)], 2, 4)
    assert order[:12].tolist() == [0, 1, 2, 3, 6, 7, 8, 9, 4, 5, 10, 11]
    assert (order[12:] - 12).tolist() == order[:12].tolist()
    assert (4 * np.cumsum(lengths)).tolist() == [32, 48, 80, 96]


@pytest.mark.parametrize("grid", GRIDS)
def test_windows_are_those_of_transformers(grid: tuple[int, int, int]) -> None:
    torch = pytest.importorskip("torch")
    hf = pytest.importorskip("transformers.models.qwen2_5_vl.modeling_qwen2_5_vl")
    tower = SimpleNamespace(window_size=112, spatial_merge_size=2, patch_size=14, spatial_merge_unit=4)
    index, bounds = hf.Qwen2_5_VisionTransformerPretrainedModel.get_window_index(tower, torch.tensor([GRIDS[3], grid]))
    bounds = np.unique(bounds) // 4
    theirs = {tuple(w.tolist()) for w in np.split(index.numpy(), bounds[1:-1])}
    order, lengths = window_order([GRIDS[3], grid], 2, 4)
    ours = np.split(order, np.cumsum(lengths)[:-1])
    assert {tuple(w.tolist()) for w in ours} == theirs
    assert len(ours) == len(theirs)


@pytest.mark.parametrize("grid", GRIDS)
def test_windows_keep_frames_contiguous_and_runs_short(grid: tuple[int, int, int]) -> None:
    frames, height, width = grid
    order, _ = window_order([grid], 2, 4)
    frame = order // (height * width // 4)
    assert (np.diff(frame) >= 0).all()
    tables = vision_tables(QWEN25.config.vision, np.array([grid]))
    assert len(tables.window_spans.runs) <= 4 * frames
    assert tables.frame_spans.lengths.tolist() == [height * width] * frames
    assert tables.window_spans.rows == tables.frame_spans.rows == frames * height * width


def test_inverse_undoes_the_order_of_merged_rows() -> None:
    tables = vision_tables(QWEN25.config.vision, np.array(GRIDS))
    assert tables.order is not None and tables.inverse is not None
    merged = tables.order.reshape(-1, 4)[:, 0] // 4
    assert np.array_equal(merged[tables.inverse], np.arange(len(merged)))
    assert np.array_equal(np.sort(tables.order), np.arange(len(tables.order)))
    assert not np.array_equal(tables.inverse, merged)  # they differ, and only argsort is right


def test_no_windows_no_permutation() -> None:
    tables = vision_tables(QWEN2.config.vision, np.array(GRIDS))
    assert tables.order is None and tables.inverse is None
    assert tables.window_spans is tables.frame_spans


def test_no_media() -> None:
    tables = vision_tables(QWEN25.config.vision, NO_GRIDS)
    assert tables.order is None and tables.frame_spans.rows == 0
    assert tables.cos.shape == tables.sin.shape == (0, 40)


@BOTH
def test_vision_rotary_tables_are_those_of_transformers(family: QwenVLFamily) -> None:
    torch = pytest.importorskip("torch")
    hf = pytest.importorskip("transformers.models.qwen2_5_vl.modeling_qwen2_5_vl")
    tower = SimpleNamespace(spatial_merge_size=2, rotary_pos_emb=hf.Qwen2_5_VisionRotaryEmbedding(40))
    angles = hf.Qwen2_5_VisionTransformerPretrainedModel.rot_pos_emb(tower, torch.tensor(GRIDS))
    tables = vision_tables(family.config.vision, np.array(GRIDS))
    order = np.arange(len(angles)) if tables.order is None else tables.order
    assert tables.cos.dtype == np.float32
    np.testing.assert_allclose(tables.cos, angles.cos().numpy()[order], rtol=0, atol=1.2e-7)
    np.testing.assert_allclose(tables.sin, angles.sin().numpy()[order], rtol=0, atol=1.2e-7)


@BOTH
def test_language_rotary_tables_are_those_of_transformers(family: QwenVLFamily) -> None:
    torch = pytest.importorskip("torch")
    hf = pytest.importorskip("transformers.models.qwen2_5_vl.modeling_qwen2_5_vl")
    text = family.config.text
    theirs = hf.Qwen2_5_VLRotaryEmbedding(
        hf.Qwen2_5_VLTextConfig(
            hidden_size=text.hidden_size,
            num_attention_heads=text.num_heads,
            rope_theta=text.rope_theta,
            rope_scaling={"type": "default", "mrope_section": list(text.mrope_section)},
        )
    )
    positions = np.random.default_rng(0).integers(0, 9000, (3, 50))
    cos, sin = theirs(torch.zeros(1), torch.tensor(positions)[:, None])
    for ours, full in zip(rope_tables(family.config.text, positions), (cos, sin), strict=True):
        doubled = full.split(list(text.mrope_section) * 2, dim=-1)
        mixed = torch.cat([part[i % 3] for i, part in enumerate(doubled)], dim=-1)[0].numpy()
        assert ours.dtype == np.float32 and ours.shape == (50, 64)
        # One of torch's 64 frequencies is not rounded correctly; positions multiply its last bit.
        np.testing.assert_allclose(np.concatenate([ours, ours], 1), mixed, rtol=0, atol=1e-6)


def test_mrope_sections_follow_their_axes() -> None:
    cos, _ = rope_tables(QWEN25.config.text, np.array([[5], [0], [0]]))
    assert (cos[0, :16] != 1).any() and (cos[0, 16:] == 1).all()
    cos, _ = rope_tables(QWEN25.config.text, np.array([[0], [0], [5]]))
    assert (cos[0, :40] == 1).all() and (cos[0, 40:] != 1).any()


def random_sample(rng: np.random.Generator, family: QwenVLFamily, text: int = 6) -> Sample:
    """Text, images and integer-second videos in random order, with pixels that tell media apart."""
    ids: list[int] = []
    grids: dict[int, list[tuple[int, ...]]] = {IMAGE: [], VIDEO: []}
    for _ in range(rng.integers(0, 5)):
        token = int(rng.choice([IMAGE, VIDEO]))
        frames = 1 if token == IMAGE else int(rng.integers(1, 4))
        grid = (frames, *(2 * rng.integers(1, 6, 2)).tolist())
        grids[token].append(grid)
        ids += [*rng.integers(0, 1000, rng.integers(0, text)).tolist()]
        ids += block(token, family.placeholder_count(grid))
    ids += rng.integers(0, 1000, 1 + rng.integers(0, text)).tolist()
    labels = np.where(rng.random(len(ids)) < 0.5, ids, IGNORE)
    return Sample(
        input_ids=np.array(ids),
        labels=labels,
        pixel_values=pixels(grids[IMAGE], 1.0) if grids[IMAGE] else None,
        image_grid_thw=np.array(grids[IMAGE]) if grids[IMAGE] else NO_GRIDS,
        pixel_values_videos=pixels(grids[VIDEO], 2.0) if grids[VIDEO] else None,
        video_grid_thw=np.array(grids[VIDEO]) if grids[VIDEO] else NO_GRIDS,
        second_per_grid_ts=rng.integers(1, 4, len(grids[VIDEO])).astype(float),
    )


def hf_positions(family: QwenVLFamily, sample: Sample) -> tuple[np.ndarray, int]:
    torch = pytest.importorskip("torch")
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel
    from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLModel

    ticks = family.config.vision.tokens_per_second
    vision = SimpleNamespace(spatial_merge_size=2, tokens_per_second=ticks)
    stub: Any = SimpleNamespace(
        config=SimpleNamespace(
            vision_config=vision,
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            vision_start_token_id=START,
        )
    )
    arguments: dict[str, Any] = {
        "input_ids": torch.tensor(sample.input_ids)[None],
        "image_grid_thw": torch.tensor(sample.image_grid_thw),
        "video_grid_thw": torch.tensor(sample.video_grid_thw),
    }
    if ticks is None:
        index, delta = Qwen2VLModel.get_rope_index(stub, **arguments)
    else:
        seconds = torch.tensor(sample.second_per_grid_ts)
        index, delta = Qwen2_5_VLModel.get_rope_index(stub, second_per_grid_ts=seconds, **arguments)
    return index[:, 0].numpy(), int(delta[0, 0]) + len(sample)


@BOTH
@pytest.mark.parametrize("seed", range(12))
def test_positions_equal_transformers(family: QwenVLFamily, seed: int) -> None:
    sample = random_sample(np.random.default_rng(seed), family)
    ours = family.position_index(
        sample.input_ids, sample.image_grid_thw, sample.video_grid_thw, sample.second_per_grid_ts
    )
    theirs = hf_positions(family, sample)
    assert np.array_equal(ours[0], theirs[0]) and ours[1] == theirs[1]


def test_adjacent_blocks_without_separator_are_counted_off() -> None:
    ids = np.array([START, *[IMAGE] * 5, END])
    index, following = QWEN25.position_index(ids, np.array([[1, 2, 2], [1, 4, 4]]), NO_GRIDS)
    assert index[1].tolist() == [0, 1, 2, 2, 3, 3, 4] and following == 5


def test_pack_lays_samples_end_to_end() -> None:
    rng = np.random.default_rng(3)
    samples = [random_sample(rng, QWEN25) for _ in range(6)]
    batch = QWEN25.pack(samples)
    bounds = np.cumsum([0, *map(len, samples)])
    assert batch.cu_seqlens.tolist() == bounds.tolist() and batch.cu_seqlens.dtype == np.int32
    for sample, start, stop in zip(samples, bounds, bounds[1:], strict=False):
        alone = QWEN25.pack([sample])
        assert np.array_equal(batch.input_ids[start:stop], sample.input_ids)
        assert np.array_equal(batch.position_ids[:, start:stop], alone.position_ids)
        assert sample.labels is not None
        assert batch.targets[start:stop].tolist() == [*sample.labels[1:], IGNORE]
    assert batch.position_ids.dtype == batch.input_ids.dtype == batch.targets.dtype == np.int32
    assert batch.pixel_rows.dtype == np.float32
    assert batch.grids.tolist() == [
        grid for s in samples for grid in [*s.image_grid_thw.tolist(), *s.video_grid_thw.tolist()]
    ]


def test_pack_sends_each_placeholder_to_its_feature() -> None:
    """Images are 1, videos 2: with a video first in the text, image features still come first."""
    ids = [*block(VIDEO, 2), *block(IMAGE, 1), *block(VIDEO, 1), 9, *block(IMAGE, 4)]
    images, videos = [(1, 2, 2), (1, 4, 4)], [(2, 2, 2), (1, 2, 2)]
    sample = Sample(
        np.array(ids),
        pixel_values=pixels(images, 1),
        image_grid_thw=np.array(images),
        pixel_values_videos=pixels(videos, 2),
        video_grid_thw=np.array(videos),
    )
    batch = QWEN25.pack([Sample(np.array([1, 2])), sample, sample])
    kind_of_feature = batch.pixel_rows[::4, 0]
    token = batch.input_ids[batch.visual_dst]
    assert np.array_equal(kind_of_feature[batch.visual_src] == 1, token == IMAGE)
    assert batch.visual_dst[:8].tolist() == [3, 4, 7, 10, 14, 15, 16, 17]
    assert batch.visual_src[:8].tolist() == [5, 6, 0, 7, 1, 2, 3, 4]
    assert (batch.visual_src[8:] - 8).tolist() == batch.visual_src[:8].tolist()
    assert (batch.targets == IGNORE).all()


def test_pack_without_media() -> None:
    batch = QWEN25.pack([Sample(np.array([1, 2, 3]), np.array([-100, 2, 3]), id="a")])
    assert batch.pixel_rows.shape == (0, 1176) and batch.grids.shape == (0, 3)
    assert batch.visual_dst.shape == (0,) and batch.trained_tokens == 2
    assert batch.sample_ids == ("a",)
    tables = batch_tables(QWEN25.config, batch)
    assert tables.language.spans.causal and tables.language.cos.shape == (3, 64)


def test_prepare_describes_the_whole_batch() -> None:
    rng = np.random.default_rng(8)
    batch = QWEN25.pack([random_sample(rng, QWEN25) for _ in range(4)])
    tables = batch_tables(QWEN25.config, batch)
    rows = len(batch.pixel_rows)
    assert rows and tables.vision.cos.shape == (rows, 40) and tables.vision.frame_spans.rows == rows
    assert not tables.vision.frame_spans.causal and not tables.vision.window_spans.causal
    assert tables.language.spans.rows == batch.tokens


GRID = np.array([[1, 4, 6]])
GOOD = Sample(np.array([1, *block(IMAGE, 6), 2]), None, pixels([(1, 4, 6)]), GRID, id="s1")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"input_ids": [1, *block(IMAGE, 5)]},
            "image 1: 5 placeholder tokens, but its grid (1, 4, 6) makes 6 features",
        ),
        (
            {"input_ids": [1, *block(IMAGE, 7)]},
            "1 image placeholder tokens are left over after 1 image grids",
        ),
        ({"input_ids": [1, *block(IMAGE, 3), *block(IMAGE, 3)]}, "image 1: 3 placeholder tokens"),
        (
            {"input_ids": [1, *block(VIDEO, 6)]},
            "6 video placeholder tokens are left over after 0 video grids",
        ),
        ({"input_ids": [1, 2]}, "has 1 image grids, but placeholder tokens for 0"),
        (
            {"pixel_values": pixels([(1, 4, 4)])},
            "has 16 image pixel rows, its grids [[1, 4, 6]] need 24",
        ),
        ({"pixel_values": None}, "has 1 image grids, but no image pixels"),
        ({"pixel_values": np.zeros((24, 588), np.float32)}, "expected (patches, 1176)"),
        ({"image_grid_thw": NO_GRIDS}, "has 24 image pixel rows, its grids [] need 0"),
        ({"image_grid_thw": np.array([[1, 3, 8]])}, "grid (1, 3, 8) needs positive numbers"),
        ({"labels": [1, 2]}, "has 2 labels for 10 tokens"),
        (
            {"labels": [200000] * 10},
            "label 200000 at position 0 is outside the vocabulary of 152064",
        ),
        ({"input_ids": [1, 152064, 2]}, "token id 152064 at position 1 is outside the vocabulary"),
        ({"input_ids": [-1]}, "token id -1 at position 0"),
        ({"input_ids": [1.5]}, "expected integers"),
        ({"input_ids": []}, "has no tokens"),
        ({"second_per_grid_ts": np.array([1.0, 2.0])}, "has 2 second_per_grid_ts for 0 videos"),
    ],
)
def test_pack_refuses_what_disagrees(changes: dict[str, Any], message: str) -> None:
    QWEN25.pack([GOOD])
    changes = {k: np.array(v) if isinstance(v, list) else v for k, v in changes.items()}
    with pytest.raises(DataError) as caught:
        QWEN25.pack([GOOD, replace(GOOD, **changes)])
    assert message in str(caught.value) and str(caught.value).startswith("sample 's1': ")


def test_swapped_samples_are_found_though_totals_match() -> None:
    small, large = np.array([[1, 2, 2]]), np.array([[1, 4, 4]])
    first = Sample(np.array(block(IMAGE, 4)), None, pixels([(1, 2, 2)]), small)
    second = Sample(np.array(block(IMAGE, 1)), None, pixels([(1, 4, 4)]), large)
    with pytest.raises(DataError, match=r"^sample 0: "):
        QWEN25.pack([first, second])


def test_unnamed_samples_are_named_by_their_place() -> None:
    with pytest.raises(DataError, match=r"^sample 1: has no tokens"):
        QWEN25.pack([GOOD, Sample(np.zeros(0, np.int64))])
    with pytest.raises(DataError, match="empty list"):
        QWEN25.pack([])


def test_packing_two_equals_two_alone() -> None:
    """Padding-free packing restarts positions and never shifts a label across samples."""
    a = Sample(np.array([5, *block(IMAGE, 6), 6]), np.array([5] * 10), pixels([(1, 4, 6)]), GRID)
    b = Sample(np.array([7, 8, 9]), np.array([7, 8, 9]))
    batch = QWEN25.pack([a, b])
    assert batch.position_ids[0].tolist() == [0, 1, 2, 2, 2, 2, 2, 2, 5, 6, 0, 1, 2]
    assert batch.position_ids[2].tolist() == [0, 1, 2, 3, 4, 2, 3, 4, 5, 6, 0, 1, 2]
    assert batch.targets.tolist() == [5] * 9 + [IGNORE, 8, 9, IGNORE]


def test_every_number_comes_from_the_config() -> None:
    config = published_config("Qwen2.5-VL-7B")
    vision = replace(config.vision, window=56, tokens_per_second=25, merge=1, patch=28)
    other: ModelConfig = replace(config, vision=vision, image_token_id=11, video_token_id=12)
    family = QwenVLFamily(other)
    assert family.special.image == 11 and family.geometry.row == 3 * 2 * 28 * 28
    assert family.placeholder_count((1, 4, 6)) == 24
    index, _ = family.position_index(np.array([12] * 3), NO_GRIDS, np.array([[3, 1, 1]]))
    assert index[0].tolist() == [0, 25, 50]
    assert vision_tables(family.config.vision, np.array([[1, 4, 4]])).window_spans.lengths.tolist() == [4] * 4


def test_positions_beyond_the_models_are_told_once() -> None:
    config = published_config("Qwen2.5-VL-7B")
    family = QwenVLFamily(replace(config, text=replace(config.text, max_positions=8)))
    ids = np.arange(9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        family.pack([Sample(ids[:8], None), Sample(ids[:8], None)])
    with pytest.warns(UserWarning, match=r"sample 'long' has 9 positions, the model is made for 8 \(max_position_emb"):
        family.pack([Sample(ids[:3], None), Sample(ids, None, id="long")])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        family.pack([Sample(ids, None)])
