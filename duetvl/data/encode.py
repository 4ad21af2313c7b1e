"""The processor: conversations to samples, samples to batches, token ids to text."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np

from duetvl.core.batch import IGNORE, Batch, Sample
from duetvl.core.errors import CheckpointError, ConfigError, DataError
from duetvl.core.family import Family, PatchGeometry
from duetvl.data.conversation import DEFAULT_FPS, Conversation, ImagePart, VideoPart
from duetvl.data.formats import read_record
from duetvl.data.images import PatchRows, PixelSettings, image_patches, video_patches
from duetvl.data.messages import read_messages
from duetvl.data.template import TURN_END, TURN_START, Piece, render

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_END_OF_TEXT: Final = "<|endoftext|>"
_MEDIA_TOKENS: Final = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>")
_PADS: Final = {"image": "<|image_pad|>", "video": "<|video_pad|>"}


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

    def token_id(self, token: str) -> int | None:
        """The id of one token by its spelling."""
        return self._tokenizer.token_to_id(token)

    def encode(self, text: str) -> list[int]:
        """Ids of a text; none of them is a control token."""
        ids: list[int] = []
        for piece in self._markup.split(text):
            known = self._markup_ids.get(piece)
            ids.extend(self._plain(piece) if known is None else [known])
        return ids

    def decode(self, ids: Sequence[int] | np.ndarray, *, skip_special_tokens: bool = True) -> str:
        """The text of ids."""
        return self._tokenizer.decode([int(number) for number in ids], skip_special_tokens=skip_special_tokens)

    def _plain(self, text: str) -> list[int]:
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        if self._control_ids.isdisjoint(ids):
            return ids
        # This tokenizer does not mark its control tokens as special: cut each after a letter.
        cuts = [0, *(match.start() + 1 for match in self._control.finditer(text)), len(text)]
        parts = (text[start:stop] for start, stop in pairwise(cuts))
        return [number for part in parts for number in self._tokenizer.encode(part, add_special_tokens=False).ids]


class _Encoded(NamedTuple):
    """Ids of one piece, whether they are trained, and its pixels."""

    ids: list[int]
    trained: bool
    pixels: PatchRows | None = None


@dataclass(frozen=True)
class ControlTokens:
    """Ids of the tokens that structure a conversation."""

    turn_start: int
    turn_end: int
    end_of_text: int | None


class Processor:
    """Makes samples of conversations, and batches of samples, for one model."""

    def __init__(
        self,
        tokenizer: TextTokenizer,
        family: Family,
        image_settings: PixelSettings,
        video_settings: PixelSettings | None = None,
    ) -> None:
        """`video_settings` bound each frame; where none are given a frame is bound like a picture.

        Raises ConfigError when the tokenizer is not that of the model.
        """
        self.tokenizer = tokenizer
        self.family = family
        self.image_settings = image_settings
        self.video_settings = image_settings if video_settings is None else video_settings
        self.control = _control_tokens(tokenizer, family)

    @classmethod
    def from_directory(cls, directory: str | Path, family: Family) -> Processor:
        """Read the tokenizer and the pixel settings of a model directory.

        Raises CheckpointError for what is missing or damaged, ConfigError for what does not fit.
        """
        path = Path(directory)
        image, video = _read_pixel_settings(path, family.geometry)
        return cls(TextTokenizer(_read_tokenizer(path)), family, image, video)

    def __call__(self, messages: Any, *, add_generation_prompt: bool = False, sample_id: str = "") -> Sample:
        """Encode one conversation, see `duetvl.data.messages.read_messages`.

        Labels cover the assistant's turns. Raises DataError.
        """
        pieces = render(read_messages(messages), add_generation_prompt=add_generation_prompt)
        return self._sample(list(pieces), sample_id)

    def encode_record(
        self, record: Mapping[str, Any], *, media_dir: str | Path | None = None, sample_id: str = ""
    ) -> Sample:
        """Encode one record of any layout, see `duetvl.data.formats.read_record`. Raises DataError."""
        conversation = read_record(record, media_dir=None if media_dir is None else Path(media_dir))
        if not isinstance(conversation, Conversation):
            raise DataError("the record is a pair of answers, which is not trained here")
        return self._sample(list(render(conversation)), sample_id)

    def pack(self, samples: Sequence[Sample]) -> Batch:
        """Lay samples end to end, see `Family.pack`. Raises DataError naming a wrong sample."""
        return self.family.pack(samples)

    def decode(self, ids: Sequence[int] | np.ndarray, *, skip_special_tokens: bool = True) -> str:
        """The text of ids."""
        return self.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer."""
        ends = (self.control.turn_end, self.control.end_of_text)
        return tuple(number for number in ends if number is not None)

    def _sample(self, pieces: Sequence[Piece], sample_id: str) -> Sample:
        encoded = [self._encode(piece) for piece in pieces]
        ids = np.array([number for part in encoded for number in part.ids], np.int64)
        trained = np.repeat([part.trained for part in encoded], [len(part.ids) for part in encoded])
        media = {
            kind: [
                part.pixels
                for piece, part in zip(pieces, encoded, strict=True)
                if piece.kind == kind and part.pixels is not None
            ]
            for kind in ("image", "video")
        }
        seconds = [self._second_per_grid(piece.medium) for piece in pieces if piece.kind == "video"]
        return Sample(
            input_ids=ids,
            labels=np.where(trained, ids, IGNORE),
            pixel_values=_rows(media["image"]),
            image_grid_thw=_grids(media["image"]),
            pixel_values_videos=_rows(media["video"]),
            video_grid_thw=_grids(media["video"]),
            second_per_grid_ts=np.array(seconds, np.float32) if seconds else None,
            id=sample_id,
        )

    def _encode(self, piece: Piece) -> _Encoded:
        if piece.kind == "text":
            return _Encoded(self.tokenizer.encode(piece.text), piece.trained)
        if piece.kind == "control":
            control = self.control
            number = control.turn_start if piece.text == TURN_START else control.turn_end
            return _Encoded([number], piece.trained)
        pixels = self._pixels(piece.medium)
        special = self.family.special
        pad = special.image if piece.kind == "image" else special.video
        count = self.family.placeholder_count(pixels.grid)
        return _Encoded([special.vision_start, *[pad] * count, special.vision_end], piece.trained, pixels)

    def _pixels(self, medium: ImagePart | VideoPart | None) -> PatchRows:
        geometry = self.family.geometry
        if isinstance(medium, ImagePart):
            return image_patches(medium.source, self.image_settings, geometry, medium.wish)
        assert isinstance(medium, VideoPart)
        if isinstance(medium.source, str | bytes | Path):
            raise DataError(f"video files are not read yet; give {str(medium.source)!r:.80} as a list of its frames")
        return video_patches(medium.source, self.video_settings, geometry, medium.wish)

    def _second_per_grid(self, medium: ImagePart | VideoPart | None) -> float:
        assert isinstance(medium, VideoPart)
        if medium.second_per_grid is not None:
            return medium.second_per_grid
        return self.family.geometry.temporal / (medium.fps or DEFAULT_FPS)


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """A pattern that matches, and captures, any of the texts; without texts it matches nothing."""
    longest_first = sorted(texts, key=len, reverse=True)
    return re.compile("(" + "|".join(map(re.escape, longest_first)) + ")" if longest_first else r"(?!)")


def _control_tokens(tokenizer: TextTokenizer, family: Family) -> ControlTokens:
    start, end = tokenizer.token_id(TURN_START), tokenizer.token_id(TURN_END)
    if start is None or end is None:
        raise ConfigError(f"the tokenizer has no {TURN_START} or no {TURN_END}; it is of another model")
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
                f"config.json {number}; they are of different models"
            )
    return ControlTokens(start, end, tokenizer.token_id(_END_OF_TEXT))


def _rows(media: Sequence[PatchRows]) -> np.ndarray | None:
    """Patch rows of all media of one kind; a single one is not copied."""
    if not media:
        return None
    return media[0].rows if len(media) == 1 else np.concatenate([medium.rows for medium in media])


def _grids(media: Sequence[PatchRows]) -> np.ndarray:
    return np.array([medium.grid for medium in media], np.int64).reshape(-1, 3)


def _read_tokenizer(directory: Path) -> Tokenizer:
    """The tokenizer of a directory, from `tokenizer.json` or else by way of transformers.

    transformers is imported only for a directory without that file: it takes seconds, and brings
    torch into processes that run on another backend.
    """
    file = directory / "tokenizer.json"
    try:
        if file.is_file():
            from tokenizers import Tokenizer

            return Tokenizer.from_file(str(file))
        if not (directory / "vocab.json").is_file():
            raise CheckpointError(f"{directory}: has no tokenizer.json (nor vocab.json)")
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(str(directory), local_files_only=True).backend_tokenizer
    except CheckpointError:
        raise
    except Exception as error:  # tokenizers raises bare Exception for a damaged file
        raise CheckpointError(f"{directory}: the tokenizer cannot be read: {error}") from None


def _read_pixel_settings(directory: Path, geometry: PatchGeometry) -> tuple[PixelSettings, PixelSettings]:
    """Settings of pictures and of video frames.

    Directories without settings for videos, as the published ones, use those of pictures for both;
    transformers 5 keeps both kinds in one file.
    """
    found = dict(_setting_files(directory))
    if "image" not in found:
        raise CheckpointError(f"{directory}: has no preprocessor_config.json")
    settings = []
    for kind in ("image", "video"):
        name, data = found.get(kind, found["image"])
        try:
            settings.append(PixelSettings.from_dict(data, geometry))
        except (ConfigError, TypeError, ValueError, AttributeError) as error:
            raise ConfigError(f"{directory / name}: {error}") from None
    return settings[0], settings[1]


def _setting_files(directory: Path) -> Iterator[tuple[str, tuple[str, dict[str, Any]]]]:
    """What each file says: (kind, (file name, content)); a later one replaces an earlier one."""
    merged = _read_json(directory / "processor_config.json") or {}
    for kind in ("image", "video"):
        if merged.get(f"{kind}_processor"):
            yield kind, ("processor_config.json", merged[f"{kind}_processor"])
    names = {"image": "preprocessor_config.json", "video": "video_preprocessor_config.json"}
    for kind, name in names.items():
        data = _read_json(directory / name)
        if data is not None:
            yield kind, (name, data)


def _read_json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: expected an object, found {type(data).__name__}")
    return data
