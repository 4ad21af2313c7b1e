"""`duetvl chat`: a conversation in the terminal, over several turns, with pictures and videos."""

from __future__ import annotations

import argparse
import shlex
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import IO, Any, Final

from duetvl.commands.session import Say, Way, check_way, guides_of, load, make_engine, open_for_answers, way_of
from duetvl.core.batch import Pair, Sample
from duetvl.core.errors import ConfigError, DuetvlError, did_you_mean
from duetvl.data.conversation import Conversation, ImagePart, Part, Turn, VideoPart
from duetvl.data.encode import Processor
from duetvl.inference.engine import Engine
from duetvl.inference.guided import Guides
from duetvl.inference.sampling import Sampling

HELP: Final = """\
/image PATH   show a picture with the next message      /reset        begin a new conversation
/video PATH   show a video with it                      /params       how answers are made
/params NAME=VALUE ...   change that: temperature=0.7   /exit         leave (or the end of the input)"""
COMMANDS: Final = ("/image", "/video", "/reset", "/params", "/help", "/exit", "/quit")
_NUMBERS: Final = {"max_new_tokens": int, "min_new_tokens": int, "top_k": int, "seed": int}
_OF_THE_WAY: Final = ("max_new_tokens", "min_new_tokens")


class Chat:
    """A conversation with a model. What the user types goes through `line`."""

    def __init__(
        self, engine: Engine, processor: Processor, way: Way, *, system: str | None = None, out: Say, say: Say
    ):
        """`out` takes answers piece by piece, `say` all other lines."""
        self.engine, self.processor, self.way = engine, processor, way
        self.guides: Guides | None = None
        self.out, self.say = out, say
        self._system = () if system is None else (Turn("system", (system,)),)
        self._turns: list[Turn] = []
        self._media: list[Part] = []  # of the next message

    def line(self, text: str) -> bool:
        """Take a line of the user's; False where it is the last one. Raises DuetvlError for what cannot be done."""
        word, _, rest = text.strip().partition(" ")
        if not word:
            return True
        if not word.startswith("/"):
            self._answer(text.strip())
        elif word in ("/exit", "/quit"):
            return False
        elif word in ("/image", "/video"):
            self._show(word, rest)
        elif word == "/reset":
            self._turns, self._media = [], []
            self.say("a new conversation")
        elif word == "/params":
            self.way = changed(self.way, words_of(rest))
            self.say(told(self.way))
        elif word == "/help":
            self.say(HELP)
        else:
            raise ConfigError(f"{word} is not a command{did_you_mean(word, COMMANDS)}")
        return True

    def _show(self, word: str, path: str) -> None:
        given = words_of(path)
        if len(given) != 1:
            raise ConfigError(f"{word} takes the path of one file, found {path.strip() or 'nothing'}")
        part = ImagePart(given[0]) if word == "/image" else VideoPart(given[0])
        self._sample([*self._turns, Turn("user", (*self._media, part))])  # one that cannot be read is told at once
        self._media.append(part)

    def _answer(self, text: str) -> None:
        """One turn. A turn that fails, or is interrupted, leaves the conversation as it was."""
        turns = [*self._turns, Turn("user", (*self._media, text))]
        request = self.way.request(self._sample(turns), guide=self.guides)
        id = self.engine.submit(request)
        said = ""
        with held_back() as interrupted:
            while self.engine.busy:
                for delta in self.engine.step():
                    said += delta.text or ""
                    self.out(delta.text or "")
                    if delta.completion is not None and delta.completion.error is not None:
                        raise delta.completion.error
                if interrupted():
                    self.engine.cancel(id)
        self.out("\n")
        if interrupted():
            self.say("interrupted: this message is not part of the conversation")
        else:
            self._turns, self._media = [*turns, Turn("assistant", (said,))], []

    def _sample(self, turns: list[Turn]) -> Sample:
        conversation = Conversation((*self._system, *turns))
        made = self.processor.load(self.processor.draft(conversation, add_generation_prompt=True))
        assert not isinstance(made, Pair)
        return made


@contextmanager
def held_back() -> Iterator[Callable[[], bool]]:
    """Ctrl-C ends no pass over the model, which would be left half done; between passes one asks whether it came."""
    came: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: came.append(number))
    try:
        yield lambda: bool(came)
    finally:
        signal.signal(signal.SIGINT, before)


def words_of(text: str) -> list[str]:
    """What follows a command, as a shell would cut it into words. ConfigError for a quote that is not closed."""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise ConfigError(f"{text.strip()}: {error}; write \\' or \\\" for a literal quote") from None


def changed(way: Way, words: list[str]) -> Way:
    """`temperature=0.7 max_new_tokens=100` over how answers are made. ConfigError."""
    known = (*_OF_THE_WAY, *(name for name in vars(Sampling()) if name != "logit_bias"))
    values: dict[str, Any] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if name not in known or not equals:
            raise ConfigError(f"/params: {word!r} is not of the form NAME=VALUE{did_you_mean(name, known)}")
        try:
            values[name] = _NUMBERS.get(name, float)(value)
        except ValueError:
            raise ConfigError(f"/params: {name} is {value!r}, expected a number") from None
    own = {name: values.pop(name) for name in _OF_THE_WAY if name in values}
    found = replace(way, sampling=replace(way.sampling, **values), **own)
    if not 0 <= found.min_new_tokens <= found.max_new_tokens or found.max_new_tokens < 1:
        raise ConfigError("/params: expected max_new_tokens of at least 1, and min_new_tokens no larger")
    return found


def told(way: Way) -> str:
    """How answers are made, in one line."""
    return f"max_new_tokens {way.max_new_tokens}, {way.sampling.told()}"


def chat(args: argparse.Namespace, lines: IO[str], out: Say, say: Say) -> int:
    """Answer the lines of a stream until it ends. A line that fails is told, and the conversation goes on."""
    check_way(args)
    if args.logprobs is not None:
        raise ConfigError("--logprobs is not available in a chat; use duetvl infer -o")
    opened = open_for_answers(args, say)
    way = way_of(args, opened.defaults)
    guides = guides_of(args, opened, way)
    model = load(args, opened, say)
    talk = Chat(make_engine(model, args), opened.processor, way, system=args.system, out=out, say=say)
    talk.guides = guides
    prompt = "> " if lines.isatty() else ""
    say(HELP if prompt else told(way))
    while True:
        try:
            if prompt:
                out(prompt)
            text = lines.readline()
            if not text or not talk.line(text):
                return 0
        except DuetvlError as error:
            if talk.engine.lead is not None and talk.engine.lead.over:
                raise
            say(f"error: {error}")
        except KeyboardInterrupt:
            out("\n")
            return 0
