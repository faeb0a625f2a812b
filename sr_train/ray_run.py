"""A plan on a Ray cluster: workers that start, fail, come back, and what the driver hears of them.

Ray Train brings the workers up, joins them in a process group, and starts them again when one is lost. Position and
weights come from the run's own checkpoints (docs/decisions/0002), images from Ray Data inside each worker
(docs/decisions/0003).
"""

import errno
import logging
import os
import socket
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any

import ray
import ray.train
import ray.train.torch
from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from sr_data.errors import DataError, StorageError
from sr_data.manifest import ImageRecord
from sr_data.pairs import DecodedPair
from sr_data.ray_source import stream_pairs
from sr_train.checkpoint import CheckpointError
from sr_train.config import TrainConfig
from sr_train.gan_watchdog import CollapseError
from sr_train.learner import NonFiniteLossError
from sr_train.loop import CheckpointWriteError, Position
from sr_train.mailbox import Mailbox, Message
from sr_train.metrics import MetricError
from sr_train.options import ConfigError
from sr_train.options import RunConfig as TrainRunConfig
from sr_train.placement import ClusterFacts
from sr_train.plan import Plan
from sr_train.worker import Job, StreamPairs, run_worker

POLL_INTERVAL_S = 0.5
_BLOCK_IMAGES = 16
_API_SERVER = "RAY_API_SERVER_ADDRESS"
_ADDRESS = "RAY_ADDRESS"
_ADDRESS_ADVICE = "start it or give another address; without any, this machine is used"


class TrainingFailedError(RuntimeError):
    """Training ended without reaching the end; the message says why. What was saved is still there."""


@dataclass(frozen=True, kw_only=True)
class FitResult:
    """How training ended, and what it cost."""

    position: Position
    measures: Mapping[str, float]
    """What training cost on rank 0, by name with unit."""
    num_restarts: int


def pair_stream(config: TrainConfig[Any]) -> StreamPairs:
    """How workers get images: Ray Data tasks beside them, on the CPUs that the workers leave free."""
    reserved_cpus = config.run.num_workers * (config.run.cpus_per_worker or 1)
    return partial(_stream, num_threads=config.data.decode_threads, reserved_cpus=reserved_cpus)


def _stream(
    uri: str, records: Iterable[ImageRecord], scale: int, *, num_threads: int, reserved_cpus: float
) -> Iterator[DecodedPair]:
    return stream_pairs(
        uri, records, scale, num_threads=num_threads, block_images=_BLOCK_IMAGES, reserved_cpus=reserved_cpus
    )


def connect() -> None:
    """Joins the cluster that RAY_ADDRESS names or that `ray start` left on this machine; else starts one, for this
    process.
    """
    # How soon the end of training, or the loss of a worker, is seen; and no second copy of what a worker prints.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    # DDP's advice not to look for unused parameters; why it does is said in sr_train/learner.py.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    # On a machine with other work, idle threads that spin cost half the speed (measured: 37 s against 14 to 20 s).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if ray.is_initialized():
        return
    _check_address()
    # Ray Train's clean-up actor asks the dashboard's State API whether the run's controller lives. Without a dashboard
    # it can't know; and where several clusters run on a machine it may ask another one's, be told "no such actor", and
    # take a live run's workers away (both seen). So a cluster that starts here gets a dashboard, and its processes
    # inherit that one's address; in a cluster that runs already, this job's processes get the address it was given.
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    previous = os.environ.get(_API_SERVER)
    os.environ[_API_SERVER] = f"http://127.0.0.1:{port}"
    try:
        # Ray's warnings are about clusters that others run; errors are shown.
        context = ray.init(
            logging_level=logging.ERROR, include_dashboard=True, dashboard_port=port, runtime_env=_joined_runtime_env()
        )
    except (ConnectionError, ValueError) as error:
        if _ADDRESS not in os.environ:
            raise
        raise ConfigError(f"{_ADDRESS}={os.environ[_ADDRESS]} is no Ray cluster: {error}; {_ADDRESS_ADVICE}") from error
    finally:
        if previous is None:
            del os.environ[_API_SERVER]
        else:
            os.environ[_API_SERVER] = previous
    if context.dashboard_url == f"127.0.0.1:{port}":  # started here, so no node of it will be given notice
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")


def _joined_runtime_env() -> dict[str, Any] | None:
    """The address of the cluster that is joined, for this job's processes there; None where one starts here."""
    address = os.environ.get("RAY_ADDRESS", "")
    joins = address not in ("", "auto", "local") and "://" not in address
    return {"env_vars": {"RAY_ADDRESS": address}} if joins else None


def _check_address() -> None:
    """ConfigError if nobody listens at RAY_ADDRESS, which Ray itself would find out in more than two minutes."""
    address = os.environ.get(_ADDRESS, "")
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return  # "auto", "local" and mistakes are for Ray to judge
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except OSError as error:
        raise ConfigError(
            f"{_ADDRESS}={address}: no cluster can be reached there ({error.strerror or error}); {_ADDRESS_ADVICE}"
        ) from error


def cluster_facts() -> ClusterFacts:
    """CPUs and GPUs of the nodes that are alive."""
    nodes = ray.nodes()  # type: ignore[no-untyped-call]
    alive = [node["Resources"] for node in nodes if node["Alive"]]
    return ClusterFacts(
        cpus_per_node=tuple(float(resources.get("CPU", 0)) for resources in alive),
        gpus_per_node=tuple(float(resources.get("GPU", 0)) for resources in alive),
    )


def _on_this_node(actor: type) -> Any:
    """`actor` as one of Ray's, beside the driver: on another node it would be lost with that node, and the run with
    it.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(actor).options(num_cpus=0, scheduling_strategy=here)


class _Relay(threading.Thread):
    """Brings the mailbox's messages to a function in the driver until it is stopped, then once more."""

    def __init__(self, mailbox: Any, handle: Callable[[Message], None]):
        super().__init__(name="mailbox-relay", daemon=True)
        self._mailbox, self._handle, self._done = mailbox, handle, threading.Event()

    def run(self) -> None:
        ended = False
        while not ended:
            ended = self._done.wait(POLL_INTERVAL_S)
            for message in ray.get(self._mailbox.take.remote()):
                self._handle(message)

    def stop(self) -> None:
        self._done.set()
        self.join()


def fit(plan: Plan, job: Job, *, on_message: Callable[[Message], None]) -> FitResult:
    """Trains on the cluster until the budget ends. Lost workers are replaced `run.max_failures` times.

    `on_message` is called in a thread of the driver with what rank 0 sends: ("progress" | "validation" | "checkpoint" |
    "start", values). Raises TrainingFailedError.
    """
    run = plan.config.run
    mailbox = _on_this_node(Mailbox).remote()
    starts = 0

    def handle(message: Message) -> None:
        nonlocal starts
        starts += message[0] == "start"
        on_message(message)

    relay = _Relay(mailbox, handle)
    relay.start()
    try:
        # Ray's own state holds nothing that a run needs, so it stays on the driver's machine and ends with it.
        with TemporaryDirectory(prefix="sr-ray-train-", ignore_cleanup_errors=True) as ray_state:
            result = _fit_in_thread(_trainer(run, {"job": job, "mailbox": mailbox}, ray_state))
    except Exception as error:
        raise TrainingFailedError(_reason(mailbox, error)) from error
    finally:
        relay.stop()
    outcome = result.return_value
    if not isinstance(outcome, dict) or "error" in outcome:
        raise TrainingFailedError(
            outcome["error"] if isinstance(outcome, dict) else f"no result came back: {outcome!r}"
        )
    return FitResult(
        position=Position.from_meta(outcome["position"]), measures=outcome["measures"], num_restarts=max(0, starts - 1)
    )


def _trainer(run: TrainRunConfig, worker_config: dict[str, Any], ray_state: str) -> TorchTrainer:
    return TorchTrainer(
        _ray_worker,  # type: ignore[arg-type]  # Ray's stubs are those of Ray Train V1, here and below
        train_loop_config=worker_config,
        scaling_config=ScalingConfig(
            num_workers=run.num_workers,
            use_gpu=run.device == "cuda",
            resources_per_worker={"CPU": run.cpus_per_worker or 1} | ({"GPU": 1} if run.device == "cuda" else {}),
        ),
        run_config=RunConfig(
            name=run.name,
            storage_path=ray_state,
            failure_config=FailureConfig(max_failures=run.max_failures),
            logging_config=LoggingConfig(log_level="WARNING"),  # type: ignore[call-arg]
        ),
    )


def _fit_in_thread(trainer: TorchTrainer) -> Any:
    """`trainer.fit()`, while this thread can be interrupted: Ray's own wait notices signals late or not at all."""
    results: list[Any] = []

    def run() -> None:
        try:
            results.append(trainer.fit())
        except Exception as error:  # noqa: BLE001  handed to the caller's thread, which raises it
            results.append(error)

    thread = threading.Thread(target=run, name="ray-train-fit", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(POLL_INTERVAL_S)
    if isinstance(results[0], Exception):
        raise results[0]
    return results[0]


def _reason(mailbox: Any, error: Exception) -> str:
    fatal: str | None = ray.get(mailbox.fatal.remote())
    if fatal is not None:
        return fatal
    causes = [str(error)]
    while error.__cause__ is not None and isinstance(error.__cause__, Exception):
        error = error.__cause__
        causes.append(str(error))
    return causes[-1].strip().splitlines()[-1] if causes[-1].strip() else causes[0]


def _ray_worker(config: dict[str, Any]) -> dict[str, Any]:
    """What runs on every worker: `run_worker` between Ray's process group and the mailbox."""
    logging.getLogger("botocore").setLevel(logging.WARNING)  # else every worker says where its credentials came from
    mailbox, job = config["mailbox"], config["job"]
    context = ray.train.get_context()
    given_up: str | None = ray.get(mailbox.fatal.remote())
    if given_up is not None:  # Ray Train starts every failed worker again; this error would only come back
        return {"error": given_up}

    def send(kind: str, values: Mapping[str, Any]) -> None:
        if context.get_world_rank() == 0:
            mailbox.put.remote((kind, values))

    try:
        position, measures = run_worker(job, device=ray.train.torch.get_device(), send=send)
    except (
        NonFiniteLossError,
        CollapseError,
        CheckpointWriteError,
        DataError,
        CheckpointError,
        MetricError,
        StorageError,
    ) as error:
        # Storage that refuses or is away may be back at the next start; a file that is not there will not.
        if not isinstance(error, StorageError) or error.errno == errno.ENOENT:
            ray.get(mailbox.set_fatal.remote(str(error)))
        # Raised on every worker: all end here, in step.
        if isinstance(error, (NonFiniteLossError, CollapseError, CheckpointWriteError)):
            return {"error": str(error)}
        # On this worker only: its failure makes Ray end the others, which wait for it.
        raise
    return {"position": position.to_meta(), "measures": measures}
