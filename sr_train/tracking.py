"""The MLflow run: what starts it, what is sent to it during training, what ends it.

Every call names its tracking server; MLflow's process-wide state (active run, tracking URI) is neither read nor
changed, with one exception, `tracking_server.connect`, which says what and why.
"""

import logging
import re
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from sr_data.decode import encode_png
from sr_train.outbox import Outbox, RefusedError, replay
from sr_train.run_facts import run_facts
from sr_train.spool import Record, Segment
from sr_train.tracking_server import (
    TrackingError,
    as_tracking_error,
    check_tracking,
    connect,
    redact,
    resolve_tracking_uri,
    sent_once,
    sqlite_path,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient

__all__ = ["RunHandle", "RunStart", "Status", "Tracker", "TrackingError", "begun", "check_tracking", "finish_run",
           "nested_run", "pending_run", "record_outcome", "replay_spool", "resolve_tracking_uri", "run_facts",
           "start_run"]  # fmt: skip

logger = logging.getLogger(__name__)

Status = Literal["FINISHED", "FAILED", "KILLED"]

KEY_TAG = "sr.key"
"""On a run: `RunHandle.key`."""
MAX_PARAMS_PER_REQUEST = 100  # a limit of MLflow's REST API, as are 100 tags and 1,000 metrics


@dataclass(frozen=True, kw_only=True, slots=True)
class RunStart:
    """What a run begins with."""

    experiment: str
    run_name: str
    params: Mapping[str, str]
    tags: Mapping[str, str]
    texts: Mapping[str, str]
    """Files, by path."""
    parent_run_id: str | None = None


@dataclass(frozen=True, slots=True)
class RunHandle:
    """A run, as plain values: it travels from the driver to the workers."""

    tracking_uri: str = field(repr=False)
    """Absolute; may hold a password, so it is never printed or recorded."""
    run_id: str
    experiment_id: str
    run_name: str
    url: str
    """Where to look at it: a page, or for a database the command that serves the page."""
    key: str = ""
    """Of a run that began as a `pending_run`: what it is called here, before and after the server gave it an id."""
    start: RunStart | None = field(default=None, repr=False)
    """Of a run that the server does not know yet."""


def start_run(
    *,
    tracking_uri: str,
    experiment: str,
    run_name: str,
    params: Mapping[str, str],
    tags: Mapping[str, str],
    texts: Mapping[str, str],
    parent_run_id: str | None = None,
    run_id: str | None = None,
    key: str | None = None,
) -> RunHandle:
    """Create a run, or go on with `run_id`, and record what is known about it: `texts` are files by path.

    A run is created once for each `key`: what an earlier attempt has made, also one whose answer was lost, is gone on
    with.

    A parameter of a run can't change in MLflow. Where a resumed run has another value than it began with, the new value
    becomes the tag `resumed.<parameter>`. A password in the tracking URI is left out wherever the URI occurs in them.
    Raises TrackingError.
    """
    uri = resolve_tracking_uri(tracking_uri)
    params, tags, texts = (
        {key: value.replace(uri, redact(uri)) for key, value in some.items()} for some in (params, tags, texts)
    )
    with as_tracking_error(uri):
        client = connect(uri)
        if run_id is None:
            experiment_id = _experiment(client, uri, experiment)
            run_id = _run_of_key(client, experiment_id, key) if key is not None else None
        if run_id is None:
            own = {KEY_TAG: key or uuid.uuid4().hex} | ({"mlflow.parentRunId": parent_run_id} if parent_run_id else {})
            run = _created(client, experiment_id, run_name, own | tags)
            known: Mapping[str, str] = {}
        else:
            client.update_run(run_id, status="RUNNING")
            run = client.get_run(run_id)
            known = run.data.params
            changed = {f"resumed.{key}": value for key, value in params.items() if known.get(key, value) != value}
            _log(client, run_id, tags={**tags, **changed})
        handle = RunHandle(
            tracking_uri=uri,
            run_id=run.info.run_id,
            experiment_id=run.info.experiment_id,
            run_name=run.info.run_name,
            url=_url(uri, run.info.experiment_id, run.info.run_id),
            key=key or "",
        )
        _log(client, handle.run_id, params={key: value for key, value in params.items() if key not in known})
        for path, text in texts.items():
            client.log_text(handle.run_id, text, path)
    return handle


def pending_run(tracking_uri: str, start: RunStart, *, run_id: str | None = None, key: str | None = None) -> RunHandle:
    """A run that begins while its server is away. Its Tracker keeps what it is told, makes the run as soon as the
    server answers, and sends everything; `begun` does that for whoever needs the run itself.

    `key` is that of an earlier pending run that this one goes on with; `run_id`, of a run that the server knew.
    """
    key = key or run_id or uuid.uuid4().hex
    return RunHandle(
        tracking_uri=resolve_tracking_uri(tracking_uri),
        run_id=run_id or "",
        experiment_id="",
        run_name=start.run_name,
        url="",
        key=key,
        start=start,
    )


def begun(run: RunHandle) -> RunHandle:
    """The run as the server knows it, made if it is still pending. Raises TrackingError, soon if the server is away."""
    if run.start is None:
        return run
    check_tracking(run.tracking_uri)
    start = run.start
    return start_run(
        tracking_uri=run.tracking_uri,
        experiment=start.experiment,
        run_name=start.run_name,
        params=start.params,
        tags=start.tags,
        texts=start.texts,
        parent_run_id=start.parent_run_id,
        run_id=run.run_id or None,
        key=run.key,
    )


def nested_run(parent: RunHandle, run_name: str) -> str | None:
    """Id of the run of that name in `parent`, if there is one. Raises TrackingError."""
    with as_tracking_error(parent.tracking_uri):
        query = f"tags.`mlflow.parentRunId` = '{parent.run_id}' and attributes.run_name = '{run_name}'"
        found = connect(parent.tracking_uri).search_runs([parent.experiment_id], query, max_results=1)
        return str(found[0].info.run_id) if found else None


def record_outcome(run: RunHandle, *, metrics: Mapping[str, float], files: Mapping[str, bytes]) -> None:
    """Records final numbers and files (by path) at once, where someone waits for them. Raises TrackingError."""
    from mlflow.entities import Metric

    with as_tracking_error(run.tracking_uri), TemporaryDirectory(prefix="sr-outcome-") as folder:
        client = connect(run.tracking_uri)
        _log(client, run.run_id, metrics=[Metric(name, value, _now_ms(), 0) for name, value in metrics.items()])
        for path, content in files.items():
            local = Path(folder) / Path(path).name
            local.write_bytes(content)
            parent = Path(path).parent.as_posix()
            client.log_artifact(run.run_id, str(local), None if parent == "." else parent)


def finish_run(run: RunHandle, status: Status, *, spool: Path | None = None) -> None:
    """End the run. Raises TrackingError; where a `spool` is given, and can be written, `replay_spool` ends it later."""
    try:
        with as_tracking_error(run.tracking_uri):
            connect(run.tracking_uri).set_terminated(begun(run).run_id, status)
    except TrackingError:
        if spool is not None:
            _keep_status(_spool_of(run, spool), status)
        raise


def _keep_status(spool: Path, status: Status) -> None:
    try:
        segment = Segment.create(spool)
        segment.append({"kind": "status", "status": status, "time_ms": _now_ms()})
        segment.close()
    except OSError as error:
        logger.warning("that the run is %s can't be kept for later: %s", status, error)


class Tracker:
    """Sends what happens during training to the run. Training never waits for it and never fails by it.

    Everything goes through a spool on disk, in order (see `sr_train.outbox`). What an earlier Tracker of this run left
    in the same spool is sent first. While the server is away records gather on disk, and are sent when it is back.
    Where the spool can't be written (a full disk, no permission), nothing of this process is recorded: one warning.
    """

    def __init__(self, run: RunHandle, *, spool: Path) -> None:
        """Start sending. `spool`: a folder, absolute; made if missing."""
        self.run = run
        self._num_lost = 0
        receiver = f"tracking server {redact(run.tracking_uri)}"
        self._outbox: Outbox | None = None
        try:
            self._outbox = Outbox(_spool_of(run, spool), _Delivery(run), receiver=receiver)
        except OSError as error:
            logger.warning("nothing of this process reaches %s, training goes on: no spool (%s)", receiver, error)

    def metrics(self, values: Mapping[str, float], *, step: int) -> None:
        """Record numbers at `step`; their time is now. NaN and ±inf are allowed (MLflow stores ±1.8e308)."""
        numbers = {key: float(value) for key, value in values.items()}
        self._put({"kind": "metrics", "time_ms": _now_ms(), "step": step, "values": numbers})

    def image(self, path: str, image_HWC: np.ndarray) -> None:
        """Record a picture (uint8, RGB) as a PNG artefact at `path`, e.g. "samples/step-0100.png"."""
        if image_HWC.dtype != np.uint8 or image_HWC.ndim != 3 or image_HWC.shape[2] != 3:
            raise ValueError(f"{path}: got {image_HWC.dtype} {image_HWC.shape}, want uint8 of shape (height, width, 3)")
        encode = partial(
            encode_png, image_HWC.copy()
        )  # a copy: the caller may go on drawing; encoding takes 50 times as long
        self._put({"kind": "file", "path": path}, encode=encode, num_bytes=image_HWC.nbytes)

    def close(self, timeout_s: float = 30.0) -> int:
        """Send what is left, for at most `timeout_s`; returns how many items were not: they stay in the spool."""
        return self._num_lost if self._outbox is None else self._outbox.close(timeout_s)

    def _put(self, record: Record, *, encode: Callable[[], bytes] | None = None, num_bytes: int = 0) -> None:
        if self._outbox is None:
            self._num_lost += 1
        else:
            self._outbox.put(record, encode=encode, num_bytes=num_bytes)


def replay_spool(run: RunHandle, spool: Path) -> int:
    """Send what Trackers of this run that are gone left in `spool`; returns the number of items still unsent."""
    return replay(_spool_of(run, spool), _Delivery(run))


class _Delivery:
    """Sends records to a run, which is made with the first of them if it is pending."""

    def __init__(self, run: RunHandle) -> None:
        self._run = run

    def __call__(self, records: Sequence[Record], folder: Path) -> None:
        self._run = begun(self._run)
        _deliver(self._run, records, folder)


def _deliver(run: RunHandle, records: Sequence[Record], folder: Path) -> None:
    """Send records to the run; RefusedError if MLflow finds them invalid. Sending twice changes nothing.

    A metric's identity in MLflow is (key, step, time, value), so a repeated one is dropped; the rest overwrites itself.
    """
    if run.tracking_uri.startswith("sqlite:") and not sqlite_path(run.tracking_uri).exists():
        # Opening it would make an empty one: this is another machine, or somebody moved the file.
        raise TrackingError(f"{run.tracking_uri} does not exist on this machine")
    client = connect(run.tracking_uri)
    from mlflow.entities import Metric
    from mlflow.exceptions import MlflowException

    try:
        match records[0]["kind"]:
            case "file":
                path = Path(records[0]["path"])
                parent = path.parent.as_posix() if path.parent.name else None
                client.log_artifact(run.run_id, str(folder / records[0]["file"]), parent)
            case "status":
                client.set_terminated(run.run_id, records[0]["status"], end_time=records[0]["time_ms"])
            case _:
                metrics = [
                    Metric(key, value, record["time_ms"], record["step"])
                    for record in records
                    for key, value in record["values"].items()
                ]
                _log(client, run.run_id, metrics=metrics)
    except MlflowException as error:
        if error.error_code in ("INVALID_PARAMETER_VALUE", "BAD_REQUEST"):
            raise RefusedError(str(error)) from error
        raise


def _log(
    client: "MlflowClient",
    run_id: str,
    *,
    params: Mapping[str, str] | None = None,
    tags: Mapping[str, str] | None = None,
    metrics: Sequence[Any] = (),
) -> None:
    """Log any number of entries, in requests as large as MLflow takes."""
    from mlflow.entities import Param, RunTag

    for start in range(0, len(metrics), 1000):
        client.log_batch(run_id, metrics=metrics[start : start + 1000])
    entries: list[Any] = [Param(key, str(value)) for key, value in (params or {}).items()]
    for start in range(0, len(entries), MAX_PARAMS_PER_REQUEST):
        client.log_batch(run_id, params=entries[start : start + MAX_PARAMS_PER_REQUEST])
    entries = [RunTag(key, str(value)) for key, value in (tags or {}).items()]
    for start in range(0, len(entries), MAX_PARAMS_PER_REQUEST):
        client.log_batch(run_id, tags=entries[start : start + MAX_PARAMS_PER_REQUEST])


def _run_of_key(client: "MlflowClient", experiment_id: str, key: str) -> str | None:
    """The oldest run that was made for it."""
    query = f"tags.`{KEY_TAG}` = '{key}'"
    found = client.search_runs([experiment_id], query, max_results=1, order_by=["attributes.start_time ASC"])
    return str(found[0].info.run_id) if found else None


def _created(client: "MlflowClient", experiment_id: str, run_name: str, tags: Mapping[str, str]) -> Any:
    from mlflow.exceptions import MlflowException

    try:
        with sent_once():
            return client.create_run(experiment_id, tags=dict(tags), run_name=run_name)
    except (MlflowException, OSError):
        # The server may have made it and gone before it could say so.
        if (run_id := _run_of_key(client, experiment_id, tags[KEY_TAG])) is not None:
            return client.get_run(run_id)
        raise


def _experiment(client: "MlflowClient", uri: str, name: str) -> str:
    """Return the id of the experiment, made if missing. Without a server its artefacts lie beside the database."""
    from mlflow.exceptions import MlflowException

    location = None
    if uri.startswith("sqlite:"):  # MLflow's default would be a folder in whatever working directory a process has
        location = (sqlite_path(uri).parent / "mlartifacts" / re.sub(r"[^\w.-]+", "-", name)).as_uri()
    if (found := client.get_experiment_by_name(name)) is None:
        try:
            return str(client.create_experiment(name, artifact_location=location))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":  # another run of a sweep was faster
                raise
        found = client.get_experiment_by_name(name)
    if found is None or found.lifecycle_stage != "active":
        raise TrackingError(
            f"experiment {name!r} at {redact(uri)} was deleted: restore it, or use another (--tracking.experiment)"
        )
    return str(found.experiment_id)


def _url(uri: str, experiment_id: str, run_id: str) -> str:
    if uri.startswith("http"):
        return f"{redact(uri)}/#/experiments/{experiment_id}/runs/{run_id}"
    return f"mlflow ui --backend-store-uri {redact(uri)}"


def _spool_of(run: RunHandle, spool: Path) -> Path:
    return spool / (run.key or run.run_id)


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
