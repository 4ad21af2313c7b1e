"""What is asked: one prompt with its media, records of a file, or the pictures of a directory."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from duetvl.core.batch import Sample
from duetvl.core.errors import ConfigError, DataError
from duetvl.data.conversation import Conversation, ImagePart, Preference, Turn, VideoPart
from duetvl.data.digest import digest, digest_of
from duetvl.data.encode import Processor, conversation_of
from duetvl.data.sources.catalog import Records
from duetvl.data.sources.records import Record
from duetvl.inference.answering import sample_of

PICTURES: Final = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
VIDEOS: Final = (".mp4", ".avi", ".mkv", ".mov", ".webm", ".m4v", ".mpg", ".mpeg")


@dataclass(frozen=True)
class Ask:
    """One thing to be answered. `read` gives the conversation, whose last turn is not the assistant's."""

    id: str
    read: Callable[[], Conversation]

    def sample(self, processor: Processor) -> Sample:
        """The prompt with its pixels. Raises DataError naming it."""
        return sample_of(processor, self.read(), self.id)

    def key(self, way: str) -> str:
        """32 digits that change when what is asked does, or how (`way`); of media in files their size and time."""
        try:
            return digest(self.read(), way)
        except DataError as error:
            return digest_of([way, [self.id, str(error)]])


def asks_of(args: argparse.Namespace) -> Sequence[Ask]:
    """Everything that the options ask. Raises ConfigError or DataError; records themselves are read later."""
    if args.input is None:
        if args.prompt is None and not args.media:
            raise ConfigError("there is no question: give --prompt TEXT, or --input FILE or DIR")
        return [Ask("prompt", lambda: _conversation(args, args.media or []))]
    if args.media:
        raise ConfigError(
            "--image and --video do not go with --input, whose records and directories have their own media"
        )
    if args.prompt is not None:
        return _pictures(args)
    if args.system is not None:
        raise ConfigError("--system does not apply to records, which have their own system messages")
    return _RecordAsks(Records([args.input]))


def _conversation(args: argparse.Namespace, media: Sequence[tuple[str, str]]) -> Conversation:
    """Media first and then the text, as the model was taught to read them."""
    kinds: dict[str, type[ImagePart | VideoPart]] = {"image": ImagePart, "video": VideoPart}
    parts = [kinds[kind](path) for kind, path in media]
    system = () if args.system is None else (Turn("system", (args.system,)),)
    return Conversation((*system, Turn("user", (*parts, *([args.prompt] if args.prompt else [])))))


def _pictures(args: argparse.Namespace) -> Sequence[Ask]:
    """Every picture and video of a directory, in the order of their names."""
    if not args.input.is_dir():
        raise ConfigError(f"--prompt is asked of the pictures of a directory; {args.input} is none: leave out --prompt")
    files = sorted(path for path in args.input.iterdir() if path.suffix.lower() in PICTURES + VIDEOS and path.is_file())
    if not files:
        found = f"expected {', '.join(PICTURES + VIDEOS)}"
        raise ConfigError(f"{args.input}: a directory without pictures and videos ({found})")

    def ask(path: Path) -> Ask:
        kind = "video" if path.suffix.lower() in VIDEOS else "image"
        return Ask(path.name, lambda: _conversation(args, [(kind, str(path))]))

    return [ask(path) for path in files]


class _RecordAsks(Sequence[Ask]):
    """The records of data sets; one is read when it is asked for."""

    def __init__(self, records: Records):
        self._records = records

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, number: Any) -> Any:
        file, _, place = self._records.ref(number)
        name = f"{self._records.files[file].path.name}:{place}"
        return Ask(name, lambda: prompt_of(self._records[number]))


def prompt_of(record: Record) -> Conversation:
    """A record without its last answer, if it has one; of a pair of answers what both answer. Raises DataError."""
    try:
        found = conversation_of(record, answered=False)
        conversation = found.prompt if isinstance(found, Preference) else found
        turns = conversation.turns
        turns = turns[:-1] if turns[-1].role == "assistant" else turns
        if not turns or turns[-1].role == "system":
            raise DataError("has no question: no message of the user")
        return replace(conversation, turns=turns)
    except DataError as error:
        raise type(error)(f"{record.where}: {error}") from None
