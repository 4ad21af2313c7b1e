"""Functions that an assistant may call, and its calls, as text.

The layout is that of LLaMA-Factory's tool format `qwen`, which is that of Qwen2.5's published chat template (of the
kind that Hermes models introduced): the functions stand as JSON, one a line, in `<tools>` at the end of the system
prompt; a call is a JSON object in `<tool_call>`. Results are laid out by `duetvl.data.template`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from duetvl.core.errors import DataError, shown
from duetvl.storage.files import json_value

_BEFORE: Final = (
    "\n\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>"
)
_AFTER: Final = (
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments within "
    '<tool_call></tool_call> XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n'
    "</tool_call>"
)
_THOUGHT: Final = re.compile("<think>.*?</think>\n*", re.DOTALL)


def tools_text(tools: Sequence[Mapping[str, Any]]) -> str:
    """What follows the system prompt: the functions and how to call them; nothing without functions."""
    if not tools:
        return ""
    wrapped = (tool if tool.get("type") == "function" else {"type": "function", "function": tool} for tool in tools)
    return _BEFORE + "".join("\n" + _json(tool) for tool in wrapped) + _AFTER


def read_tools(value: Any) -> tuple[dict[str, Any], ...]:
    """A record's functions: a list of JSON schemas, or the text of one. Raises DataError."""
    listed = parse_json("tools", value) if isinstance(value, str) and value.strip() else value or []
    if not isinstance(listed, list | tuple) or not all(isinstance(tool, Mapping) for tool in listed):
        raise DataError(f"tools must be a list of functions (JSON schemas), found {shown(listed)}")
    return tuple(dict(tool) for tool in listed)


def calls_text(calls: Any) -> str:
    """An assistant's calls as it writes them, one below the other.

    A call is {"name": ..., "arguments": {...}}, or has this in "function" as OpenAI's; arguments may be JSON text.
    Raises DataError.
    """
    listed = [calls] if isinstance(calls, Mapping) else calls
    if not isinstance(listed, list | tuple) or not listed:
        raise DataError(f"expected calls of functions, found {shown(calls)}")
    return "\n".join(f"<tool_call>\n{_json(_read_call(call))}\n</tool_call>" for call in listed)


def written_calls(content: str) -> str:
    """The same for a message whose content is the calls as JSON text, perhaps after a thought. Raises DataError."""
    thought = match.group(0) if (match := _THOUGHT.match(content)) else ""
    return thought + calls_text(parse_json("a function call", content[len(thought) :]))


def parse_json(what: str, text: str) -> Any:
    """The value of a text inside a record. Raises DataError."""
    try:
        return json_value(text)
    except ValueError as error:
        raise DataError(f"{what} must be JSON, found {shown(text)}: {error}") from None


def _read_call(call: Any) -> dict[str, Any]:
    inner = call.get("function", call) if isinstance(call, Mapping) else call
    if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str):
        raise DataError(f"a function call needs a name and arguments, found {shown(call)}")
    arguments = inner.get("arguments", {})
    if isinstance(arguments, str):
        arguments = parse_json("the arguments of a function call", arguments or "{}")
    return {"name": inner["name"], "arguments": arguments}


def _json(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise DataError(f"tools and calls must be plain JSON values: {error}") from None
