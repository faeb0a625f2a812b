"""Runs in a real tracking server and in a plain SQLite file; servers that are away, stopped in mid-run, or hanging."""

import io
import os
import shutil
import signal
import socket
import sqlite3
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from mlflow import MlflowClient
from mlflow.entities import Run
from PIL import Image

from sr_train import tracking_server
from sr_train.run_facts import run_facts
from sr_train.tracking import (
    RunHandle,
    RunStart,
    Tracker,
    TrackingError,
    begun,
    check_tracking,
    finish_run,
    pending_run,
    replay_spool,
    resolve_tracking_uri,
    start_run,
)
from sr_train.tracking_server import redact
from tests.support.disk import small_disk
from tests.support.faulty_proxy import FaultyProxy, Weather
from tests.support.mlflow_server import MlflowServer, start_mlflow

IMAGE = np.arange(4 * 5 * 3, dtype=np.uint8).reshape(4, 5, 3)


def new_run(uri: str, **changes: object) -> RunHandle:
    options = {"experiment": "tracking", "run_name": "r1", "params": {"seed": "0"}, "tags": {"dataset": "abc"},
               "texts": {"config.yaml": "seed: 0\n"}, **changes}  # fmt: skip
    return start_run(tracking_uri=uri, **options)  # type: ignore[arg-type]


def history(run: RunHandle, key: str) -> list[tuple[int, float]]:
    return [(it.step, it.value) for it in MlflowClient(run.tracking_uri).get_metric_history(run.run_id, key)]


def artefact(run: RunHandle, path: str) -> bytes:
    return Path(MlflowClient(run.tracking_uri).download_artifacts(run.run_id, path)).read_bytes()


@pytest.fixture(scope="module")
def hanging_server() -> Iterator[str]:
    """A port that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


@pytest.fixture
def refusing_server() -> str:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return f"http://127.0.0.1:{listener.getsockname()[1]}"


@pytest.fixture(scope="module")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made once: MLflow takes 4 s to make one."""
    path = tmp_path_factory.mktemp("empty") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture(params=["server", "sqlite"])
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "server":
        server: MlflowServer = request.getfixturevalue("mlflow_server")
        return server.uri
    path = shutil.copy(request.getfixturevalue("empty_database"), tmp_path / "mlflow.db")
    return f"sqlite:///{path}"


def test_a_run_holds_what_it_was_given(uri: str, tmp_path: Path) -> None:
    parent = new_run(uri, run_name="parent")
    run = new_run(uri, params={f"p{i}": str(i) for i in range(250)}, parent_run_id=parent.run_id)
    tracker = Tracker(run, spool=tmp_path / "spool")
    for step in range(10):
        tracker.metrics({"loss": 1.0 / (step + 1), "psnr_db": float("nan") if step == 0 else 30.0}, step=step)
    tracker.image("samples/step-9/photo.png", IMAGE)
    assert tracker.close() == 0
    finish_run(run, "FINISHED")

    client = MlflowClient(uri)
    found = client.get_run(run.run_id)
    assert found.info.status == "FINISHED"
    assert found.data.params == {f"p{i}": str(i) for i in range(250)}
    assert found.data.tags["dataset"] == "abc"
    assert found.data.tags["mlflow.parentRunId"] == parent.run_id
    assert history(run, "loss") == [(step, 1.0 / (step + 1)) for step in range(10)]
    assert artefact(run, "config.yaml").decode() == "seed: 0\n"
    picture = Image.open(io.BytesIO(artefact(run, "samples/step-9/photo.png")))
    assert np.array_equal(np.asarray(picture), IMAGE)
    assert [it.name for it in (tmp_path / "spool" / run.run_id).iterdir()] == []


def test_a_sqlite_run_leaves_its_files_beside_the_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = resolve_tracking_uri("sqlite:///mlflow.db")
    assert uri == f"sqlite:///{tmp_path}/mlflow.db"
    run = new_run("sqlite:///mlflow.db", experiment="my / experiment")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    tracker = Tracker(run, spool=tmp_path / "spool")
    tracker.image("photo.png", IMAGE)
    assert tracker.close() == 0
    assert len(list((tmp_path / "mlartifacts" / "my-experiment").rglob("photo.png"))) == 1
    assert list(elsewhere.iterdir()) == []
    assert run.url == f"mlflow ui --backend-store-uri {uri}"


def test_a_database_of_another_machine_is_not_made_anew(uri: str, tmp_path: Path) -> None:
    absent = tmp_path / "other-node" / "mlflow.db"
    run = replace(new_run(uri), tracking_uri=f"sqlite:///{absent}")
    tracker = Tracker(run, spool=tmp_path / "spool")
    tracker.metrics({"loss": 1.0}, step=0)
    assert tracker.close(timeout_s=1.0) == 1
    assert not absent.exists()
    assert replay_spool(replace(run, tracking_uri=uri), tmp_path / "spool") == 0  # where it does exist
    assert history(replace(run, tracking_uri=uri), "loss") == [(0, 1.0)]


def test_a_resumed_run_goes_on_and_says_what_changed(uri: str) -> None:
    run = new_run(uri, params={"seed": "0", "steps": "100"})
    finish_run(run, "FAILED")
    again = new_run(uri, params={"seed": "0", "steps": "200", "new": "1"}, run_id=run.run_id)
    assert again == run
    found = MlflowClient(uri).get_run(run.run_id)
    assert found.info.status == "RUNNING"
    assert found.data.params == {"seed": "0", "steps": "100", "new": "1"}
    assert found.data.tags["resumed.steps"] == "200"


def test_sending_twice_changes_nothing(uri: str, tmp_path: Path) -> None:
    run = new_run(uri)
    tracker = Tracker(run, spool=tmp_path / "spool")
    records = [
        {"kind": "metrics", "time_ms": 1_700_000_000_000 + i, "step": i, "values": {"loss": float(i)}} for i in range(5)
    ]
    for record in [*records, *records, {"kind": "metrics", "time_ms": 1, "step": 9, "values": {"loss": 9.0}}, *records]:
        tracker._outbox.put(record)
    assert tracker.close() == 0
    assert sorted(history(run, "loss")) == [*((i, float(i)) for i in range(5)), (9, 9.0)]


def test_a_refused_value_does_not_block_the_rest(uri: str, tmp_path: Path) -> None:
    run = new_run(uri)
    tracker = Tracker(run, spool=tmp_path / "spool")
    tracker.metrics({"loss": 1.0}, step=0)
    tracker.metrics({"not a name!?": 1.0}, step=1)
    tracker.metrics({"loss": 2.0}, step=2)
    assert tracker.close() == 1
    assert history(run, "loss") == [(0, 1.0), (2, 2.0)]


def test_only_pictures_are_taken_for_pictures(uri: str, tmp_path: Path) -> None:
    tracker = Tracker(new_run(uri), spool=tmp_path / "spool")
    with pytest.raises(ValueError, match=r"a\.png: got float32 \(4, 4, 3\), want uint8"):
        tracker.image("a.png", np.zeros((4, 4, 3), np.float32))
    assert tracker.close() == 0


def test_a_server_stopped_in_mid_run_slows_nothing_and_loses_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "server"
    folder.mkdir()
    server = start_mlflow(folder)
    port = int(server.uri.rpartition(":")[2])
    run = new_run(server.uri)
    tracker = Tracker(run, spool=tmp_path / "spool")
    costs_s: list[float] = []

    def train(steps: range) -> None:
        for step in steps:
            start = time.perf_counter()
            tracker.metrics({"loss": float(step), "learning_rate": 1e-4}, step=step)
            costs_s.append(time.perf_counter() - start)
            time.sleep(0.002)  # the rest of a step

    try:
        train(range(100))
        server.child.send(signal.SIGKILL)
        server.child.stop()
        train(range(100, 400))
        tracker.image("samples/while-away.png", IMAGE)
        train(range(400, 500))
        server = start_mlflow(folder, port=port)
        train(range(500, 600))
        assert tracker.close(timeout_s=60) == 0
        assert history(run, "loss") == [(step, float(step)) for step in range(600)]
        assert [it.path for it in MlflowClient(server.uri).list_artifacts(run.run_id, "samples")] == [
            "samples/while-away.png"
        ]
        finish_run(run, "FINISHED")
    finally:
        server.child.stop()
    assert statistics.median(costs_s) < 0.005, f"median {statistics.median(costs_s):.6f} s"
    assert sorted(costs_s)[int(0.99 * len(costs_s))] < 0.25  # a busy machine takes the processor away at times


def test_a_hanging_server_holds_up_neither_training_nor_the_end(
    hanging_server: str, mlflow_server: MlflowServer, tmp_path: Path
) -> None:
    run = new_run(mlflow_server.uri)
    tracker = Tracker(replace(run, tracking_uri=hanging_server), spool=tmp_path / "spool")
    start = time.perf_counter()
    for step in range(200):
        tracker.metrics({"loss": float(step)}, step=step)
    assert time.perf_counter() - start < 5  # a request to that server ends after 20 s
    start = time.perf_counter()
    assert tracker.close(timeout_s=1.0) == 200
    assert time.perf_counter() - start < 15
    assert replay_spool(run, tmp_path / "spool") == 0
    assert history(run, "loss") == [(step, float(step)) for step in range(200)]


def test_a_killed_worker_loses_nothing(mlflow_server: MlflowServer, refusing_server: str, tmp_path: Path) -> None:
    run = new_run(mlflow_server.uri)
    script = f"""
import os, signal, time
from pathlib import Path
from sr_train.tracking import RunHandle, Tracker
tracker = Tracker(RunHandle(**{asdict(replace(run, tracking_uri=refusing_server))!r}), spool=Path("spool").absolute())
for step in range(50):
    tracker.metrics({{"loss": float(step)}}, step=step)
while tracker._outbox._segment.num_pending() < 50:
    time.sleep(0.01)
os.kill(os.getpid(), signal.SIGKILL)
"""
    root = Path(tracking_server.__file__).parent.parent
    env = os.environ | {"PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, "-c", script], env=env, check=False, timeout=60)
    assert done.returncode == -signal.SIGKILL
    restarted = Tracker(run, spool=tmp_path / "spool")
    restarted.metrics({"loss": 50.0}, step=50)
    assert restarted.close() == 0
    assert history(run, "loss") == [(step, float(step)) for step in range(51)]


def test_the_end_of_a_run_can_be_sent_later(mlflow_server: MlflowServer, refusing_server: str, tmp_path: Path) -> None:
    run = new_run(mlflow_server.uri)
    with pytest.raises(TrackingError, match="MLFLOW_TRACKING_URI"):
        finish_run(replace(run, tracking_uri=refusing_server), "FAILED", spool=tmp_path)
    assert replay_spool(run, tmp_path) == 0
    assert MlflowClient(mlflow_server.uri).get_run(run.run_id).info.status == "FAILED"


def test_a_spool_that_can_not_be_written_fails_nothing(
    uri: str, refusing_server: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = new_run(uri)
    (tmp_path / "spool").write_text("in the way")  # root may write anywhere else
    tracker = Tracker(run, spool=tmp_path / "spool")
    tracker.metrics({"loss": 1.0}, step=0)
    tracker.image("a.png", IMAGE)
    assert tracker.close() == 2
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "training goes on" in caplog.text and str(tmp_path / "spool") in caplog.text
    assert replay_spool(run, tmp_path / "spool") == 0
    with pytest.raises(TrackingError):  # and no OSError
        finish_run(replace(run, tracking_uri=refusing_server), "FAILED", spool=tmp_path / "spool")


@pytest.fixture
def weather() -> Weather:
    return Weather()


@pytest.fixture
def proxy(mlflow_server: MlflowServer, weather: Weather) -> Iterator[FaultyProxy]:
    """The server, where it can be away for one test."""
    proxy = FaultyProxy(mlflow_server.uri, weather)
    yield proxy
    proxy.refuse_connections()


def pending(proxy: FaultyProxy, name: str) -> RunHandle:
    """A run named `name` in an experiment of that name."""
    start = RunStart(
        experiment=name, run_name=name, params={"seed": "0"}, tags={"dataset": "abc"}, texts={"config.yaml": "seed: 0"}
    )
    return pending_run(proxy.url, start)


def the_run(server: MlflowServer, name: str) -> Run:
    """The only run in the experiment of that name."""
    client = MlflowClient(server.uri)
    (run,) = client.search_runs([client.get_experiment_by_name(name).experiment_id])
    return run


def test_a_run_that_began_without_a_server_is_made_when_it_answers(
    mlflow_server: MlflowServer, proxy: FaultyProxy, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    proxy.refuse_connections()
    run = pending(proxy, "began-without")
    tracker = Tracker(run, spool=tmp_path / "spool")
    tracker.metrics({"loss": 1.0}, step=0)
    wait_for(lambda: "can't be reached, training goes on" in caplog.text)
    tracker.image("samples/a.png", IMAGE)
    proxy.listen()
    tracker.metrics({"loss": 2.0}, step=1)
    assert tracker.close(timeout_s=60) == 0
    assert "is back" in caplog.text
    finish_run(run, "FINISHED", spool=tmp_path / "spool")

    found = the_run(mlflow_server, "began-without")
    assert (found.info.status, found.data.params, found.data.tags["dataset"]) == ("FINISHED", {"seed": "0"}, "abc")
    known = begun(run)
    assert known.run_id == found.info.run_id and known.url
    assert history(replace(known, tracking_uri=mlflow_server.uri), "loss") == [(0, 1.0), (1, 2.0)]
    assert artefact(replace(known, tracking_uri=mlflow_server.uri), "config.yaml") == b"seed: 0"


def test_a_run_that_never_saw_its_server_is_sent_by_the_next_that_does(
    mlflow_server: MlflowServer, proxy: FaultyProxy, tmp_path: Path
) -> None:
    proxy.refuse_connections()
    run = pending(proxy, "never-saw")
    tracker = Tracker(run, spool=tmp_path / "spool")
    tracker.metrics({"loss": 1.0}, step=0)
    assert tracker.close(timeout_s=1.0) == 1
    with pytest.raises(TrackingError, match="can't be reached"):
        finish_run(run, "FINISHED", spool=tmp_path / "spool")
    proxy.listen()
    resumed = begun(replace(pending(proxy, "never-saw"), key=run.key))  # as `--resume` has it from the run's folder
    assert replay_spool(resumed, tmp_path / "spool") == 0
    found = the_run(mlflow_server, "never-saw")
    assert found.info.run_id == resumed.run_id and found.info.status == "FINISHED"
    assert history(replace(resumed, tracking_uri=mlflow_server.uri), "loss") == [(0, 1.0)]


@pytest.mark.parametrize("then", ["answers", "is away"])
def test_a_run_whose_answer_was_lost_is_not_made_twice(
    mlflow_server: MlflowServer, proxy: FaultyProxy, weather: Weather, then: str
) -> None:
    run = pending(proxy, f"lost-and-{then}".replace(" ", "-"))
    weather.turn_bad("lost", path="runs/create" if then == "answers" else "runs/")  # searching is lost, too
    if then == "answers":
        begun(run)
    else:
        with pytest.raises(TrackingError):
            begun(run)
    assert weather.num_struck > 0
    weather.clear_up()
    assert begun(run).run_id == the_run(mlflow_server, run.run_name).info.run_id


def test_a_disk_that_is_full_for_a_while_loses_nothing(
    mlflow_server: MlflowServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = new_run(mlflow_server.uri)
    with small_disk(tmp_path / "disk", "256k") as disk:
        tracker = Tracker(run, spool=disk / "spool")
        fill(disk)
        started_s = time.perf_counter()
        for step in range(1000):
            tracker.metrics({"loss": float(step)}, step=step)
        tracker.image("samples/a.png", IMAGE)
        assert time.perf_counter() - started_s < 5
        wait_for(lambda: "can't be written" in caplog.text)
        (disk / "filler").unlink()
        assert tracker.close(timeout_s=60) == 0
    assert sorted(history(run, "loss")) == [(step, float(step)) for step in range(1000)]
    assert artefact(run, "samples/a.png")


def test_a_disk_that_stays_full_is_counted_and_said(
    mlflow_server: MlflowServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = new_run(mlflow_server.uri)
    with small_disk(tmp_path / "disk", "256k") as disk:
        tracker = Tracker(run, spool=disk / "spool")
        fill(disk)
        for step in range(1000):
            tracker.metrics({"loss": float(step)}, step=step)
        wait_for(lambda: "can't be written" in caplog.text)
        missing = tracker.close(timeout_s=2.0)
        assert missing == 1000 - len(history(run, "loss")) > 0  # a record or two still fitted on the last page
        assert f"{missing} of them are lost, as the disk refused them" in caplog.text


def fill(disk: Path) -> None:
    with (disk / "filler").open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(512))


def wait_for(condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert condition()


def test_check_accepts_what_works(uri: str, tmp_path: Path) -> None:
    check_tracking(uri)
    check_tracking(f"sqlite:///{tmp_path}/new/mlflow.db")
    assert not (tmp_path / "new" / "mlflow.db").exists()  # a check makes no database


def test_check_names_the_uri_and_the_flag_in_time(hanging_server: str, refusing_server: str) -> None:
    for uri, limit_s in ((refusing_server, 2.0), (hanging_server, 3.0)):
        start = time.perf_counter()
        with pytest.raises(TrackingError, match=rf"{uri}.*MLFLOW_TRACKING_URI or --tracking\.uri"):
            check_tracking(uri, timeout_s=1.5)
        assert time.perf_counter() - start < limit_s


def test_check_refuses_what_can_not_hold_a_run(tmp_path: Path, s3: object) -> None:
    no_mlflow = s3.env["AWS_ENDPOINT_URL"]  # type: ignore[attr-defined]
    with pytest.raises(TrackingError, match=no_mlflow):
        check_tracking(no_mlflow)
    with pytest.raises(TrackingError, match="not supported; allowed are"):
        check_tracking(str(tmp_path / "mlruns"))
    (tmp_path / "text.db").write_text("no database" * 100)
    with pytest.raises(TrackingError, match=r"text\.db can't be opened.*--tracking\.uri"):
        check_tracking(f"sqlite:///{tmp_path}/text.db")
    (tmp_path / "a-file").write_text("")
    with pytest.raises(TrackingError, match="can't be written"):
        check_tracking(f"sqlite:///{tmp_path}/a-file/mlflow.db")


def test_a_deleted_experiment_is_said(uri: str) -> None:
    run = new_run(uri, experiment="soon-deleted")
    MlflowClient(uri).delete_experiment(run.experiment_id)
    with pytest.raises(TrackingError, match=r"'soon-deleted'.*--tracking\.experiment"):
        new_run(uri, experiment="soon-deleted")


def test_messages_and_urls_hold_no_password() -> None:
    assert redact("https://me:secret@host:5000/x") == "https://***@host:5000/x"
    assert redact("http://host:5000") == "http://host:5000"
    assert redact("no http://a:p@ss@h/x, nor http://h") == "no http://***@h/x, nor http://h"
    run = RunHandle(tracking_uri="http://a:secret@h", run_id="1", experiment_id="0", run_name="r", url="http://***@h")
    assert "secret" not in repr(run)


def test_a_server_that_goes_away_is_said_without_its_password(
    mlflow_server: MlflowServer, refusing_server: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What MLflow and requests say quotes the whole URI."""
    uri = refusing_server.replace("http://", "http://alice:secret@")
    tracker = Tracker(replace(new_run(mlflow_server.uri), tracking_uri=uri), spool=tmp_path / "spool")
    tracker.metrics({"loss": 1.0}, step=0)
    assert tracker.close(timeout_s=3.0) == 1
    assert refusing_server.replace("http://", "http://***@") in caplog.text
    assert "secret" not in caplog.text


def test_no_password_is_recorded(mlflow_server: MlflowServer) -> None:
    uri = mlflow_server.uri.replace("http://", "http://me:secret@")
    run = new_run(uri, params={"tracking.uri": uri}, tags={"server": uri}, texts={"config.yaml": f"uri: {uri}"})
    host = mlflow_server.uri.removeprefix("http://")
    assert run.url.startswith(f"http://***@{host}/")
    found = MlflowClient(mlflow_server.uri).get_run(run.run_id)
    assert found.data.params["tracking.uri"] == found.data.tags["server"] == f"http://***@{host}"
    assert artefact(run, "config.yaml") == f"uri: http://***@{host}".encode()
    with pytest.raises(TrackingError) as caught:
        check_tracking("http://me:secret@127.0.0.1:9", timeout_s=3)
    assert "secret" not in str(caught.value)


def test_what_a_user_has_set_stays(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "77")
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", raising=False)
    tracking_server.connect("http://127.0.0.1:9")
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "77"
    assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == str(tracking_server.HTTP_NUM_RETRIES)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://from-the-environment:5000/")
    assert resolve_tracking_uri() == "http://from-the-environment:5000"
    assert resolve_tracking_uri("http://given") == "http://given"
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert resolve_tracking_uri() == f"sqlite:///{tmp_path}/mlflow.db"


def test_facts_say_what_ran_where(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = run_facts()
    assert facts["python"] == ".".join(map(str, sys.version_info[:3]))
    assert facts["torch"].startswith("2.")
    assert facts["hostname"]
    monkeypatch.setenv("SR_GIT_SHA", "cafe")
    monkeypatch.setenv("SR_GIT_DIRTY", "1")
    assert (run_facts()["git_sha"], run_facts()["git_dirty"]) == ("cafe", "true")


def test_no_secret_reaches_the_database_or_the_files(
    empty_database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    secret = "sEcReT-d41d8cd9"
    for name in ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "MLFLOW_TRACKING_PASSWORD", "HF_TOKEN", "CUDA_SECRET"):
        monkeypatch.setenv(name, secret)
    run = new_run(f"sqlite:///{tmp_path}/mlflow.db", tags=run_facts())
    tracker = Tracker(run, spool=tmp_path / "spool")
    tracker.metrics({"loss": 1.0}, step=0)
    assert tracker.close() == 0
    finish_run(run, "FINISHED")
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        dump = "\n".join(database.iterdump())
    assert run.run_id in dump
    assert secret not in dump
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert files
    assert all(secret.encode() not in path.read_bytes() for path in files)
