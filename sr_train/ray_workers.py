"""Workers on a Ray cluster that carry out jobs: they start, fail, come back, and tell the driver what happens.

Ray Train brings the workers up, joins them in a process group, and starts them again when one is lost. Position and
weights come from the run's own checkpoints (docs/decisions/0002), images from Ray Data inside each worker
(docs/decisions/0003) or from a sweep's shared ones. A group can do one job after another, so that the trials of a sweep
don't start it each time: that takes longer than training a small trial (docs/decisions/0010).
"""

import gc
import logging
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Any, Self

import ray
import ray.train
import ray.train.torch
import torch
from ray import cloudpickle
from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import (
    get_or_create_autoscaling_coordinator,
)
from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from sr_data.errors import DataError, StorageError
from sr_data.storage_patience import may_pass
from sr_train.checkpoint import CheckpointError
from sr_train.collective import Collective
from sr_train.gan_watchdog import CollapseError
from sr_train.learner import NonFiniteLossError
from sr_train.loop import CheckpointWriteError, Left, Position
from sr_train.mailbox import STOPPED, Mailbox, Message, Order
from sr_train.metrics import MetricError
from sr_train.options import RunConfig as TrainRunConfig
from sr_train.ray_events import WorkerEvents
from sr_train.ray_notices import LeavingTorchConfig, notices
from sr_train.worker import Job, run_worker

# Ray's stubs are those of the first version of Ray Train.
_ScalingConfig: Any = ScalingConfig
_RunConfig: Any = RunConfig

_CLOSING_S = 60.0
"""How long workers may take to end when all is done. Those of a node that was just lost may never start again."""
POLL_INTERVAL_S = 0.1
"""How often either side looks into the mailbox while it waits."""
_STILL_WAITING_S = 60.0
"""How often the driver hears that its workers have not begun to train."""


class TrainingFailedError(RuntimeError):
    """Training ended without reaching the end; the message says why. What was saved is still there."""


@dataclass(frozen=True, kw_only=True)
class FitResult:
    """How training ended, and what it cost."""

    position: Position
    measures: Mapping[str, float]
    """What training cost on rank 0, by name with unit."""
    num_restarts: int


class Workers:
    """A group of workers as `run` describes it (number, device, CPUs, failures), from the first job to `close`.

    Lost workers are replaced `run.max_failures` times during one job. Use it in a `with` block, from one thread.
    """

    def __init__(self, run: TrainRunConfig) -> None:
        self._run = run
        self._num_orders = 0
        self._num_starts = 0
        self._group: _Group | None = None
        self.are_training = False
        """Whether workers have begun, and were not lost since: else there is nothing that a `stop` could save."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # After an interrupt the driver ends, and Ray ends the workers with it: they may be busy for long.
        self.close(wait=error is None or isinstance(error, Exception))

    def close(self, *, wait: bool = True) -> None:
        """Ends the workers; `wait`ing until they have ended."""
        if self._group is not None:
            self._group.close(wait=wait)
            self._group = None

    def _give_up(self, group: "_Group") -> None:
        self._num_starts = group.num_starts()
        self.close(wait=False)

    def fit(
        self,
        job: Job,
        *,
        on_message: Callable[[Message], None],
        goes_on: Callable[[Mapping[str, Any]], bool] | None = None,
    ) -> FitResult:
        """Trains until the budget ends. The workers are started where there are none.

        `on_message` is called with what `sr_train.mailbox.Message` lists, and every minute in which no workers train
        with ("waiting", {}). `goes_on` is asked after each validation, with its values, while the workers wait: whether
        to train on. Raises TrainingFailedError.
        """
        self._num_orders += 1
        order = Order(self._num_orders, cloudpickle.dumps((job, goes_on is not None)))  # type: ignore[no-untyped-call]
        starts = failures = 0
        self.are_training = False
        lost: list[Mapping[str, Any]] = []
        while True:
            if self._group is not None and not self._group.is_alive():  # it used up its failures in earlier jobs
                self._give_up(self._group)
            is_new, starts_before, num_lost = self._group is None, starts, len(lost)
            group = self._group = self._group or _Group(self._run, self._num_starts)
            group.place(order)
            for kind, values in group.messages():
                if kind == "ask":
                    assert goes_on is not None  # the order says whether to ask
                    answer = False
                    try:
                        answer = goes_on(values)
                    finally:  # else the workers would wait for ever
                        group.answer(values["step"], answer)
                elif kind == "end":
                    return _result(values, num_restarts=max(0, starts - 1))
                elif values not in lost:  # Ray tells a loss again at every look while a node is being drained
                    if kind == "start":
                        starts, lost, self.are_training = starts + 1, [], True
                    elif kind == "lost":
                        failures += not lost
                        lost.append(values)
                    if kind in ("lost", "left"):
                        self.are_training = False
                    on_message((kind, values))
            # Ray Train gave up. It counts failures over all of the group's jobs, and workers that left as they were
            # told to; here are counted those of this job that failed.
            reason = group.failure()
            self._give_up(group)
            never_began = is_new and starts == starts_before
            # It tried as often as it may; or at once found no way to start the workers, as when one of them dies while
            # they get to know each other.
            used_up = never_began and len(lost) > num_lost
            failures += never_began and not used_up
            if group.is_fatal or used_up or failures > self._run.max_failures:
                raise TrainingFailedError(reason)
            if never_began:
                on_message(("trouble", {"step": 0, "message": f"the workers did not start, once more: {reason}"}))

    def stop(self, *, on_message: Callable[[Message], None], timeout_s: float) -> None:
        """Asks the workers of a `fit` that was interrupted to save a checkpoint and leave; waits until they have."""
        if self._group is None or not self.are_training:
            return
        deadline_s = time.monotonic() + timeout_s
        self._group.stop()
        for kind, values in self._group.messages(until_s=deadline_s):
            if kind == "end":
                return
            if kind not in ("ask", "waiting"):
                on_message((kind, values))


def _result(values: Mapping[str, Any], *, num_restarts: int) -> FitResult:
    if "error" in values:
        raise TrainingFailedError(values["error"])
    return FitResult(
        position=Position.from_meta(values["position"]), measures=values["measures"], num_restarts=num_restarts
    )


class _Group:
    """One run of Ray Train and the mailbox beside it."""

    def __init__(self, run: TrainRunConfig, num_starts: int) -> None:
        """`num_starts` of workers there were in groups before this one: they are counted on."""
        self._mailbox = _mailbox(num_starts)
        # Ray Train gives this actor of its own five seconds to answer, and prints a traceback where its process takes
        # longer to start. So it is started here, while the controller's own does.
        get_or_create_autoscaling_coordinator()  # type: ignore[no-untyped-call]
        self._error: Exception | None = None
        self.is_fatal = False
        # Not the thread's own state: a signal handler that raises while a thread is joined leaves it marked as ended
        # (Python's issue 45274), and drivers are told to stop by just that.
        self._ended = threading.Event()
        threading.Thread(target=self._fit, args=(run,), name="ray-train-fit", daemon=True).start()

    def _fit(self, run: TrainRunConfig) -> None:
        """In a thread, so that the caller's can be interrupted: Ray's own wait notices signals late or not at all."""
        try:
            # Ray's own state holds nothing that a run needs, so it stays on the driver's machine and ends with it.
            with TemporaryDirectory(prefix="sr-ray-train-", ignore_cleanup_errors=True) as ray_state:
                _trainer(run, self._mailbox, ray_state).fit()
        except Exception as error:  # noqa: BLE001  told to whoever waits for messages
            self._error = error
        finally:
            self._ended.set()

    def is_alive(self) -> bool:
        return not self._ended.is_set()

    def place(self, order: Order) -> None:
        ray.get(self._mailbox.place.remote(order))

    def answer(self, step: int, goes_on: bool) -> None:
        self._mailbox.answer.remote(step, goes_on)

    def stop(self) -> None:
        self._mailbox.stop.remote()

    def messages(self, *, until_s: float = math.inf) -> Iterator[Message]:
        """What the workers send, for as long as Ray Train runs, or until that time of time.monotonic()."""
        alive, idle_since_s = True, time.monotonic()
        while alive and time.monotonic() < until_s:
            alive = not self._ended.wait(POLL_INTERVAL_S)
            for kind, values in ray.get(self._mailbox.take.remote()):
                # A long validation is silent too, so only what precedes a start counts as waiting.
                idle_since_s = time.monotonic() if kind in ("lost", "left") else math.inf
                yield kind, values
            if time.monotonic() - idle_since_s > _STILL_WAITING_S:
                idle_since_s = time.monotonic()
                yield "waiting", {}

    def num_starts(self) -> int:
        return int(ray.get(self._mailbox.num_starts.remote()))

    def failure(self) -> str:
        """Why Ray Train ended."""
        fatal: str | None = ray.get(self._mailbox.fatal.remote())
        self.is_fatal = fatal is not None
        return fatal or _reason(self._error)

    def close(self, *, wait: bool) -> None:
        self._mailbox.close.remote()
        if wait:
            self._ended.wait(_CLOSING_S)


def _mailbox(num_starts: int) -> Any:
    """Beside the driver: on another node it would be lost with that node, and the run with it."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    remote: Any = ray.remote  # whose stubs know functions only
    return remote(num_cpus=0, scheduling_strategy=here)(Mailbox).remote(num_starts)


def _trainer(run: TrainRunConfig, mailbox: Any, ray_state: str) -> TorchTrainer:
    gpus = {"GPU": run.gpus_per_worker} if run.device == "cuda" else {}
    return TorchTrainer(
        _ray_worker,
        train_loop_config={"mailbox": mailbox},
        torch_config=LeavingTorchConfig(),
        scaling_config=_ScalingConfig(
            num_workers=run.num_workers if run.min_workers is None else (run.min_workers, run.num_workers),
            elastic_resize_monitor_interval_s=run.resize_interval_s,
            use_gpu=run.device == "cuda",
            resources_per_worker={"CPU": run.cpus_per_worker or 1} | gpus,
        ),
        run_config=_RunConfig(
            name=run.name,
            storage_path=ray_state,
            failure_config=FailureConfig(max_failures=run.max_failures),
            callbacks=[WorkerEvents(mailbox)],
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
    )


def _reason(error: Exception | None) -> str:
    if error is None:
        return "the workers ended without a result"
    causes = [str(error)]
    while error.__cause__ is not None and isinstance(error.__cause__, Exception):
        error = error.__cause__
        causes.append(str(error))
    return causes[-1].strip().splitlines()[-1] if causes[-1].strip() else causes[0]


def _ray_worker(config: dict[str, Any]) -> None:
    """What runs on every worker: one order after another, until there will be none."""
    logging.getLogger("botocore").setLevel(logging.WARNING)  # else every worker says where its credentials came from
    mailbox, done, more = config["mailbox"], 0, True
    while more:
        order, more = ray.get(mailbox.order_after.remote(done))
        if order is not None:
            _carry_out(order, mailbox)
            done, more = order.number, True
            gc.collect()  # networks, optimisers and images of this job
            torch.cuda.empty_cache()
        elif more:
            time.sleep(POLL_INTERVAL_S)


def _carry_out(order: Order, mailbox: Any) -> None:
    """`run_worker` between Ray's process group and the mailbox."""
    is_first = ray.train.get_context().get_world_rank() == 0
    # Of all, not rank 0's word alone: whoever was cut off from the others has begun nothing.
    start = Collective.of_process_group().gather(ray.get(mailbox.begin.remote()) if is_first else 0)[0]

    def send(kind: str, values: Mapping[str, Any]) -> Any:
        return mailbox.put.remote(order.number, start, (kind, values)) if is_first else None

    def send_last(kind: str, values: Mapping[str, Any]) -> None:
        if is_first:  # it has arrived before this worker ends, and what it sent earlier too
            ray.get(send(kind, values))

    def goes_on(values: Mapping[str, Any]) -> bool:
        send("ask", values)
        while (answer := ray.get(mailbox.answer_to.remote(values["step"]))) is None:
            time.sleep(POLL_INTERVAL_S)
        return bool(answer)

    job, asks = cloudpickle.loads(order.payload)
    given_up: str | None = ray.get(mailbox.fatal.remote())
    if given_up is not None:  # Ray Train starts every failed worker again; this error would only come back
        return send_last("end", {"error": given_up})
    try:
        with notices(mailbox, start=start) as leave:
            position, measures = run_worker(
                job,
                start=start,
                device=ray.train.torch.get_device(),
                send=send,
                goes_on=goes_on if asks else None,
                leave=leave,
            )
    except Left as left:
        if left.reason == STOPPED:
            return send_last("end", {"error": str(left)})
        send_last("left", {"step": left.step, "message": left.reason})
        # When the first error is seen, Ray Train ends all workers and starts them again, where there is room that
        # stays: by then the first worker must have sent what MLflow and the driver are to know.
        Collective.of_process_group().first(None)
        raise
    except (
        NonFiniteLossError,
        CollapseError,
        CheckpointWriteError,
        DataError,
        CheckpointError,
        MetricError,
        StorageError,
    ) as error:
        # Storage that refuses or is away may be back at the next start.
        if not (isinstance(error, StorageError) and may_pass(error)):
            ray.get(mailbox.set_fatal.remote(order.number, start, str(error)))
        # Raised on every worker: all end here, in step.
        if isinstance(error, (NonFiniteLossError, CollapseError, CheckpointWriteError)):
            return send_last("end", {"error": str(error)})
        # On this worker only: its failure makes Ray end the others, which wait for it.
        raise
    return send_last("end", {"position": position.to_meta(), "measures": measures})
