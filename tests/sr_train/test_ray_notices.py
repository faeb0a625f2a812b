"""What a worker hears of its mailbox."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError

from sr_train import ray_notices
from sr_train.mailbox import STOPPED
from sr_train.ray_notices import notices


class PlayedMailbox:
    """Gives one of these answers at each look; `is_over` once there was none left."""

    def __init__(self, *answers: Exception | str | None) -> None:
        self._answers = list(answers)
        self.is_over = threading.Event()
        self.why_leave = SimpleNamespace(remote=self._next)

    def _next(self, start: int) -> Exception | str | None:
        assert start == 3
        if len(self._answers) == 1:
            self.is_over.set()
        return self._answers.pop(0)


@pytest.fixture(autouse=True)
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    def get(answer: Any) -> Any:
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(ray_notices, "ray", SimpleNamespace(get=get))
    context = SimpleNamespace(preemption_context=SimpleNamespace(preemption_info=None))
    monkeypatch.setattr(ray_notices, "get_train_context", lambda: context)


def test_a_mailbox_that_is_out_of_reach_for_a_moment_is_asked_again() -> None:
    mailbox = PlayedMailbox(None, ActorUnavailableError("connection reset", None), None, STOPPED)
    with notices(mailbox, start=3) as leave:
        assert leave() is None
        assert mailbox.is_over.wait(60)
        wait_for_listener()
        assert leave() == STOPPED


def test_nobody_is_asked_once_the_driver_is_gone() -> None:
    mailbox = PlayedMailbox(ActorDiedError(), STOPPED)
    with notices(mailbox, start=3) as leave:
        wait_for_listener()
        assert leave() is None and not mailbox.is_over.is_set()


def wait_for_listener() -> None:
    """Until it has heard what it waits for, or given up."""
    for thread in threading.enumerate():
        if thread.name == "notices":
            thread.join(60)
            assert not thread.is_alive()
