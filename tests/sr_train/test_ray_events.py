"""A line that says why workers were lost, from what Ray Train hands on."""

import pickle

import pytest
from ray.exceptions import RayActorError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError, WorkerHealthCheckTimeoutError

from sr_train.loop import Left
from sr_train.ray_events import lost_line, lost_or_failed

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


@pytest.mark.parametrize(
    ("said", "peer"),
    [
        (
            "[gloo/transport/tcp/pair.cc:537] Read error [10.200.15.4]:1214: Connection reset by peer. This is "
            "typically caused by a remote worker hanging or bugs in the application.",
            "10.200.15.4",
        ),
        ("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [10.0.0.7]:38741", "10.0.0.7"),
        ("socketProgress: Connection closed by remote peer 10.0.0.7<51234>", "10.0.0.7"),
        ("ncclRemoteError: a remote process exited or there was a network error", None),
    ],
)
def test_who_only_noticed_that_another_is_gone_is_not_the_one_that_was_lost(said: str, peer: str | None) -> None:
    event = lost_or_failed({0: handed_on(RuntimeError(said))})
    assert event is not None and (event["noticed"], event["peer"]) == (True, peer)
    assert "typically" not in event["message"]
    places = [("node-1", "10.0.0.1"), ("node-2", "10.0.0.7"), ("node-3", "10.200.15.4")]
    gone = {"10.0.0.7": "a worker on node-2", "10.200.15.4": "a worker on node-3"}.get(peer or "", "another worker")
    assert lost_line(event, places).startswith(f"lost: {gone}, as worker 0 on node-1 noticed: ")


def test_workers_that_left_as_they_were_told_to_are_not_lost() -> None:
    left = handed_on(Left("the node goes", 12))
    assert lost_or_failed({0: left, 1: left}) is None
    # One that was taken away before it could leave is.
    event = lost_or_failed({0: left, 1: dead()})
    assert event is not None and event["ranks"] == [1]


def test_the_machine_is_named_at_which_the_worker_died() -> None:
    """Not the one that had its place at the last start, which may be dead for longer."""
    event = lost_or_failed({1: dead()})
    assert event is not None
    assert lost_line(event, [("node-1", "10.0.0.1"), ("node-2", "10.0.0.2")]).startswith("lost: worker 1 on 10.0.0.7: ")
    assert lost_line(event, [("node-1", "10.0.0.7"), ("node-2", "10.0.0.2")]).startswith("lost: worker 1 on node-1: ")
    assert lost_line(event, []).startswith("lost: worker 1 on 10.0.0.7: its worker process has died.")


def test_of_a_worker_that_does_not_answer_is_said_what_happened_not_what_ray_advises() -> None:
    hanging = WorkerHealthCheckTimeoutError("Worker 1 health check has been hanging for 600 seconds.")
    event = lost_or_failed({1: hanging})
    assert event is not None and event["message"] == "Worker 1 health check has been hanging for 600 seconds."
