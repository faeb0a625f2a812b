"""The Ray Serve application: one process for HTTP, replicas of the model behind it, started and ended as a whole."""

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ray
from ray import serve
from ray.exceptions import RayTaskError
from ray.serve.config import HTTPOptions, ProxyLocation
from ray.serve.context import _get_global_client  # the only way to ask a Serve that runs already for its address
from ray.serve.exceptions import RayServeException
from ray.serve.schema import LoggingConfig

from sr_serve.ingress import Ingress
from sr_serve.model_replica import ModelReplica, ReplicaOptions
from sr_serve.serve_options import ServeError, ServeOptions
from sr_serve.uploads import UploadLimits
from sr_train.ray_cluster import cluster_facts, connect
from sr_train.tracking_server import resolve_tracking_uri
from sr_train.upscaler import REGISTRY_PREFIX, open_network

_SHUTDOWN_S = 10.0
_MAX_CLIENTS = 200
"""Who may be connected at once, most of them sending or waiting; those beyond wait for one to leave."""
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
    connect()
    _check_neighbours(options)
    num_cpus = _cpus_per_replica(options)
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
        graceful_shutdown_wait_loop_s=0.2,
        graceful_shutdown_timeout_s=_SHUTDOWN_S,
        logging_config=_QUIET,
    )(serve.ingress()(Ingress))
    return ingress.bind(replicas, limits, tile_px_lr=options.tile_px_lr, timeout_s=options.timeout_s)


def _cpus_per_replica(options: ServeOptions) -> int:
    """As asked, or those free; ServeError if the cluster can't have the replicas, which Serve would wait for."""
    free = ray.available_resources()  # type: ignore[no-untyped-call]
    num_cpus, num_gpus, num_replicas = int(free.get("CPU", 0)), free.get("GPU", 0.0), options.num_replicas
    wanted = options.cpus_per_replica
    if wanted is None:
        largest_node = int(max(cluster_facts().cpus_per_node, default=1))
        wanted = 1 if options.gpus_per_replica else max(1, min(largest_node, num_cpus // num_replicas))
    if wanted * num_replicas > num_cpus or options.gpus_per_replica * num_replicas > num_gpus:
        raise ServeError(
            f"{num_replicas} x ({wanted} CPUs, {options.gpus_per_replica:g} GPUs) are asked for, and the cluster has "
            f"{num_cpus} CPUs and {num_gpus:g} GPUs free (--num-replicas, --cpus-per-replica, --gpus-per-replica)"
        )
    return wanted


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
