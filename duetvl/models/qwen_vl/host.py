"""The host side of Qwen2-VL and Qwen2.5-VL in numpy: positions, and samples packed into batches.

The specification of positions is that of transformers 4.49 to 4.51, Qwen's own: text resumes one
past the largest position of a vision block, and time is `floor(t * second_per_grid *
tokens_per_second)` in float32. transformers 4.57 truncates fractional seconds and 5 ignores time
where text resumes; neither is followed.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from duetvl.core.batch import IGNORE, Batch, Pair, PatchBytes, Rows, Sample, stack_rows
from duetvl.core.errors import DataError
from duetvl.core.family import Grounding, PatchGeometry, Placed, SpecialTokens
from duetvl.models.qwen_vl.config import ModelConfig
from duetvl.models.qwen_vl.tables import Grid, as_grid

_MOST_POSITIONS = 1 << 20  # a rotary table of this length takes half a GB


class QwenVLFamily:
    """The host side of one model; implements `duetvl.core.family.Family`."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self._warned = False
        vision = config.vision
        self.geometry = PatchGeometry(vision.channels, vision.patch, vision.temporal, vision.merge)
        self.special = SpecialTokens(
            vision_start=config.vision_start_token_id,
            vision_end=config.vision_end_token_id,
            image=config.image_token_id,
            video=config.video_token_id,
        )
        self.vocabulary = config.text.vocab_size
        self.grounding: Grounding = "relative" if config.model_type == "qwen2_vl" else "absolute"

    def placeholder_count(self, grid_thw: np.ndarray | Sequence[int]) -> int:
        """Tokens that a picture or video of this grid takes: time x height x width / merge^2."""
        return _merged_count(as_grid(grid_thw, self.geometry.merge), self.geometry.merge)

    def position_index(
        self,
        input_ids: np.ndarray,
        image_grid_thw: np.ndarray,
        video_grid_thw: np.ndarray,
        second_per_grid_ts: np.ndarray | None = None,
    ) -> tuple[np.ndarray, int]:
        """Positions of one sample (3, T) int32: time, height, width; and the next free position.

        Raises DataError when placeholders and grids do not match, one vision block at a time.
        """
        ids = np.asarray(input_ids).reshape(-1)
        blocks = self._blocks(ids, image_grid_thw, video_grid_thw)
        seconds = _seconds(second_per_grid_ts, len(video_grid_thw))
        positions = np.empty((3, len(ids)), np.int32)
        done, free = 0, 0
        for block in blocks:
            text = block.start - done
            positions[:, done : block.start] = np.arange(free, free + text, dtype=np.int32)
            free += text
            step = self._time_step(block, seconds)
            if block.grid[0] * step[0] * step[1] > _MOST_POSITIONS:
                raise DataError(
                    f"video {block.index + 1} reaches position {block.grid[0] * step[0] * step[1]:.3g} in time, with "
                    f"{step[0]:.3g} seconds for each temporal patch; no model knows more than {_MOST_POSITIONS}: is "
                    f"second_per_grid or fps wrong?"
                )
            inside = _block_positions(block.grid, self.geometry.merge, step)
            done = block.start + inside.shape[1]
            positions[:, block.start : done] = inside + np.int32(free)
            free += int(inside.max()) + 1
        positions[:, done:] = np.arange(free, free + len(ids) - done, dtype=np.int32)
        return positions, free + len(ids) - done

    def pack(self, samples: Sequence[Sample | Pair]) -> Batch:
        """Lay samples end to end; a pair is two sequences, the chosen one first, over one copy of its pictures.

        Raises DataError naming the sample whose tokens and media disagree. Warns, once, of one with positions beyond
        those that the model was made for.
        """
        if not samples:
            raise DataError("cannot pack an empty list of samples")
        parts = [part for index, given in enumerate(samples) for part in self._checked(given, index)]
        self._warn_of_positions(parts)
        media = [pixels for part in parts for pixels in part.media]
        merged = np.cumsum([0, *(part.features for part in parts)])
        starts = np.cumsum([0, *(len(part.sample) for part in parts)])
        return Batch(
            input_ids=np.concatenate([part.sample.input_ids for part in parts]).astype(np.int32),
            position_ids=np.concatenate([part.positions for part in parts], axis=1),
            cu_seqlens=starts.astype(np.int32),
            targets=np.concatenate([_targets(part.sample) for part in parts]),
            pixel_rows=stack_rows(media, self.geometry.row),
            grids=np.concatenate([part.grids for part in parts]),
            visual_dst=_offset([part.dst for part in parts], starts),
            visual_src=_offset([part.src for part in parts], merged),
            sample_ids=tuple(given.id for given in samples),
        )

    def place(self, sample: Sample) -> Placed:
        """Where `pack` would put a sample's tokens and features, and whether it could; see `Family.place`."""
        part = self._of_sample(sample)
        self._warn_of_positions([part])
        return Placed(part.positions, int(part.positions.max()) + 1, part.dst, part.src)

    def check(self, given: Sample | Pair) -> None:
        """Raise DataError for ids outside the vocabulary and times beyond any position; see `Family.check`."""
        for sample in (given.chosen, given.rejected) if isinstance(given, Pair) else (given,):
            if not 0 <= int(sample.input_ids.min(initial=0)) <= int(sample.input_ids.max(initial=0)) < self.vocabulary:
                self._check_tokens(sample)
            if len(sample.video_grid_thw):
                self.position_index(
                    sample.input_ids, sample.image_grid_thw, sample.video_grid_thw, sample.second_per_grid_ts
                )

    def _warn_of_positions(self, parts: Sequence[_Part]) -> None:
        most = self.config.text.max_positions
        longest = max(parts, key=lambda part: int(part.positions.max(initial=-1)))
        if not self._warned and longest.positions.max(initial=-1) >= most:
            self._warned = True
            warnings.warn(
                f"sample {longest.sample.id!r} has {longest.positions.max() + 1} positions, the model is made for "
                f"{most} (max_position_embeddings in its config.json), and answers worse beyond them",
                stacklevel=3,
            )

    def _time_step(self, block: _Block, seconds: np.ndarray) -> tuple[float, float]:
        """Seconds per temporal patch and ticks per second of a block, see `_block_positions`."""
        ticks = self.config.vision.tokens_per_second
        if ticks is None:
            return 1.0, 1.0
        return (float(seconds[block.index]), ticks) if block.is_video else (0.0, ticks)

    def _blocks(self, ids: np.ndarray, image_grids: np.ndarray, video_grids: np.ndarray) -> list[_Block]:
        """The vision blocks of a sample in the order of its tokens, each with its grid.

        Raises DataError when a block has more or fewer tokens than its grid makes features.
        """
        merge = self.geometry.merge
        kinds = {
            self.special.image: _Medium("image", [as_grid(grid, merge) for grid in image_grids]),
            self.special.video: _Medium("video", [as_grid(grid, merge) for grid in video_grids]),
        }
        blocks: list[_Block] = []
        for token, start, stop in _placeholder_runs(ids, tuple(kinds)):
            medium = kinds[token]
            while start < stop:
                index, grid = medium.take(stop - start)
                features = _merged_count(grid, merge)
                if features > stop - start:
                    raise DataError(
                        f"{medium.name} {index + 1}: {stop - start} placeholder tokens, but its "
                        f"grid {grid} makes {features} features"
                    )
                blocks.append(_Block(start, grid, index, medium.name == "video"))
                start += features
        for medium in kinds.values():
            medium.check_all_taken()
        return blocks

    def _checked(self, given: Sample | Pair, index: int) -> list[_Part]:
        """One sample's share of a batch, or both of a pair, or a DataError that names the sample."""
        try:
            return self._of_pair(given) if isinstance(given, Pair) else [self._of_sample(given)]
        except DataError as error:
            name = f"sample {given.id!r}" if given.id else f"sample {index}"
            raise DataError(f"{name}: {error}") from None

    def _of_sample(self, sample: Sample) -> _Part:
        self._check_tokens(sample)
        media = [
            _checked_rows("image", sample.pixel_values, sample.image_grid_thw, self.geometry),
            _checked_rows("video", sample.pixel_values_videos, sample.video_grid_thw, self.geometry),
        ]
        return self._part(sample, [rows for rows in media if rows is not None])

    def _of_pair(self, pair: Pair) -> list[_Part]:
        """The rejected answer has no pictures of its own: its features are those just before, the chosen one's."""
        chosen = self._of_sample(pair.chosen)
        _check_shares(pair)
        self._check_tokens(pair.rejected)
        rejected = self._part(pair.rejected, [])
        shared = replace(rejected, grids=rejected.grids[:0], src=rejected.src - chosen.features, features=0)
        return [chosen, shared]

    def _check_tokens(self, sample: Sample) -> None:
        if len(sample) == 0:
            raise DataError("has no tokens")
        vocab = self.vocabulary
        _check_ids("token id", sample.input_ids, np.zeros(len(sample), bool), vocab)
        if sample.labels is None:
            return
        if len(sample.labels) != len(sample):
            raise DataError(f"has {len(sample.labels)} labels for {len(sample)} tokens")
        _check_ids("label", sample.labels, sample.labels == IGNORE, vocab)

    def _part(self, sample: Sample, media: list[Rows]) -> _Part:
        positions, _ = self.position_index(
            sample.input_ids,
            sample.image_grid_thw,
            sample.video_grid_thw,
            sample.second_per_grid_ts,
        )
        grids = np.concatenate([sample.image_grid_thw, sample.video_grid_thw])
        counts = np.prod(grids, axis=1) // self.geometry.merge**2
        images = int(counts[: len(sample.image_grid_thw)].sum())
        is_image = sample.input_ids == self.special.image
        is_video = sample.input_ids == self.special.video
        dst = np.flatnonzero(is_image | is_video)
        # Placeholders of one kind lie in the order of their grids: count features off per kind.
        src = np.where(is_image, np.cumsum(is_image) - 1, images + np.cumsum(is_video) - 1)[dst]
        return _Part(sample, positions, media, grids, dst, src, int(counts.sum()))


@dataclass(frozen=True, eq=False)
class _Part:
    """One sequence's share of a batch; dst counts from its own first row, src from its first feature (which for the
    rejected answer of a pair lies behind the features that it uses)."""

    sample: Sample
    positions: np.ndarray
    media: list[Rows]
    grids: np.ndarray
    dst: np.ndarray
    src: np.ndarray
    features: int


@dataclass(frozen=True)
class _Block:
    """One picture or video among the tokens of a sample; `index` counts within its kind."""

    start: int
    grid: Grid
    index: int
    is_video: bool


class _Medium:
    """The grids of one kind of media in a sample, handed out in order."""

    def __init__(self, name: str, grids: list[Grid]) -> None:
        self.name = name
        self.grids = grids
        self.taken = 0

    def take(self, tokens: int) -> tuple[int, Grid]:
        if self.taken == len(self.grids):
            raise DataError(
                f"{tokens} {self.name} placeholder tokens are left over after {len(self.grids)} {self.name} grids"
            )
        self.taken += 1
        return self.taken - 1, self.grids[self.taken - 1]

    def check_all_taken(self) -> None:
        if self.taken < len(self.grids):
            raise DataError(f"has {len(self.grids)} {self.name} grids, but placeholder tokens for {self.taken}")


@lru_cache(maxsize=512)
def _block_positions(grid: Grid, merge: int, step: tuple[float, float]) -> np.ndarray:
    """Positions (3, tokens) int32 of one vision block, from 0.

    step: seconds per temporal patch, and ticks per second.
    """
    frames, rows, columns = grid[0], grid[1] // merge, grid[2] // merge
    seconds, ticks = (np.float32(number) for number in step)
    times = np.floor(np.arange(frames, dtype=np.float32) * seconds * ticks).astype(np.int32)
    time, row, column = np.broadcast_arrays(
        times[:, None, None],
        np.arange(rows, dtype=np.int32)[None, :, None],
        np.arange(columns, dtype=np.int32)[None, None, :],
    )
    return np.stack([time.reshape(-1), row.reshape(-1), column.reshape(-1)])


def _placeholder_runs(ids: np.ndarray, tokens: tuple[int, ...]) -> list[tuple[int, int, int]]:
    """Stretches of equal placeholder tokens: (token, start, stop), in order."""
    if len(ids) == 0:
        return []
    starts = np.flatnonzero(np.concatenate([[True], ids[1:] != ids[:-1]]))
    stops = np.append(starts[1:], len(ids))
    chosen = np.isin(ids[starts], tokens)
    return [(int(ids[start]), int(start), int(stop)) for start, stop in zip(starts[chosen], stops[chosen], strict=True)]


def _merged_count(grid: Grid, merge: int) -> int:
    frames, height, width = grid
    return frames * (height // merge) * (width // merge)


def _seconds(second_per_grid_ts: np.ndarray | None, videos: int) -> np.ndarray:
    """Seconds per temporal patch of each video, float32; one each where none are given."""
    if second_per_grid_ts is None:
        return np.ones(videos, np.float32)
    seconds = np.asarray(second_per_grid_ts, np.float32).reshape(-1)
    if len(seconds) != videos:
        raise DataError(f"has {len(seconds)} second_per_grid_ts for {videos} videos")
    if not (np.isfinite(seconds).all() and (seconds >= 0).all()):
        raise DataError(f"second_per_grid_ts {seconds.tolist()} must be finite and not negative")
    return seconds


def _check_shares(pair: Pair) -> None:
    """Raise DataError where the answers of a pair are about different pictures."""
    for name in ("image_grid_thw", "video_grid_thw"):
        one, other = getattr(pair.chosen, name), getattr(pair.rejected, name)
        if not np.array_equal(one, other):
            raise DataError(f"{name} of the chosen answer is {one.tolist()}, of the rejected one {other.tolist()}")
    if pair.rejected.pixel_values is not None or pair.rejected.pixel_values_videos is not None:
        raise DataError("the rejected answer has pixels of its own; a pair shares those of the chosen one")


def _checked_rows(name: str, pixels: Rows | None, grids: np.ndarray, geometry: PatchGeometry) -> Rows | None:
    """Patch rows of one kind of media, or a DataError when they are not what the grids need."""
    expected = int(np.prod(grids, axis=1).sum())
    if pixels is None:
        if expected:
            raise DataError(f"has {len(grids)} {name} grids, but no {name} pixels")
        return None
    rows = pixels if isinstance(pixels, PatchBytes) else np.asarray(pixels)
    if len(rows.shape) != 2 or rows.shape[1] != geometry.row:
        raise DataError(f"{name} pixels have shape {rows.shape}, expected (patches, {geometry.row})")
    if len(rows) != expected:
        raise DataError(f"has {len(rows)} {name} pixel rows, its grids {grids.tolist()} need {expected}")
    return rows


def _check_ids(name: str, ids: np.ndarray, exempt: np.ndarray, vocab: int) -> None:
    if not np.issubdtype(ids.dtype, np.integer):
        raise DataError(f"{name}s have dtype {ids.dtype}, expected integers")
    wrong = np.flatnonzero(~exempt & ((ids < 0) | (ids >= vocab)))
    if len(wrong):
        at = int(wrong[0])
        raise DataError(
            f"{name} {int(ids[at])} at position {at} is outside the vocabulary of {vocab}; the tokenizer has tokens "
            f"that the model has no row for: resize the model's embedding, or remove them from the texts"
        )


def _targets(sample: Sample) -> np.ndarray:
    """Label of the next token of the same sample, (T,) int32; nothing follows the last one."""
    targets = np.full(len(sample), IGNORE, np.int32)
    if sample.labels is not None:
        targets[:-1] = sample.labels[1:]
    return targets


def _offset(parts: Sequence[np.ndarray], starts: np.ndarray) -> np.ndarray:
    """Indices of all parts in one int32 array, each moved by its part's start."""
    moved = [part + start for part, start in zip(parts, starts[:-1], strict=True)]
    return np.concatenate(moved).astype(np.int32)
