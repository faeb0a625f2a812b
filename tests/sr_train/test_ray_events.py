"""A line that says why workers were lost, from what Ray Train hands on."""

import pickle

from ray.exceptions import RayActorError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

from sr_train.loop import Left
from sr_train.ray_events import lost_or_failed

DEAD = """The actor died unexpectedly before finishing this task.
\tclass_name: RayTrainWorker
\tactor_id: 7a2a78e4e61265881a3ed22901000000
\tpid: 14563
\tnamespace: cf8779bb-a45b-4e1e-9e8f-188e9d0b5886
\tip: 10.0.0.7
The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: Worker \
unexpectedly exits with a connection error code 2. End of file. Some common causes include: (1) the process was killed \
by the OOM killer due to high memory usage, (2) ray stop --force was called."""


def handed_on(error: Exception) -> Exception:
    """From a worker's process to the controller's."""
    return pickle.loads(pickle.dumps(error))


def dead() -> Exception:
    """As Ray Train says of a worker that does not answer."""
    return WorkerHealthCheckFailedError("A worker health check failed.", failure=RayActorError(error_msg=DEAD))


def test_a_death_counts_and_the_failures_that_it_causes_do_not() -> None:
    event = lost_or_failed({0: handed_on(RuntimeError("Connection closed by peer")), 2: dead()})
    assert event is not None and event["ranks"] == [2]
    assert event["message"].startswith("its worker process has died.") and "OOM" not in event["message"]
    assert "\n" not in event["message"]


def test_without_a_death_the_first_failure_is_said_by_its_last_line() -> None:
    event = lost_or_failed({1: handed_on(ValueError("b")), 0: handed_on(OSError("no space left"))})
    assert event == {"ranks": [0, 1], "message": "no space left"}


def test_workers_that_left_as_they_were_told_to_are_not_lost() -> None:
    left = handed_on(Left("the node goes", 12))
    assert lost_or_failed({0: left, 1: left}) is None
    # One that was taken away before it could leave is.
    event = lost_or_failed({0: left, 1: dead()})
    assert event is not None and event["ranks"] == [1]
