"""The tokenizer: text to ids without control tokens, and what of it structures a conversation."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from duetvl.core.errors import CheckpointError, ConfigError
from duetvl.core.family import Family
from duetvl.data.template import TURN_END, TURN_START

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_SHORT_TEXT: Final = 40  # letters
_KNOWN_TEXTS: Final = 1024
_END_OF_TEXT: Final = "<|endoftext|>"
_MEDIA_TOKENS: Final = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>")
_PADS: Final = {"image": "<|image_pad|>", "video": "<|video_pad|>"}


def _letter_bytes() -> dict[str, int]:
    """What byte each letter of a byte-level token is: those that can be printed themselves, the others from 256 on."""
    plain = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return {chr(byte if byte in plain else next(others)): byte for byte in range(256)}


_LETTER_BYTES: Final = _letter_bytes()


class TextTokenizer:
    """A tokenizer that never makes a control token out of text.

    `<|im_end|>` or `<|image_pad|>` typed by someone become ordinary tokens that spell them. Markup
    that the models were taught to read in text (`<|box_start|>`, `<|object_ref_start|>`, ...) stays
    the token it is. The tokenizer is used as its own from here on: its settings are changed.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        tokenizer.encode_special_tokens = True  # special tokens in text are text
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self._tokenizer = tokenizer
        control = {TURN_START, TURN_END, _END_OF_TEXT, *_MEDIA_TOKENS, *_PADS.values()}
        added = {item.content: (number, item.special) for number, item in tokenizer.get_added_tokens_decoder().items()}
        self._control_ids = {number for text, (number, _) in added.items() if text in control}
        self._control = _any_of(text for text in added if text in control)
        self._markup_ids = {
            text: number for text, (number, special) in added.items() if special and text not in control
        }
        self._markup = _any_of(self._markup_ids)
        self._short = lru_cache(_KNOWN_TEXTS)(self._encode)

    def __reduce__(self) -> tuple[type[TextTokenizer], tuple[Tokenizer]]:
        # A pickled tokenizer forgets `encode_special_tokens`, so a copy goes through __init__ as well.
        return TextTokenizer, (self._tokenizer,)

    def to_json(self) -> str:
        """All of it, as tokenizer.json has it."""
        return str(self._tokenizer.to_str())

    def token_id(self, token: str) -> int | None:
        """The id of one token by its spelling."""
        return self._tokenizer.token_to_id(token)

    @property
    def largest_id(self) -> int:
        """The largest id of any token, control tokens and added ones included."""
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)

    @cached_property
    def longest(self) -> int:
        """The most characters of a text that one token stands for."""
        letters = max(map(len, self._tokenizer.get_vocab(with_added_tokens=True)), default=1)
        return 4 * letters  # tokens spell bytes, and are made of normalised text, which may be shorter

    def encode(self, text: str) -> list[int]:
        """Ids of a text; none of them is a control token."""
        # Headers, line ends and the usual system text come with every sample.
        return list(self._short(text) if len(text) <= _SHORT_TEXT else self._encode(text))

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for piece in self._markup.split(text):
            known = self._markup_ids.get(piece)
            ids.extend(self._plain(piece) if known is None else [known])
        return ids

    def decode(self, ids: Sequence[int] | np.ndarray, *, skip_special_tokens: bool = True) -> str:
        """The text of ids."""
        return self._tokenizer.decode([int(number) for number in ids], skip_special_tokens=skip_special_tokens)

    @cached_property
    def is_byte_level(self) -> bool:
        """Whether its tokens spell bytes, as Qwen's do: then `bytes_of` tokens put together are `decode`d ones."""
        return type(self._tokenizer.decoder).__name__ == "ByteLevel"

    def bytes_of(self, number: int) -> bytes:
        """The bytes that a token stands for; of a control token and an id that is no token nothing.

        The bytes of an answer's tokens, one after the other, are its text in UTF-8, wrong bytes aside.
        """
        return b"" if number in self._special_ids else self.spelling(number)

    def spelling(self, number: int) -> bytes:
        """The same, control tokens spelt out."""
        token = self._tokenizer.id_to_token(int(number)) or ""
        try:
            return bytes(_LETTER_BYTES[letter] for letter in token)
        except KeyError:  # as the library does, for a whole token
            return token.encode()

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        added = self._tokenizer.get_added_tokens_decoder()
        return frozenset(number for number, token in added.items() if token.special)

    def _plain(self, text: str) -> list[int]:
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        if self._control_ids.isdisjoint(ids):
            return ids
        # This tokenizer does not mark its control tokens as special: cut each after a letter.
        cuts = [0, *(match.start() + 1 for match in self._control.finditer(text)), len(text)]
        parts = (text[start:stop] for start, stop in pairwise(cuts))
        return [number for part in parts for number in self._tokenizer.encode(part, add_special_tokens=False).ids]


@dataclass(frozen=True)
class ControlTokens:
    """Ids of the tokens that structure a conversation."""

    turn_start: int
    turn_end: int
    end_of_text: int | None


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """A pattern that matches, and captures, any of the texts; without texts it matches nothing."""
    longest_first = sorted(texts, key=len, reverse=True)
    return re.compile("(" + "|".join(map(re.escape, longest_first)) + ")" if longest_first else r"(?!)")


def control_tokens(tokenizer: TextTokenizer, family: Family) -> ControlTokens:
    """The ids that structure a conversation. Raises ConfigError where tokenizer and model do not go together."""
    start, end = tokenizer.token_id(TURN_START), tokenizer.token_id(TURN_END)
    if start is None or end is None:
        raise ConfigError(f"the tokenizer has no {TURN_START} or no {TURN_END}; it belongs to another model")
    expected = (
        ("<|vision_start|>", family.special.vision_start),
        ("<|vision_end|>", family.special.vision_end),
        (_PADS["image"], family.special.image),
        (_PADS["video"], family.special.video),
    )
    for token, number in expected:
        if tokenizer.token_id(token) != number:
            raise ConfigError(
                f"the tokenizer gives {token} the id {tokenizer.token_id(token)}, the model's "
                f"config.json {number}; they belong to different models"
            )
    return ControlTokens(start, end, tokenizer.token_id(_END_OF_TEXT))


def read_tokenizer(directory: Path) -> TextTokenizer:
    """The tokenizer of a directory, from `tokenizer.json` or else by way of transformers.

    transformers is imported only for a directory without that file: it takes seconds, and brings
    torch into processes that run on another backend.
    """
    file = directory / "tokenizer.json"
    try:
        if file.is_file():
            from tokenizers import Tokenizer

            return TextTokenizer(Tokenizer.from_file(str(file)))
        if not (directory / "vocab.json").is_file():
            raise CheckpointError(f"{directory}: has no tokenizer.json (nor vocab.json)")
        from transformers import AutoTokenizer

        return TextTokenizer(AutoTokenizer.from_pretrained(str(directory), local_files_only=True).backend_tokenizer)
    except CheckpointError:
        raise
    except Exception as error:  # tokenizers raises bare Exception for a damaged file
        raise CheckpointError(f"{directory}: the tokenizer cannot be read: {error}") from None
