"""The Ray Serve application: one process for HTTP, replicas of the model behind it, started and ended as a whole."""

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import ip_address
from pathlib import Path

import ray
from ray import serve
from ray._private.state import available_resources_per_node  # Ray tells only the sum elsewhere
from ray.exceptions import RayTaskError
from ray.serve.config import HTTPOptions, ProxyLocation
from ray.serve.context import _get_global_client  # the only way to ask a Serve that runs already for its address
from ray.serve.exceptions import RayServeException
from ray.serve.schema import LoggingConfig

from sr_serve.ingress import Ingress, IngressOptions
from sr_serve.model_replica import ModelReplica, ReplicaOptions
from sr_serve.serve_options import ServeError, ServeOptions
from sr_serve.uploads import UploadLimits
from sr_train.placement import ClusterFacts, num_fitting
from sr_train.ray_cluster import connect
from sr_train.tracking_server import resolve_tracking_uri
from sr_train.upscaler import REGISTRY_PREFIX, open_network

_SHUTDOWN_S = 10.0
_MAX_CLIENTS = 100
"""Who is attended to at once, most of them sending or waiting."""
_MAX_WAITING_CLIENTS = 20
"""Who may wait for one of those to leave, their uploads in Ray Serve's memory; those beyond get 503."""
# Not even warnings: there is one for each request that is turned away.
_QUIET = LoggingConfig(log_level="ERROR", enable_access_log=False)


@contextmanager
def serving(model: str, options: ServeOptions, *, tracking_uri: str | None = None) -> Iterator[str]:
    """MODEL behind an HTTP server for as long as the context lasts; gives its URL once it answers.

    Joins the Ray cluster that there is, else starts one for this process. Of a Ray Serve that runs there only this
    application is ended. ServeError if address, name, route or resources are not to be had; what `open_network` raises
    if MODEL can't be opened.
    """
    if os.environ.get("RAY_ADDRESS") in (None, "", "local"):
        check_port(options.host, options.port)
    open_network(model, tracking_uri=tracking_uri)  # mistakes are said here, not by a process that Serve starts thrice
    # The replicas have another working directory.
    if model.startswith(REGISTRY_PREFIX):
        tracking_uri = resolve_tracking_uri(tracking_uri)
    elif "://" not in model:
        model = str(Path(model).absolute())
    print(f"{model} is read; starting Ray Serve, which takes about a minute", flush=True)
    connect()
    _check_neighbours(options)
    num_cpus = cpus_per_replica(options, _free_resources())
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    try:
        # Where Serve runs already this does nothing.
        serve.start(ProxyLocation.HeadOnly, HTTPOptions(host=options.host, port=options.port), logging_config=_QUIET)
        application = _application(model, options, tracking_uri=tracking_uri, num_cpus=num_cpus)
        try:
            serve.run(application, name=options.name, route_prefix=options.route_prefix)
        except (RayServeException, RuntimeError) as error:
            reason = error.cause if isinstance(error, RayTaskError) else error
            raise ServeError(f"the application did not start ({reason}; --route-prefix)") from error
        host = f"[{options.host}]" if ":" in options.host else options.host
        yield f"http://{host}:{options.port}{options.route_prefix.removesuffix('/')}/"
    finally:
        serve.delete(options.name)
        ray.shutdown()  # ends a cluster that was started here, and leaves one that was joined


def check_port(host: str, port: int) -> None:
    """ServeError unless a server could listen there. Ray Serve shares a port that another Serve has, without a word."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # what was closed a minute ago is free
            probe.bind(address)
            probe.listen()
    except OSError as error:
        reason = error.strerror or str(error)
        raise ServeError(
            f"--host {host} --port {port}: can't be listened on ({reason}); give another, or RAY_ADDRESS=auto if a Ray "
            f"Serve of yours is there"
        ) from error


def _application(model: str, options: ServeOptions, *, tracking_uri: str | None, num_cpus: int) -> serve.Application:
    replicas = serve.deployment(
        name="model",
        num_replicas=options.num_replicas,
        ray_actor_options={"num_cpus": num_cpus, "num_gpus": options.gpus_per_replica},
        max_ongoing_requests=options.max_ongoing,
        max_queued_requests=options.max_queued,
        graceful_shutdown_wait_loop_s=0.2,
        graceful_shutdown_timeout_s=_SHUTDOWN_S,
        logging_config=_QUIET,
    )(ModelReplica).bind(
        ReplicaOptions(
            model=model,
            tracking_uri=tracking_uri,
            on_gpu=options.gpus_per_replica > 0,
            precision=options.precision,
            poll_s=options.poll_s,
            max_batch=options.max_batch,
        )
    )
    limits = UploadLimits(max_mb=options.max_mb, max_mpx=options.max_mpx, upload_timeout_s=options.upload_timeout_s)
    ingress = serve.deployment(
        name="http",
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=_MAX_CLIENTS,
        max_queued_requests=_MAX_WAITING_CLIENTS,
        graceful_shutdown_wait_loop_s=0.2,
        graceful_shutdown_timeout_s=_SHUTDOWN_S,
        logging_config=_QUIET,
    )(serve.ingress()(Ingress))
    return ingress.bind(
        replicas,
        IngressOptions(
            limits=limits,
            tile_px_lr=options.tile_px_lr,
            timeout_s=options.timeout_s,
            is_loopback=_is_loopback(options.host),
        ),
    )


def cpus_per_replica(options: ServeOptions, free: ClusterFacts) -> int:
    """As asked, or as many as all replicas can have of what is free; one each beside a GPU.

    ServeError if the nodes can't hold the replicas, for which Serve would wait for ever.
    """
    gpus = options.gpus_per_replica or None
    most = 1 if gpus else max(1, int(max(free.cpus_per_node, default=1)))
    choices = range(most, 0, -1) if options.cpus_per_replica is None else [options.cpus_per_replica]
    for cpus in choices:
        if sum(num_fitting(free, cpus, gpus)) >= options.num_replicas:
            return cpus
    nodes = ", ".join(
        f"{node_cpus:g} CPUs and {node_gpus:g} GPUs"
        for node_cpus, node_gpus in zip(free.cpus_per_node, free.gpus_per_node, strict=True)
    )
    raise ServeError(
        f"{options.num_replicas} x ({choices[-1]} CPUs, {options.gpus_per_replica:g} GPUs) are asked for, which the "
        f"cluster's nodes don't have free ({nodes}): --num-replicas, --cpus-per-replica, --gpus-per-replica"
    )


def _free_resources() -> ClusterFacts:
    """What is free on each node now."""
    nodes = available_resources_per_node().values()  # type: ignore[no-untyped-call]
    return ClusterFacts(
        cpus_per_node=tuple(float(node.get("CPU", 0)) for node in nodes),
        gpus_per_node=tuple(float(node.get("GPU", 0)) for node in nodes),
    )


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _check_neighbours(options: ServeOptions) -> None:
    """ServeError if a Ray Serve that this cluster runs has another address, or an application of this name."""
    client = _get_global_client(raise_if_no_controller_running=False)
    if client is None:
        return
    there = client.http_config
    if (there.host, there.port) != (options.host, options.port):
        raise ServeError(
            f"--host {options.host} --port {options.port}: this cluster's Ray Serve listens on "
            f"{there.host}:{there.port} for all its applications; to be one of them, give --host {there.host} "
            f"--port {there.port}, and a --route-prefix"
        )
    if options.name in serve.status().applications:
        raise ServeError(f"--name {options.name}: this cluster serves an application of that name already")
