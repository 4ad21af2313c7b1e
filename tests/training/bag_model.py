"""A model small enough for many runs, and real: it learns the next word from the word and the mean of the sample.

Records are `{"messages": [{"role": "user", "content": "3 1 4"}, ...]}`: numbers are tokens, those of the assistant
are trained.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from duetvl.core.batch import IGNORE, Batch, Sample
from duetvl.core.errors import DataError
from duetvl.core.params import Parameter, Weights
from duetvl.core.random import philox
from duetvl.data.draft import Draft
from duetvl.data.sources.records import Record
from duetvl.models.layout import EVERY_TOKEN
from duetvl.training.job import Job
from duetvl.training.objective import TokenLoss

VOCABULARY, WIDTH = 11, 8
NO_GRIDS = np.zeros((0, 3), np.int64)


class BagModel:
    def __init__(self, backend, dtype="float32", seed=0):
        self.backend = backend
        self.parts = {"words": ("embed.", "head.")}
        shapes = {"embed.weight": (VOCABULARY, WIDTH), "norm.weight": (WIDTH,), "head.weight": (VOCABULARY, WIDTH)}
        self.parameters = {
            path: Parameter(path, backend.ops.from_numpy(self._initial(path, shape, seed), dtype))
            for path, shape in shapes.items()
        }

    @staticmethod
    def _initial(path, shape, seed):
        if len(shape) == 1:
            return np.ones(shape, np.float32)
        return philox(seed, path).standard_normal(shape, dtype=np.float32)

    def pack(self, samples):
        return pack(samples)

    def forward(self, batch, last, *, key=()):
        parameters = tuple(self.parameters.values())
        return self.backend.autograd.run_stage(lambda leaves: self._last(Weights(leaves), batch, last), (), parameters)

    def trained(self, batch):
        return EVERY_TOKEN

    def evaluate(self, batch, last):
        with self.backend.autograd.no_grad():
            return self._last(Weights({path: p.tensor for path, p in self.parameters.items()}), batch, last)

    def _last(self, w, batch, last):
        ops = self.backend.ops
        rows = np.flatnonzero(batch.targets != IGNORE).astype(np.int32)
        word = ops.take_rows(w.embed.weight, ops.from_numpy(batch.input_ids))
        lengths = np.diff(batch.cu_seqlens)
        mean = np.kron(np.eye(len(lengths)), [[1.0]]).repeat(lengths, axis=0)
        mean = (mean @ (mean / lengths).T).astype(np.float32)
        whole = ops.matmul(ops.from_numpy(mean), ops.cast(word, "float32"))
        hidden = ops.rms_norm(word + ops.cast(whole, ops.dtype_of(word)), w.norm.weight, eps=1e-6)
        return last(ops.take_rows(hidden, ops.from_numpy(rows)), w.head)


def pack(samples) -> Batch:
    lengths = [len(sample) for sample in samples]
    targets = np.full(sum(lengths), IGNORE, np.int32)
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    for start, sample in zip(starts, samples, strict=False):
        targets[start : start + len(sample) - 1] = sample.labels[1:]
    return Batch(
        input_ids=np.concatenate([sample.input_ids for sample in samples]).astype(np.int32),
        position_ids=np.zeros((3, sum(lengths)), np.int32),
        cu_seqlens=starts,
        targets=targets,
        pixel_rows=np.zeros((0, 1), np.float32),
        grids=np.zeros((0, 3), np.int64),
        visual_dst=np.zeros(0, np.int32),
        visual_src=np.zeros(0, np.int32),
        sample_ids=tuple(sample.id for sample in samples),
    )


class BagEncoder:
    """Samples have no pixels: a draft is all of it."""

    def draft(self, record: Record) -> Draft:
        sample = encode(record)
        return Draft(sample.id, record.where, sample.input_ids, sample.labels, NO_GRIDS, NO_GRIDS)

    def load(self, draft: Draft) -> Sample:
        return Sample(draft.input_ids, draft.labels, id=draft.id)

    def pack(self, samples) -> Batch:
        return pack(samples)


def encode(record: Record) -> Sample:
    ids, labels = [], []
    for message in record.values["messages"]:
        words = message["content"].split()
        if not all(word.isdigit() for word in words):
            raise DataError(f"{record.where}: not numbers: {message['content']!r}")
        numbers = [int(word) for word in words]
        ids += numbers
        labels += numbers if message["role"] == "assistant" else [IGNORE] * len(numbers)
    return Sample(np.array(ids, np.int64), np.array(labels, np.int64), id=record.id)


def prepare(recipe, backend) -> Job:
    model = BagModel(backend, recipe.model.dtype)
    return Job(model, TokenLoss(backend.ops), BagEncoder(), export=lambda ref, target: target.mkdir())


def write_records(path: Path, count: int, seed: int = 0) -> Path:
    """Each sample counts upwards from a number, modulo the vocabulary."""
    random = np.random.default_rng(seed)
    with open(path, "w", encoding="utf-8") as file:
        for _ in range(count):
            first, length = random.integers(0, VOCABULARY), random.integers(2, 9)
            numbers = [str((first + i) % VOCABULARY) for i in range(length + 2)]
            messages = [
                {"role": "user", "content": " ".join(numbers[:2])},
                {"role": "assistant", "content": " ".join(numbers[2:])},
            ]
            file.write(json.dumps({"messages": messages}) + "\n")
    return path
