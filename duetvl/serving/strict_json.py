"""JSON as it is written in RFC 8259, and no more: what Python's reader lets through beyond that is refused."""

from __future__ import annotations

import json
from typing import Any, Final, NoReturn

from duetvl.core.errors import shown
from duetvl.serving.errors import ServerError

DEEPEST: Final = 64  # objects and lists within each other
_MOST_DIGITS: Final = 64


def read_object(body: bytes) -> dict[str, Any]:
    """The object that a request's body is. Raises ServerError naming what is wrong with it.

    Refused besides what is no JSON: NaN and Infinity, numbers beyond float64, keys that an object has twice, deep
    nesting, lone surrogates and text that is not UTF-8.
    """
    try:
        text = body.decode("utf-8-sig")
        value = json.loads(
            text, object_pairs_hook=_unique, parse_constant=_no_constant, parse_float=_float, parse_int=_int
        )
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        raise _wrong(f"is not UTF-8: byte {error.start}") from None
    except UnicodeEncodeError:
        raise _wrong("contains half of a character (a lone surrogate)") from None
    except RecursionError:
        raise _too_deep() from None
    except ValueError as error:
        raise _wrong(f"is not JSON: {error}") from None
    _check_depth(value)
    if not isinstance(value, dict):
        raise _wrong(f"must be an object, found {shown(value)}")
    return value


def _wrong(what: str) -> ServerError:
    return ServerError(f"the body {what}", code="invalid_json")


def _too_deep() -> ServerError:
    return _wrong(f"is nested deeper than {DEEPEST} levels")


def _check_depth(value: Any) -> None:
    """Raise ServerError for what later code, which recurses, should not meet."""
    level = [value]
    for _ in range(DEEPEST + 1):
        inner = [one for one in level if isinstance(one, dict | list)]
        if not inner:
            return
        level = [child for one in inner for child in (one.values() if isinstance(one, dict) else one)]
    raise _too_deep()


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise _wrong(f"has the key {shown(twice)} twice in one object; keep one of them")
    return value


def _no_constant(name: str) -> NoReturn:
    raise _wrong(f"holds {name}, which is not JSON")


def _float(text: str) -> float:
    number = float(text)
    if number in (float("inf"), float("-inf")):
        raise _wrong(f"contains the number {shown(text)}, which is too large")
    return number


def _int(text: str) -> int:
    if len(text) > _MOST_DIGITS:
        raise _wrong(f"contains a number of {len(text)} digits")
    return int(text)
