"""The Ray cluster as a driver finds it: joined or started, what it offers, and how it streams images."""

import logging
import os
import signal
import socket
import threading
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import ray
import ray.train
from ray._private import ray_constants
from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import (
    get_or_create_autoscaling_coordinator,
)
from ray.data._internal.execution.node_trackers.actor_location import get_or_create_actor_location_tracker
from ray.data._internal.stats import get_or_create_stats_actor

from sr_data.manifest import ImageRecord
from sr_data.pairs import DecodedPair
from sr_data.ray_source import stream_pairs
from sr_train.config import TrainConfig
from sr_train.options import ConfigError
from sr_train.placement import ClusterFacts
from sr_train.worker import StreamPairs

_BLOCK_IMAGES = 16
_API_SERVER = "RAY_API_SERVER_ADDRESS"
_ADDRESS = "RAY_ADDRESS"
_ADDRESS_ADVICE = "start it or give another address; without any, this machine is used"


def pair_stream(config: TrainConfig[Any]) -> StreamPairs:
    """How workers get images: Ray Data tasks beside them, on the CPUs that the workers leave free."""
    return partial(
        _stream,
        num_threads=config.data.decode_threads,
        num_workers=config.run.num_workers,
        cpus_per_worker=config.run.cpus_per_worker or 1.0,
    )


def _stream(
    uri: str,
    records: Iterable[ImageRecord],
    scale: int,
    *,
    num_threads: int,
    num_workers: int,
    cpus_per_worker: float,
) -> Iterator[DecodedPair]:
    """Runs in a training worker: of Ray Train, whose places are known, or in a process of its own."""
    spare_cpus_here = 0.0
    try:
        context = ray.train.get_context()
    except RuntimeError:
        pass
    else:
        num_workers = min(num_workers, context.get_world_size())
        here = ray.get_runtime_context().get_node_id()
        nodes = ray.nodes()  # type: ignore[no-untyped-call]
        cpus_here = next(float(node["Resources"].get("CPU", 0)) for node in nodes if node["NodeID"] == here)
        spare_cpus_here = cpus_here - context.get_local_world_size() * cpus_per_worker
    return stream_pairs(
        uri,
        records,
        scale,
        num_threads=num_threads,
        block_images=_BLOCK_IMAGES,
        reserved_cpus=num_workers * cpus_per_worker,
        spare_cpus_here=spare_cpus_here,
    )


def set_defaults() -> None:
    """How Ray Train and PyTorch behave in this process and those it starts; what the user has set stays."""
    # How soon the end of training, or the loss of a worker, is seen; and no second copy of what a worker prints.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    # How soon workers learn that their node will be taken away.
    os.environ.setdefault("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "1")
    # A cluster that starts here gives up on itself when its agents are not up in time: Ray's 30 s are short for a busy
    # machine, or for the first time after an installation.
    os.environ.setdefault("RAY_agent_register_timeout_ms", "120000")
    # DDP's advice not to look for unused parameters; why it does is said in sr_train/learner.py.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    # On a machine with other work, idle threads that spin cost half the speed (measured: 37 s against 14 to 20 s).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def connect() -> None:
    """Joins the cluster that RAY_ADDRESS names or that `ray start` left on this machine; else starts one, for this
    process.
    """
    set_defaults()
    if ray.is_initialized():
        return
    _check_address()
    # A cluster that starts here is for this machine alone: it listens on loopback, as Ray does by default on macOS, and
    # not on all addresses. A driver that joins a cluster has the address that the node has.
    ray_constants.ENABLE_RAY_CLUSTER = False
    # Ray Train's clean-up actor asks the dashboard's State API whether the run's controller lives. Without a dashboard
    # it can't know; and where several clusters run on a machine it may ask another one's, be told "no such actor", and
    # take a live run's workers away (both seen). So a cluster that starts here gets a dashboard, and its processes
    # inherit that one's address; in a cluster that runs already, this job's processes get the address it was given.
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    previous = os.environ.get(_API_SERVER)
    os.environ[_API_SERVER] = f"http://127.0.0.1:{port}"
    on_sigterm = signal.getsignal(signal.SIGTERM)
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
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, on_sigterm)  # Ray puts in its own, which would end a driver at once
        if previous is None:
            del os.environ[_API_SERVER]
        else:
            os.environ[_API_SERVER] = previous
    if context.dashboard_url == f"127.0.0.1:{port}":  # started here, so no node of it will be given notice
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    else:
        _keep_ray_data_here()


def _keep_ray_data_here() -> None:
    """Ray Data's actors for the whole cluster are made on the node that first asks for them, and stay there as long as
    the cluster lives. Asked for by a training worker, they would keep its node from ever being idle, and so from being
    given back. Here they lie on the driver's.
    """
    get_or_create_stats_actor()
    get_or_create_actor_location_tracker()  # type: ignore[no-untyped-call]
    get_or_create_autoscaling_coordinator()  # type: ignore[no-untyped-call]


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


def cluster_room() -> str:
    """What the cluster has, and what of it is free, for a person to read."""
    free = ray.available_resources()  # type: ignore[no-untyped-call]
    whole = cluster_facts()
    cpus = f"{free.get('CPU', 0):g} of {whole.num_cpus:g} CPUs"
    gpus = f"{free.get('GPU', 0):g} of {whole.num_gpus:g} GPUs"
    return f"{cpus} and {gpus} are free on {len(whole.cpus_per_node)} nodes"
