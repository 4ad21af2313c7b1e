"""Who may ask, how much, and how many at a time: keys and limits. `guards.py` holds them against what comes in."""

from __future__ import annotations

import hashlib
import hmac
import math
import re
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from http import HTTPStatus
from pathlib import Path
from typing import Final

from duetvl.core.errors import ConfigError, shown
from duetvl.serving.errors import ServerError

KEYS_VARIABLE: Final = "DUETVL_API_KEYS"
_KEY: Final = re.compile(r"[!-~]{8,512}")
_NAME: Final = re.compile(r"[A-Za-z0-9._-]{1,64}")
_LONGEST_WAIT: Final = 60.0  # seconds; OpenAI's client takes no longer advice than this


# -- keys ------------------------------------------------------------------------------------------------------------


class Keys:
    """The keys of a server, each under the name of who holds it. Without any, everybody may ask.

    The keys themselves are not kept, only their digests.
    """

    def __init__(self, keys: Mapping[str, str]) -> None:
        """keys: name -> key. Raises ConfigError, which shows no key."""
        for name, key in keys.items():
            if not _NAME.fullmatch(name):
                raise ConfigError(f"API keys: the name {shown(name)} is not of 1 to 64 letters, digits and . _ -")
            if not _KEY.fullmatch(key):
                raise ConfigError(
                    f"API keys: that of {name!r} is not of 8 to 512 printable ASCII characters, no blanks"
                )
        self._digests = {name: _digest(key) for name, key in keys.items()}
        if len(set(self._digests.values())) < len(keys):
            raise ConfigError("API keys: two names have the same key; give each its own, or leave one out")

    @classmethod
    def read(cls, path: Path | None, environment: Mapping[str, str]) -> Keys:
        """Keys from a file, one `name:key` or `key` a line, and from `DUETVL_API_KEYS`, where commas part them.

        Empty lines and those that begin with # say nothing; a key without a name is called key-1, key-2 and so on.
        Raises ConfigError for a file that cannot be read or has no key in it.
        """
        entries = [entry for entry in environment.get(KEYS_VARIABLE, "").split(",") if entry.strip()]
        if path is not None:
            try:
                lines = path.read_text(encoding="utf-8").splitlines()
            except (OSError, UnicodeError) as error:
                raise ConfigError(
                    f"API keys: {path} cannot be read: {getattr(error, 'strerror', '') or error}"
                ) from None
            own = [line for line in lines if line.strip() and not line.lstrip().startswith("#")]
            if not own:  # a server that was meant to be guarded must not stand open
                raise ConfigError(f"API keys: there is none in {path}; write one a line, as name:key")
            entries += own
        keys: dict[str, str] = {}
        for number, entry in enumerate(entries, 1):
            name, colon, key = entry.strip().partition(":")
            name, key = (name.strip(), key.strip()) if colon else (f"key-{number}", name)
            if name in keys:
                raise ConfigError(f"API keys: the name {shown(name)} is given twice")
            keys[name] = key
        return cls(keys)

    def __bool__(self) -> bool:
        return bool(self._digests)

    def check(self, authorization: str | None) -> str:
        """The name of who holds the key of an `Authorization` header; "" where no keys are asked for.

        Raises ServerError (401). How long it takes does not depend on how much of a key is right.
        """
        if not self._digests:
            return ""
        scheme, _, key = (authorization or "").strip().partition(" ")
        digest = _digest(key.strip() if scheme.lower() == "bearer" else "")
        holders = [name for name, own in self._digests.items() if hmac.compare_digest(own, digest)]
        if not holders:
            words = "the API key is wrong" if authorization else "an API key is needed"
            raise ServerError(
                f"{words}; send the header `Authorization: Bearer KEY`",
                status=HTTPStatus.UNAUTHORIZED,
                code="invalid_api_key",
            )
        return holders[0]


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


# -- limits ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Limits:
    """What one server takes. Raises ConfigError for what makes no sense.

    body_bytes: of one request's body. body_seconds: in which all of it is to come. requests: under way at once, those
    that wait and those that are answered; one more is told to come again. per_key: of these, with one and the same
    key; None for all. prompt_tokens and output_tokens: of one prompt, and of one answer; None for what the model's
    context has room for. seconds: from a request's arrival to the end of its answer, which is then cut off.
    """

    body_bytes: int = 128 << 20
    body_seconds: float = 60.0
    requests: int = 256
    per_key: int | None = None
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    seconds: float = 600.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None and not value > 0:
                raise ConfigError(f"limit {field.name} is {shown(value)}, it must be above 0")

    def check_output(self, tokens: int, param: str = "max_tokens") -> None:
        """Raise ServerError where an answer of too many tokens is asked for."""
        if self.output_tokens is not None and tokens > self.output_tokens:
            raise ServerError(
                f"{param} is {tokens}, this server gives answers of {self.output_tokens} tokens", param=param
            )


class Admission:
    """Counts the requests under way; may be asked from any one thread, that of the event loop."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.under_way = 0
        self._by_key: Counter[str] = Counter()
        self._mean = 1.0  # seconds that a request takes, of the latest ones

    @contextmanager
    def enter(self, tenant: str) -> Iterator[None]:
        """A request is under way as long as this lasts. Raises ServerError (429) where there are too many."""
        if self.under_way >= self.limits.requests:
            raise self._full(f"{self.under_way} requests are running, this server accepts no more at once")
        most = self.limits.per_key
        if tenant and most is not None and self._by_key[tenant] >= most:
            raise self._full(f"{most} requests are running with this key, which may have no more at once")
        start = time.monotonic()
        self.under_way += 1
        self._by_key[tenant] += 1
        try:
            yield
        finally:
            self.under_way -= 1
            self._by_key[tenant] -= 1
            self._mean += (time.monotonic() - start - self._mean) / 16

    def _full(self, words: str) -> ServerError:
        # After as long as a request takes, those that are under way now are answered.
        wait = min(_LONGEST_WAIT, math.ceil(max(1.0, self._mean)))
        return ServerError(
            f"{words}; ask again in {wait:g} seconds",
            status=HTTPStatus.TOO_MANY_REQUESTS,
            kind="rate_limit_error",
            code="rate_limit_exceeded",
            retry_after=wait,
        )
