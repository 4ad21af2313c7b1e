"""What a model's own `generation_config.json` says of sampling and of tokens that end an answer.

Users' values replace it. Nothing is taken over in silence: `Defaults.told` has the words.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from duetvl.core.errors import CheckpointError, ConfigError, shown
from duetvl.data.encode import Processor
from duetvl.inference.sampling import Sampling
from duetvl.storage.files import read_object

FILE: Final = "generation_config.json"
TAKEN: Final = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")

# Keys of transformers' generation configuration that change which tokens come, and the values at which they do nothing.
NOT_DONE: Final[Mapping[str, tuple[Any, ...]]] = {
    "num_beams": (1,), "num_beam_groups": (1,), "typical_p": (1.0,), "epsilon_cutoff": (0.0,), "eta_cutoff": (0.0,),
    "no_repeat_ngram_size": (0,), "encoder_no_repeat_ngram_size": (0,), "encoder_repetition_penalty": (1.0,),
    "penalty_alpha": (0.0,), "diversity_penalty": (0.0,), "bad_words_ids": (), "suppress_tokens": (),
    "begin_suppress_tokens": (), "forced_bos_token_id": (), "forced_eos_token_id": (), "forced_decoder_ids": (),
    "guidance_scale": (1.0,), "sequence_bias": ({},), "exponential_decay_length_penalty": (), "force_words_ids": (),
    "constraints": (), "min_length": (0,), "dola_layers": (), "watermarking_config": (), "token_healing": (),
    "max_time": (),
}  # fmt: skip
_OPTIONS: Final[Mapping[str, tuple[Any, ...]]] = {"min_new_tokens": (0,), "stop_strings": ()}  # a user's, not a model's


@dataclass(frozen=True)
class Defaults:
    """What answers are made with where the user says nothing.

    stop_ids end an answer. ignored: what the file asks for and is not done, in words.
    """

    sampling: Sampling = field(default_factory=Sampling)
    stop_ids: frozenset[int] = frozenset()
    source: Path | None = None
    ignored: tuple[str, ...] = ()

    @property
    def told(self) -> str:
        """What was taken over, and what was not, in one line; empty where nothing was."""
        if self.source is None or (self.sampling == Sampling() and not self.ignored):
            return ""
        left = f"; not done: {', '.join(self.ignored)}" if self.ignored else ""
        return f"{self.source}: sampling: {self.sampling.told()}{left}"


def read_defaults(directory: Path, processor: Processor) -> Defaults:
    """The defaults of a model directory; greedy, and the tokenizer's ends, where it has no such file.

    CheckpointError for a file that cannot be read or makes no sense.
    """
    usual = frozenset(processor.stop_token_ids)
    file = directory / FILE
    if not file.is_file():
        return Defaults(stop_ids=usual)
    found = read_object(file, CheckpointError)
    values = {key: found[key] for key in TAKEN if found.get(key) is not None}
    if not found.get("do_sample", False):
        values = {key: value for key, value in values.items() if key == "repetition_penalty"}
    else:
        values = {"temperature": 1.0, "top_k": 50, **values}  # transformers' own where its file says nothing
    try:
        sampling = Sampling(**values)
    except ConfigError as error:
        raise CheckpointError(f"{file}: {error}") from None
    return Defaults(sampling, _ends(found.get("eos_token_id"), file) or usual, file, ignored_keys(found))


def ignored_keys(found: Mapping[str, Any]) -> tuple[str, ...]:
    """What of a generation configuration would change the answer and is not done: `num_beams 4`."""
    return tuple(
        f"{key} {shown(found[key], 40)}"
        for key, nothing in {**NOT_DONE, **_OPTIONS}.items()
        if changes_tokens(found.get(key), nothing)
    )


def changes_tokens(value: Any, nothing: tuple[Any, ...]) -> bool:
    """Whether a key's value asks for something; `nothing` are those at which it does not."""
    return value is not None and value is not False and value != [] and value not in nothing


def _ends(value: Any, file: Path) -> frozenset[int]:
    """The tokens of `eos_token_id`: one, several, or none."""
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(number, int) and not isinstance(number, bool) and number >= 0 for number in ids):
        raise CheckpointError(f"{file}: eos_token_id is {shown(value)}, expected a token id or a list of them")
    return frozenset(ids)
