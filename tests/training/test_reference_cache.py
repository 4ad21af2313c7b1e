"""The file of the reference's log-probabilities: what it keeps, what it is keyed by, and what a kill leaves."""

from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import pytest
from numpy_backend import ALONE
from oracle import PAIRS
from test_dpo import batch_of

from duetvl.core.batch import Pair, PatchBytes
from duetvl.core.errors import CheckpointError, DataError
from duetvl.data.pairs import pair_digest
from duetvl.models.model_directory import open_model
from duetvl.storage.tensor_files import TensorFile, write_tensor_file
from duetvl.training.preference.reference_cache import ReferenceCache, reference_name

DIGESTS = [bytes([number]) * 16 for number in range(4)]
SUMS = np.arange(8, dtype=np.float32) / 3


def batch(numbers):
    digests = tuple(DIGESTS[number] for number in numbers)
    return replace(batch_of([1, 1] * len(numbers)), digests=digests, sample_ids=tuple(f"p{n}" for n in numbers))


def fill(directory, numbers) -> ReferenceCache:
    cache = ReferenceCache(directory, "name")
    with cache.filling() as add:
        for number in numbers:
            add([DIGESTS[number]], SUMS[2 * number : 2 * number + 2])
    return cache


def test_what_is_written_is_found_again_to_the_bit(tmp_path):
    fill(tmp_path / "new" / "dir", [0, 1])
    cache = fill(tmp_path / "new" / "dir", [3])
    for found in (cache, ReferenceCache(tmp_path / "new" / "dir", "name")):
        assert len(found) == 3
        assert found.sums(batch([3, 0])).tobytes() == SUMS[[6, 7, 0, 1]].tobytes()
        assert found.lacks(DIGESTS) and not found.lacks([DIGESTS[0], DIGESTS[3]])


def test_another_reference_is_another_file(tmp_path):
    fill(tmp_path, [0])
    assert len(ReferenceCache(tmp_path, "other")) == 0


@pytest.mark.parametrize("left", [0, 1, 27, 28, 29, 55, 56, 70, 84, 111])
def test_a_file_cut_anywhere_goes_on_from_its_whole_entries(tmp_path, left):
    path = fill(tmp_path, [0, 1, 2]).path
    path.write_bytes(path.read_bytes()[:left])
    assert len(ReferenceCache(tmp_path, "name")) == max(0, left // 28 - 1)
    fill(tmp_path, [3])
    again = ReferenceCache(tmp_path, "name")
    assert len(again) == max(0, left // 28 - 1) + 1
    assert again.sums(batch([3])).tobytes() == SUMS[6:].tobytes()


def test_a_flipped_bit_is_not_believed(tmp_path):
    path = fill(tmp_path, [0, 1, 2]).path
    raw = bytearray(path.read_bytes())
    raw[28 * 2 + 18] ^= 1  # in the second pair's numbers
    path.write_bytes(raw)
    cache = ReferenceCache(tmp_path, "name")
    assert len(cache) == 1 and not cache.lacks([DIGESTS[0]])


def test_two_processes_that_fill_one_file_take_turns(tmp_path):
    """The second finds what the first wrote."""
    cache, other = ReferenceCache(tmp_path, "name"), ReferenceCache(tmp_path, "name")
    with cache.filling() as add:
        add(DIGESTS[:2], SUMS[:4])
        with pytest.raises(BlockingIOError), other.filling():
            pass
    with other.filling() as add:
        assert len(other) == 2
        add([b"z" * 16], np.zeros(2, np.float32))
    assert len(ReferenceCache(tmp_path, "name")) == 3


def test_a_pair_that_is_not_there_is_named_and_the_next_start_looks_again(tmp_path):
    cache = fill(tmp_path, [0])
    cache.set_complete("data")
    assert cache.is_complete("data") and not cache.is_complete("other data")
    with pytest.raises(DataError, match=r"sample p2: its log-probabilities are not in .*start again"):
        cache.sums(batch([0, 2]))
    assert not cache.is_complete("data")


def test_errors(tmp_path):
    (tmp_path / "name.logps").write_text("something else entirely, and not short")
    with pytest.raises(CheckpointError, match="is not a file of log-probabilities"):
        ReferenceCache(tmp_path, "name")
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"dpo\.cache .*file/below: cannot be used"):
        ReferenceCache(tmp_path / "file" / "below", "name")


# -- keys -------------------------------------------------------------------------------------------------------------


def test_a_pair_is_known_by_what_the_model_sees_of_it():
    given = PAIRS["pictures pair"]
    digest = pair_digest(given)
    assert len(digest) == 16
    wide = replace(given.chosen, input_ids=given.chosen.input_ids.astype(np.int32), id="elsewhere:7")
    assert pair_digest(Pair(wide, given.rejected)) == digest
    pixels = given.chosen.pixel_values.copy()
    pixels[-1, -1] += 1e-3
    labels = given.rejected.labels.copy()
    labels[-1] = -100
    ids = given.rejected.input_ids.copy()
    ids[0] += 1
    others = [
        Pair(replace(given.chosen, pixel_values=pixels), given.rejected),
        Pair(given.chosen, replace(given.rejected, labels=labels)),
        Pair(given.chosen, replace(given.rejected, input_ids=ids)),
        Pair(given.rejected, given.chosen),
        *(other for other in PAIRS.values() if other is not given),
    ]
    assert len({digest, *map(pair_digest, others)}) == len(others) + 1
    values = np.zeros((4, 3, 1, 4), np.uint8)
    made = [PatchBytes(values + one, 2, (mean,) * 3, (0.5,) * 3, 1 / 255) for one in (0, 1) for mean in (0.4, 0.5)]
    found = {pair_digest(Pair(replace(given.chosen, pixel_values=pixels), given.rejected)) for pixels in made}
    assert len(found | {digest}) == 5
    video = PAIRS["video pair"]
    slower = replace(video.chosen, second_per_grid_ts=video.chosen.second_per_grid_ts * 2)
    assert pair_digest(Pair(slower, video.rejected)) != pair_digest(video)


def name_of(directory, dtype) -> str:
    return reference_name(open_model(directory), dtype, ALONE)


def test_a_reference_is_known_by_its_weights(tiny, tmp_path):
    directory = tiny.directory("qwen2-tied")
    name = name_of(directory, "float32")
    copy = shutil.copytree(directory, tmp_path / "copy")
    assert name_of(copy, "float32") == name
    assert name_of(copy, "bfloat16") != name
    assert name_of(tiny.directory("qwen2-untied"), "float32") != name
    (path,) = copy.glob("*.safetensors")
    file = TensorFile(path)
    tensors = {key: np.array(file.view(key)) for key in file.specs}
    some = next(key for key in tensors if tensors[key].ndim == 2)
    tensors[some][0, 0] += 1e-3
    write_tensor_file(path, file.specs, tensors.__getitem__, file.metadata)
    assert name_of(copy, "float32") != name
