"""What workers tell the driver: the class of a Ray actor, alone here so that its process imports no PyTorch."""

from collections.abc import Mapping
from typing import Any

Message = tuple[str, Mapping[str, Any]]
"""("start" | "progress" | "validation" | "checkpoint", values)"""


class Mailbox:
    """What workers tell the driver. It outlives them, so it also knows whether an error is not worth another try."""

    def __init__(self) -> None:
        self._messages: list[Message] = []
        self._fatal: str | None = None

    def put(self, message: Message) -> None:
        self._messages.append(message)

    def take(self) -> list[Message]:
        taken, self._messages = self._messages, []
        return taken

    def set_fatal(self, error: str) -> None:
        self._fatal = self._fatal or error

    def fatal(self) -> str | None:
        return self._fatal
