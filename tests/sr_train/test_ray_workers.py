"""What a driver makes of its workers' messages; the group that Ray Train runs is played by a list of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import pytest

from sr_train import ray_workers
from sr_train.loop import Position
from sr_train.mailbox import Message
from sr_train.options import RunConfig
from sr_train.ray_workers import TrainingFailedError, Workers

START: Message = ("start", {"step": 0})
LOST: Message = ("lost", {"ranks": [1], "message": "its node is gone"})
LEFT: Message = ("left", {"step": 7, "message": "a node will be taken away"})
END: Message = ("end", {"position": Position(step=9).to_meta(), "measures": {}})
JOB: Any = SimpleNamespace()


class PlayedGroup:
    """Says what stands in the script, one list for each time that Ray Train is started."""

    is_fatal = False

    def __init__(self, script: list[list[Message]], num_starts: int = 0) -> None:
        self.before = num_starts
        self.stopped = False
        self.play(script.pop(0))

    def play(self, messages: list[Message]) -> None:
        """What is said from now on."""
        self._messages = messages

    def is_alive(self) -> bool:
        return True

    def place(self, order: object) -> None:
        pass

    def messages(self, *, until_s: float = 0.0) -> Iterator[Message]:
        yield from self._messages

    def num_starts(self) -> int:
        return self.before + self._messages.count(START)

    def failure(self) -> str:
        return "Ray Train gave up"

    def stop(self) -> None:
        self.stopped = True

    def close(self, *, wait: bool) -> None:
        pass


def played(monkeypatch: pytest.MonkeyPatch, script: list[list[Message]]) -> list[PlayedGroup]:
    """Every group that is started from now on plays the next list of the script; they are found here."""
    groups: list[PlayedGroup] = []

    def start_group(_: RunConfig, num_starts: int) -> PlayedGroup:
        groups.append(PlayedGroup(script, num_starts))
        return groups[-1]

    monkeypatch.setattr(ray_workers, "_Group", start_group)
    return groups


def fit(monkeypatch: pytest.MonkeyPatch, *script: list[Message], max_failures: int) -> list[Message]:
    """What the driver hears."""
    heard = list[Message]()
    played(monkeypatch, list(script))
    with Workers(RunConfig(max_failures=max_failures)) as workers:
        workers.fit(JOB, on_message=heard.append)
    return heard


def test_a_loss_that_ray_tells_again_and_again_is_one_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """It does while a node is drained: at every look, until the others have left too."""
    told = [START, LOST, LOST, LOST]
    assert fit(monkeypatch, told, [START, END], max_failures=1) == [START, LOST, START]
    with pytest.raises(TrainingFailedError):
        fit(monkeypatch, [START, LOST], [START, LOST], [START, END], max_failures=1)


def test_a_group_that_used_up_its_failures_in_earlier_jobs_does_not_end_this_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A sweep's trial whose node dies before its workers have begun."""
    script, heard = [[START, LOST, START, END], [LOST], [START, END]], list[Message]()
    groups = played(monkeypatch, script)
    with Workers(RunConfig(max_failures=1)) as workers:
        workers.fit(JOB, on_message=lambda _: None)
        groups[-1].play(script.pop(0))
        workers.fit(JOB, on_message=heard.append)
    assert (heard, len(groups)) == ([LOST, START], 2)


def test_workers_that_ray_train_cannot_start_are_tried_again_as_often_as_they_may_fail(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One that dies while the others connect to it makes Ray Train give up without a word of a loss."""
    heard = fit(monkeypatch, [START, LOST], [], [START, END], max_failures=2)
    assert [kind for kind, _ in heard] == ["start", "lost", "trouble", "start"]
    with pytest.raises(TrainingFailedError):
        fit(monkeypatch, [], [], [START, END], max_failures=1)
    with pytest.raises(TrainingFailedError):  # Ray Train has tried by itself
        fit(monkeypatch, [LOST], [START, END], max_failures=1)


def test_workers_that_left_as_they_were_told_to_are_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    script = [[START, LEFT], [START, LEFT], [START, LEFT, START, END]]
    assert fit(monkeypatch, *script, max_failures=0).count(LEFT) == 3


@pytest.mark.parametrize(
    ("messages", "are_training"), [([], False), ([START], True), ([START, LOST], False), ([START, LEFT, START], True)]
)
def test_only_workers_that_train_are_asked_to_save(
    monkeypatch: pytest.MonkeyPatch, messages: list[Message], are_training: bool
) -> None:
    class Interrupted(BaseException):
        pass

    group = PlayedGroup([[*messages, ("progress", {})]])
    monkeypatch.setattr(ray_workers, "_Group", lambda _, num_starts: group)

    def hear(message: tuple[str, Mapping[str, Any]]) -> None:
        if message[0] == "progress":
            raise Interrupted

    workers = Workers(RunConfig())
    with pytest.raises(Interrupted):
        workers.fit(JOB, on_message=hear)
    workers.stop(on_message=lambda _: None, timeout_s=5)
    assert (workers.are_training, group.stopped) == (are_training, are_training)


def test_starts_are_counted_on_when_ray_train_has_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers that started later have a higher number: those that come after would be taken for earlier ones."""
    groups = played(monkeypatch, [[START, LEFT, START, LEFT], [START, LEFT], [START, END]])
    with Workers(RunConfig(max_failures=0)) as workers:
        workers.fit(JOB, on_message=lambda _: None)
    assert [group.before for group in groups] == [0, 2, 3]
