"""Which grammar an answer is to follow, and grammars that were compiled before."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Final, Literal, NamedTuple

from duetvl.core.errors import ConfigError
from duetvl.inference.guided import Grammars, Guides
from duetvl.serving.errors import ServerError
from duetvl.serving.protocol import Asked, ChatRequest, NamedTool, PlainFormat, SchemaFormat

KEPT: Final = 64  # compiled grammars
_MOST_CALLS: Final = 16  # of one answer that has to call


class Grammar(NamedTuple):
    """What an answer is to follow; `field` of the request asks for it."""

    kind: Literal["json", "regex", "choice", "calls"]
    value: Any
    field: str


def grammar_of(asked: Asked) -> Grammar | None:
    """The grammar that a request asks for. Raises ServerError where it asks for two."""
    grammars = [one for one in (_of_format(asked), _of_outputs(asked), _of_tools(asked)) if one is not None]
    if len(grammars) > 1:
        first, second = (one.field for one in grammars[:2])
        raise ServerError(f"{first} and {second} both say what an answer looks like; give one of them", param=second)
    if grammars and asked.ignore_eos:
        raise ServerError(f"{grammars[0].field} needs a token that ends the answer: leave out ignore_eos")
    return grammars[0] if grammars else None


def _of_format(asked: Asked) -> Grammar | None:
    chosen = asked.response_format if isinstance(asked, ChatRequest) else None
    if isinstance(chosen, SchemaFormat):
        return Grammar("json", chosen.json_schema.schema_, "response_format")
    if isinstance(chosen, PlainFormat) and chosen.type == "json_object":
        return Grammar("json", {"type": "object"}, "response_format")
    return None


def _of_outputs(asked: Asked) -> Grammar | None:
    outputs = asked.structured_outputs
    if outputs is None:
        return None
    values = {"json": outputs.json_, "regex": outputs.regex, "choice": outputs.choice}
    said = [(kind, value) for kind, value in values.items() if value is not None]
    if len(said) != 1:
        raise ServerError("structured_outputs takes one of json, regex and choice", param="structured_outputs")
    return Grammar(said[0][0], said[0][1], "structured_outputs")  # type: ignore[arg-type]


def _of_tools(asked: Asked) -> Grammar | None:
    if not isinstance(asked, ChatRequest) or asked.tool_choice in ("none", "auto"):
        return None
    only = asked.tool_choice.function.name if isinstance(asked.tool_choice, NamedTool) else None
    functions = {
        tool.function.name: tool.function.parameters for tool in asked.tools if only in (None, tool.function.name)
    }
    most = _MOST_CALLS if only is None and asked.parallel_tool_calls else 1
    return Grammar("calls", (functions, most), "tool_choice")


class KnownGrammars:
    """Compiles grammars, and keeps those of late. Used by one thread, which may wait for a compilation."""

    def __init__(self, make: Callable[[], Grammars]) -> None:
        """make: the compiler, which takes seconds to make; ConfigError where that is not installed."""
        self._make = make
        self._compiler: Grammars | None = None
        self._kept: OrderedDict[str, Guides | str] = OrderedDict()

    def guides(self, grammar: Grammar) -> Guides:
        """A compiled grammar. Raises ConfigError for one that cannot be used."""
        key = json.dumps(grammar[:2])
        guides = self._kept.pop(key, None)
        if guides is None:
            try:
                guides = self._compile(grammar)
            except ConfigError as error:  # one that takes too long is not tried again each time
                guides = str(error)
        self._kept[key] = guides
        if len(self._kept) > KEPT:
            self._kept.popitem(last=False)
        if isinstance(guides, str):
            raise ConfigError(guides)
        return guides

    def _compile(self, grammar: Grammar) -> Guides:
        if self._compiler is None:
            self._compiler = self._make()
        compiler, value = self._compiler, grammar.value
        if grammar.kind == "json":
            return compiler.json_schema(value)
        if grammar.kind == "regex":
            return compiler.regex(value)
        if grammar.kind == "choice":
            return compiler.choice(value)
        functions, most = value
        return compiler.calls(functions, most=most)
