"""Ray Tune's actor between one trial and the next."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from sr_train import ray_sweep
from sr_train.trial_record import TrialRecord, record_from_json


class Actor(ray_sweep._TrialActor):
    """As Tune makes it, but for the sweep's images."""

    def setup(self, config: dict[str, Any]) -> None:  # type: ignore[override]
        run = SimpleNamespace(sweep=SimpleNamespace(base=SimpleNamespace(config=SimpleNamespace(run=None))))
        super().setup(config, run)  # type: ignore[arg-type]


def config(number: int) -> dict[str, Any]:
    return {"trial": {"sample": {"number": number}}}


def test_a_trial_that_could_not_be_ended_in_time_is_not_taken_for_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its workers were in the middle of something: it speaks once more when the next one has begun."""
    next_has_begun, has_ended = threading.Event(), threading.Event()

    def run_trial(
        _: object, name: str, sample: dict[str, int], *, report: Callable[[TrialRecord], bool], **__: object
    ) -> TrialRecord:
        record = TrialRecord(name=str(sample["number"]), sample=sample)
        if sample["number"] == 1:
            assert not report(record)
            assert next_has_begun.wait(60)
            assert not report(record)
            has_ended.set()
        else:
            next_has_begun.set()
            assert has_ended.wait(5)
        return record

    monkeypatch.setattr(ray_sweep, "run_trial", run_trial)
    monkeypatch.setattr(ray_sweep, "_STOP_TIMEOUT_S", 0.01)
    actor = Actor(config(1))
    assert told(actor.step()) == "1"
    assert actor.reset(config(2))  # Tune has stopped it
    result = actor.step()
    assert (told(result), result["done"]) == ("2", True)


def told(result: dict[str, Any]) -> str:
    """Which trial a result is of."""
    return record_from_json(result[ray_sweep._RECORD]).name
