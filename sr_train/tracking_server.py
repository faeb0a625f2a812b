"""Where runs are recorded: the URI of the MLflow server or database, a client for it, and whether it can be used.

MLflow is imported when it is first used: that takes 3 s.
"""

import logging
import os
import re
import socket
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

if TYPE_CHECKING:
    from mlflow import MlflowClient

URI_FLAG = "set MLFLOW_TRACKING_URI or --tracking.uri"
DATABASES = ("postgresql", "mysql", "mssql")
HTTP_TIMEOUT_S = 20
HTTP_NUM_RETRIES = 1


class TrackingError(RuntimeError):
    """The tracking server or database can't be used; the message names its URI and the flag."""


def resolve_tracking_uri(uri: str | None = None) -> str:
    """Return `uri`, else MLFLOW_TRACKING_URI, else mlflow.db in the working directory, such that it means one thing.

    A worker has another working directory, so a relative SQLite path is made absolute here, once, in the driver.
    """
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
    return f"sqlite:///{sqlite_path(uri)}" if uri.startswith("sqlite:") else uri.rstrip("/")


def check_tracking(uri: str, *, timeout_s: float = 5.0) -> None:
    """Make sure that runs can be recorded at `uri`, in at most `timeout_s` (plus 3 s to import MLflow, once).

    Raises TrackingError if the server is away, hangs, wants other credentials or is no MLflow server, or if the
    database can't be opened or written.
    """
    uri = resolve_tracking_uri(uri)
    scheme = urlsplit(uri).scheme.partition("+")[0]
    if scheme == "sqlite":
        _check_sqlite(uri)
        return
    if scheme in ("http", "https"):
        connect(uri)  # imports MLflow before the clock starts
        probe: Callable[[], None] = partial(_check_server, uri, timeout_s)
    elif scheme in DATABASES:
        probe = partial(_check_database, uri)
    else:
        raise TrackingError(
            f"tracking URI {redact(uri)!r} is not supported; allowed are http(s)://…, sqlite:///…, "
            f"{', '.join(f'{name}://…' for name in DATABASES)} ({URI_FLAG})"
        )
    errors: list[Exception] = []

    def guarded() -> None:
        try:
            probe()
        except Exception as error:  # noqa: BLE001  handed to the caller's thread, which raises it
            errors.append(error)

    # A thread: the name look-up, the connection and each byte of an answer have a timeout of their own, or none.
    thread = threading.Thread(target=guarded, name="check-tracking", daemon=True)
    thread.start()
    thread.join(timeout_s)
    if thread.is_alive():
        raise TrackingError(f"tracking server {redact(uri)} does not answer within {timeout_s:g} s ({URI_FLAG})")
    if errors:
        raise _tracking_error(uri, errors[0]) from errors[0]


def redact(text: str) -> str:
    """`text`, a URI or a message that quotes some, without the user names and passwords in them."""
    return re.sub(r"(?<=://)[^/\s]*@", "***@", text)


def connect(uri: str) -> "MlflowClient":
    """Return a client of the server or database at `uri`.

    MLflow reads timeouts and retries from the environment only; its defaults (120 s, 7 retries, 2 minutes of waiting)
    let a hanging server hold a process for a quarter of an hour. So where the user has set nothing they are set for
    this process, MLflow's usage reports to its makers are switched off, and so are its own lines and bars on the
    terminal, which would break ours.
    """
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", str(HTTP_TIMEOUT_S))
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", str(HTTP_NUM_RETRIES))
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    from mlflow import MlflowClient

    # It announces each table that it creates, and how pip is not pinned. After the import, which sets the level.
    if "MLFLOW_LOGGING_LEVEL" not in os.environ:
        logging.getLogger("mlflow").setLevel(logging.ERROR)
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


@contextmanager
def sent_once() -> Iterator[None]:
    """Requests of this process are not repeated by MLflow's client while the block runs.

    It repeats any request whose answer does not come, though the server may have done what was asked: two runs, or two
    versions of a model. Who makes something looks for it after a failure instead.
    """
    name = "MLFLOW_HTTP_REQUEST_MAX_RETRIES"
    before = os.environ.get(name)
    os.environ[name] = "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def sqlite_path(uri: str) -> Path:
    """Return the absolute path of the file that a `sqlite:///…` URI means."""
    return Path(unquote(uri.removeprefix("sqlite:///").partition("?")[0])).absolute()


def _check_sqlite(uri: str) -> None:
    """Raise TrackingError unless the file can be opened and written, or made. Does not create or migrate it."""
    path = sqlite_path(uri)
    folder = next(parent for parent in path.parents if parent.exists())
    if not os.access(path if path.exists() else folder, os.W_OK) or not folder.is_dir():
        raise TrackingError(f"tracking database {uri} can't be written ({URI_FLAG})")
    if path.exists():
        try:
            with sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True) as database:
                database.execute("PRAGMA schema_version").fetchone()
        except sqlite3.Error as error:
            raise TrackingError(f"tracking database {uri} can't be opened: {error} ({URI_FLAG})") from error
    path.parent.mkdir(parents=True, exist_ok=True)


def _check_server(uri: str, timeout_s: float) -> None:
    """Ask for one experiment: that needs a server which is up, is MLflow, and accepts these credentials."""
    from mlflow.utils.credentials import get_default_host_creds
    from mlflow.utils.rest_utils import http_request, verify_rest_response

    endpoint = "/api/2.0/mlflow/experiments/search"
    creds = get_default_host_creds(uri)  # type: ignore[no-untyped-call]
    answer = http_request(  # type: ignore[no-untyped-call]
        creds, endpoint, "POST", json={"max_results": 1}, max_retries=0, timeout=timeout_s
    )
    verify_rest_response(answer, endpoint)
    answer.json()


def _check_database(uri: str) -> None:
    import sqlalchemy

    with sqlalchemy.create_engine(uri).connect() as connection:
        connection.execute(sqlalchemy.text("SELECT 1"))


@contextmanager
def as_tracking_error(uri: str) -> Iterator[None]:
    """Turn what a request to `uri` raises into a TrackingError."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except (MlflowException, OSError) as error:  # OSError: requests' exceptions, and artefacts on a disk
        raise _tracking_error(uri, error) from error


def _tracking_error(uri: str, error: BaseException) -> TrackingError:
    reason = _unreachable(error) or next(
        (line for line in str(error).splitlines() if line.strip()), type(error).__name__
    )
    return TrackingError(f"tracking server {redact(uri)}: {redact(reason)} ({URI_FLAG})")


def _unreachable(error: BaseException) -> str | None:
    """What the operating system said, if no connection came about: below it lie five layers of quoted exceptions."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, ConnectionError | socket.gaierror):
        cause = cause.__cause__ or cause.__context__
    return f"can't be reached ({cause.strerror})" if cause is not None and cause.strerror else None
