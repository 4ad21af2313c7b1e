"""The one error that leaves the server, in the body that OpenAI's clients read."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any, Final

from duetvl.core.errors import DuetvlError, one_line

SERVER_KIND: Final = "server_error"


class ServerError(DuetvlError):
    """A request that is not answered, or not to its end.

    status: of the response. kind: OpenAI's `type`. param: the field that is at fault. code: a word for programs.
    retry_after: seconds after which the same request may be answered.
    """

    def __init__(
        self,
        message: object,
        *,
        status: int = HTTPStatus.BAD_REQUEST,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.kind, self.param, self.code = int(status), kind, param, code
        self.retry_after = retry_after

    def body(self) -> dict[str, Any]:
        """`{"error": {message, type, param, code}}`, as OpenAI's interface has it."""
        param = None if self.param is None else one_line(self.param, 200)
        return {"error": {"message": str(self), "type": self.kind, "param": param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """Headers of the response beside its body's: `Retry-After` in whole seconds, where that is known.

        OpenAI's clients try again after every 5xx; one that ran out of time would do so once more, for all to bear.
        """
        if self.status == HTTPStatus.GATEWAY_TIMEOUT:
            return {"x-should-retry": "false"}
        return {} if self.retry_after is None else {"Retry-After": str(max(1, round(self.retry_after)))}
