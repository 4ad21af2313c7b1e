"""The weights of a model directory by canonical name, the head of a tied model looked at."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np

from duetvl.core.errors import CheckpointError
from duetvl.core.half import widened
from duetvl.models.qwen_vl.config import ModelConfig
from duetvl.models.qwen_vl.names import canonical_names
from duetvl.models.qwen_vl.parameters import parameter_shapes
from duetvl.storage.weights_dir import StoredWeights, open_weights

HEAD: Final = "lm_head.weight"
EMBEDDING: Final = "model.embed_tokens.weight"
_ROWS: Final = 4096


def open_model_weights(directory: str | Path, config: ModelConfig) -> StoredWeights:
    """Open the weights of a model; what they must be is `StoredWeights.check`'s to say.

    A head that the configuration ties to the embedding is left out where both are stored with the same numbers.
    CheckpointError where they differ, since one of the two would be lost, and where an untied head is absent.
    """
    weights = open_weights(directory, canonical_names(tied=False))
    places = dict(weights.places)
    if config.tie_word_embeddings and HEAD in places:
        if EMBEDDING in places and not _same(weights):
            raise CheckpointError(
                f"{directory}: config.json ties the head to the embedding (tie_word_embeddings), but {HEAD} is "
                f"stored with other values than {EMBEDDING}; set tie_word_embeddings to false to use it, or remove "
                "the tensor"
            )
        del places[HEAD]
    elif not config.tie_word_embeddings and places.keys() == parameter_shapes(config).keys() - {HEAD}:
        raise CheckpointError(
            f"{directory}: {HEAD} is absent, and config.json does not tie the head to the embedding; set "
            f"tie_word_embeddings to true where it is tied, as in the models of 2B and 3B"
        )
    return StoredWeights(weights.directory, places)


def _same(weights: StoredWeights) -> bool:
    """Whether head and embedding hold the same numbers."""
    head, embedding = weights.spec(HEAD), weights.spec(EMBEDDING)
    if head.shape != embedding.shape:
        return False
    try:
        return all(
            np.array_equal(_numbers(weights, HEAD, start), _numbers(weights, EMBEDDING, start))
            for start in range(0, head.shape[0], _ROWS)
        )
    finally:
        weights.release(HEAD)
        weights.release(EMBEDDING)


def _numbers(weights: StoredWeights, name: str, start: int) -> np.ndarray:
    rows = np.require(weights.view(name)[start : start + _ROWS], requirements="A")
    return widened(rows, weights.spec(name).dtype)
