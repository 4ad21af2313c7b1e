"""What clients send, field by field: OpenAI's chat completions and completions, and vLLM's additions to them.

A field is read, or has no effect and is ignored, or is refused by name: nothing that would change the answer is passed
over in silence. null means that a field is left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    PrivateAttr,
    ValidationError,
    model_validator,
)

from duetvl.core.errors import did_you_mean, shown
from duetvl.inference.output import LONGEST_STOP
from duetvl.inference.sampling import MOST_ALTERNATIVES
from duetvl.serving.errors import ServerError
from duetvl.serving.strict_json import read_object

MOST_CHOICES: Final = 16
MOST_STOPS: Final = 4
MOST_MESSAGES: Final = 4096
MOST_TOOLS: Final = 128
MOST_BIASES: Final = 1024
MOST_STOP_IDS: Final = 64

# Fields of OpenAI's interface that have no effect on the text, whatever they hold.
IGNORED: Final = frozenset({
    "user", "metadata", "store", "service_tier", "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention",
    "safety_identifier", "prediction", "priority",
})  # fmt: skip
# Fields that would change the answer in a way that is not built, and the values with which they do not.
UNSUPPORTED: Final[Mapping[str, tuple[Any, ...]]] = {
    "audio": (), "modalities": (["text"],), "functions": ([],), "function_call": ("none",), "web_search_options": (),
    "reasoning_effort": ("none",), "verbosity": ("medium",), "moderation": (), "echo": (False,), "suffix": ("",),
    "best_of": (1,), "use_beam_search": (False,), "length_penalty": (1.0,), "skip_special_tokens": (True,),
    "add_generation_prompt": (True,), "continue_final_message": (False,), "include_stop_str_in_output": (False,),
    "chat_template": (), "chat_template_kwargs": ({},),
}  # fmt: skip


class Body(BaseModel):
    """An object of a request: no other fields than these, no conversions; null is as if left out."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, value: Any) -> Any:
        return {key: one for key, one in value.items() if one is not None} if isinstance(value, dict) else value


# -- messages ---------------------------------------------------------------------------------------------------------


class TextPart(Body):
    """`{"type": "text", "text": ...}`"""

    type: Literal["text"]
    text: str


class ImageUrl(Body):
    """Where a picture is: a data URI, or an address that the server's policy allows."""

    url: str
    detail: Literal["auto", "low", "high"] = "auto"


class ImageUrlPart(Body):
    """`{"type": "image_url", "image_url": {"url": ...}}`"""

    type: Literal["image_url"]
    image_url: ImageUrl


class VideoUrl(Body):
    """Where a video is."""

    url: str


class VideoUrlPart(Body):
    """`{"type": "video_url", "video_url": {"url": ...}}`, as vLLM and MindIE have it."""

    type: Literal["video_url"]
    video_url: VideoUrl


UserPart = Annotated[TextPart | ImageUrlPart | VideoUrlPart, Field(discriminator="type")]


class SystemMessage(Body):
    """Instructions, at the beginning; OpenAI's newer name for them is `developer`."""

    role: Literal["system", "developer"]
    content: str | list[TextPart]
    name: str = ""


class UserMessage(Body):
    """What is asked, with pictures and videos in their places."""

    role: Literal["user"]
    content: str | list[UserPart]
    name: str = ""


class CalledFunction(Body):
    """A function's name and its arguments as JSON text."""

    name: str
    arguments: str = ""


class ToolCall(Body):
    """A call that the assistant made."""

    id: str = ""
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int = 0


class AssistantMessage(Body):
    """An answer of before. What OpenAI's clients send back with it besides has no part in the prompt."""

    role: Literal["assistant"]
    content: str | list[TextPart] = ""
    tool_calls: list[ToolCall] = Field(default_factory=list, max_length=MOST_TOOLS)
    name: str = ""
    refusal: str = ""
    annotations: list[Any] = Field(default_factory=list)
    reasoning_content: str = ""


class ToolMessage(Body):
    """What a function has returned."""

    role: Literal["tool"]
    content: str | list[UserPart]
    tool_call_id: str = ""
    name: str = ""


Message = Annotated[SystemMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")]


# -- functions and grammars -------------------------------------------------------------------------------------------


class Function(Body):
    """A function that may be called; `parameters` is a JSON schema."""

    name: str = Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")
    description: str = ""
    parameters: dict[str, Any] | None = None
    strict: bool = False


class Tool(Body):
    """OpenAI's wrapper of a function; `as_sent` is what goes into the prompt, its keys in the client's order."""

    type: Literal["function"]
    function: Function
    _sent: dict[str, Any] = PrivateAttr(default_factory=dict)

    @model_validator(mode="wrap")
    @classmethod
    def _keep(cls, value: Any, check: ModelWrapValidatorHandler[Tool]) -> Tool:
        tool = check(value)
        tool._sent = value
        return tool

    @property
    def as_sent(self) -> dict[str, Any]:
        """The tool as the client wrote it."""
        return self._sent


class FunctionName(Body):
    """Which function."""

    name: str


class NamedTool(Body):
    """`tool_choice` that asks for one function."""

    type: Literal["function"]
    function: FunctionName


class PlainFormat(Body):
    """Any text, or any JSON object."""

    type: Literal["text", "json_object"]


class NamedSchema(Body):
    """A JSON schema with OpenAI's frills; an answer always follows it, so `strict` changes nothing."""

    name: str = "answer"
    description: str = ""
    schema_: dict[str, Any] = Field(default_factory=dict, alias="schema")
    strict: bool = True


class SchemaFormat(Body):
    """JSON after a schema."""

    type: Literal["json_schema"]
    json_schema: NamedSchema


class StructuredOutputs(Body):
    """vLLM's way to ask for a grammar: one of the three."""

    json_: dict[str, Any] | None = Field(default=None, alias="json")
    regex: str | None = None
    choice: list[str] | None = None


# -- requests ---------------------------------------------------------------------------------------------------------


class StreamOptions(Body):
    """Of a streamed answer. Obfuscation is not done, whatever is asked."""

    include_usage: bool = False
    include_obfuscation: bool = False


class MediaOptions(Body):
    """vLLM's `mm_processor_kwargs`: bounds of every picture, and how many frames of a second of video are taken."""

    min_pixels: int | None = Field(default=None, ge=1, le=2**31)
    max_pixels: int | None = Field(default=None, ge=1, le=2**31)
    fps: float | None = Field(default=None, gt=0, le=1000)


class Asked(Body):
    """What both kinds of requests have: how tokens are chosen, and how many."""

    model: str
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: int = Field(default=1, ge=1, le=MOST_CHOICES)
    max_tokens: int | None = Field(default=None, ge=1, le=2**31)
    min_tokens: int = Field(default=0, ge=0, le=2**31)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=-1, le=2**31)
    min_p: float | None = Field(default=None, ge=0, le=1)
    repetition_penalty: float | None = Field(default=None, gt=0, le=1000)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    logit_bias: dict[str, float] = Field(default_factory=dict, max_length=MOST_BIASES)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**64)
    stop: str | list[str] = Field(default_factory=list)
    stop_token_ids: list[int] = Field(default_factory=list, max_length=MOST_STOP_IDS)
    ignore_eos: bool = False
    structured_outputs: StructuredOutputs | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


class ChatRequest(Asked):
    """POST /v1/chat/completions"""

    messages: list[Message] = Field(min_length=1, max_length=MOST_MESSAGES)
    max_completion_tokens: int | None = Field(default=None, ge=1, le=2**31)
    logprobs: bool = False
    top_logprobs: int = Field(default=0, ge=0, le=MOST_ALTERNATIVES)
    tools: list[Tool] = Field(default_factory=list, max_length=MOST_TOOLS)
    tool_choice: Literal["none", "auto", "required"] | NamedTool = "auto"
    parallel_tool_calls: bool = True
    response_format: Annotated[PlainFormat | SchemaFormat, Field(discriminator="type")] | None = None
    mm_processor_kwargs: MediaOptions | None = None


class CompletionRequest(Asked):
    """POST /v1/completions: texts, or tokens, that are gone on from as they are."""

    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: int | None = Field(default=None, ge=0, le=MOST_ALTERNATIVES)

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts one by one."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [[int(token) for token in self.prompt]]
        return [one if isinstance(one, str) else list(one) for one in self.prompt]  # type: ignore[arg-type]


class TokenizeRequest(Body):
    """POST /tokenize: a text, or messages as a chat completion has them."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = Field(default=None, min_length=1, max_length=MOST_MESSAGES)
    tools: list[Tool] = Field(default_factory=list, max_length=MOST_TOOLS)
    add_special_tokens: bool = True
    return_token_strs: bool = False


class DetokenizeRequest(Body):
    """POST /detokenize"""

    model: str | None = None
    tokens: list[int]


AnyBody = TypeVar("AnyBody", bound=Body)


def read_request(kind: type[AnyBody], body: bytes) -> AnyBody:
    """A request of this kind. Raises ServerError naming the first field that is wrong."""
    values = _supported(read_object(body))
    try:
        request = kind.model_validate(values)
    except ValidationError as error:
        raise _in_words(error, values, kind) from None
    if isinstance(request, Asked):
        _check_together(request)
    return request


def _supported(values: dict[str, Any]) -> dict[str, Any]:
    for name, nothing in UNSUPPORTED.items():
        value = values.get(name)
        if value is not None and value not in nothing:
            instead = f"; without effect: {', '.join(map(shown, nothing))}" if nothing else ""
            raise ServerError(f"{name} is not supported, found {shown(value)}{instead}", param=name, code="unsupported")
    return {name: value for name, value in values.items() if name not in IGNORED and name not in UNSUPPORTED}


def _check_together(request: Asked) -> None:
    """Raise ServerError for fields that contradict each other, and for stops that make no sense."""
    if len(request.stops) > MOST_STOPS or not all(0 < len(stop) <= LONGEST_STOP for stop in request.stops):
        raise ServerError(f"stop is at most {MOST_STOPS} texts of 1 to {LONGEST_STOP} characters", param="stop")
    if request.stream_options is not None and not request.stream:
        raise ServerError("stream_options needs stream: true", param="stream_options")
    if isinstance(request, CompletionRequest):
        count = len(request.prompts) * request.n
        if not 0 < count <= MOST_CHOICES:
            raise ServerError(f"{count} answers are asked for (prompts times n); 1 to {MOST_CHOICES} are given")
        return
    assert isinstance(request, ChatRequest)
    if request.top_logprobs and not request.logprobs:
        raise ServerError("top_logprobs needs logprobs: true", param="top_logprobs")
    names = {tool.function.name for tool in request.tools}
    if len(names) < len(request.tools):
        raise ServerError("two functions of tools have the same name", param="tools")
    if isinstance(request.tool_choice, NamedTool) and request.tool_choice.function.name not in names:
        name = request.tool_choice.function.name
        raise ServerError(f"tool_choice: no function {shown(name)}{did_you_mean(name, names)}", param="tool_choice")
    if request.tool_choice == "required" and not names:
        raise ServerError("tool_choice is 'required', and there are no tools", param="tool_choice")


def _in_words(error: ValidationError, values: dict[str, Any], kind: type[Body]) -> ServerError:
    """The deepest of the errors: of a field that may be one thing or another the one that was nearly right."""
    problems = [(_path(tuple(one["loc"]), values), one) for one in error.errors(include_url=False)]
    path, problem = max(problems, key=lambda item: len(item[0]))
    field = ".".join(map(str, path))
    if problem["type"] == "extra_forbidden":
        hint = did_you_mean(str(path[-1]), [*kind.model_fields, *IGNORED]) if len(path) == 1 else ""
        return ServerError(f"unknown field {shown(field)}{hint}", param=field, code="unknown_field")
    if problem["type"] == "missing":
        return ServerError(f"{field} is missing", param=field, code="missing_field")
    words = problem["msg"].replace("Input should be", "should be")
    return ServerError(f"{field}: {words}, found {shown(problem['input'])}", param=field, code="invalid_value")


def _path(location: tuple[str | int, ...], value: Any) -> list[str | int]:
    """A place in the request without the names of kinds that pydantic puts between."""
    path: list[str | int] = []
    for at, key in enumerate(location):
        if (isinstance(value, dict) and key in value) or (isinstance(value, list) and isinstance(key, int)):
            path.append(key)
            value = value[key]  # type: ignore[index]
        elif at == len(location) - 1 and isinstance(value, dict):
            path.append(key)
    return path
