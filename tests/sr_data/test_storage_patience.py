"""Trouble with storage that passes is waited for and said once; what can't pass is an error at once."""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from sr_data import storage_patience, storage_s3
from sr_data.errors import StorageError
from sr_data.storage import Store, open_store
from sr_data.storage_patience import Patience, PatientStore
from tests.support.faulty_proxy import FaultyProxy, Weather
from tests.support.s3 import S3Server


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_s3, "FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(storage_patience, "FIRST_PAUSE_S", 0.01)


@pytest.fixture
def weather() -> Weather:
    return Weather()


@pytest.fixture
def store(s3: S3Server, weather: Weather, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """A bucket behind a proxy with that weather."""
    bucket, proxy = s3.new_bucket(), FaultyProxy(s3.endpoint_url, weather)
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    yield open_store(bucket)
    proxy.refuse_connections()


def clears_up(weather: Weather, lines: list[str]) -> Callable[[str], None]:
    """Takes the lines, and ends the bad weather as soon as it was spoken of."""

    def say(line: str) -> None:
        lines.append(line)
        weather.clear_up()

    return say


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("fault", ["503", "403", "quota", "drop"])
def test_trouble_that_passes_is_said_once_when_it_begins_and_once_when_it_is_over(
    store: Store, weather: Weather, fault: str
) -> None:
    lines: list[str] = []
    weather.turn_bad(fault)  # type: ignore[arg-type]
    Patience(seconds=60, say=clears_up(weather, lines)).spend(
        lambda: store.write("x", b"1"), on="x can't be written", meanwhile="all goes on"
    )
    assert store.read("x") == b"1"
    began, over = lines
    assert began.startswith("x can't be written since ") and began.endswith("trying again for 60 s; all goes on")
    assert store.uri_of("x") in began
    assert over.startswith("storage is back, ") and "x can't be written" in over


@pytest.mark.usefixtures("quick")
def test_patience_ends(store: Store, weather: Weather) -> None:
    lines: list[str] = []
    weather.turn_bad("503")
    started_s = time.monotonic()
    with pytest.raises(StorageError, match="503"):
        Patience(seconds=0.3, say=lines.append).spend(lambda: store.write("x", b"1"), on="x")
    assert time.monotonic() - started_s >= 0.3
    assert len(lines) == 1


@pytest.mark.usefixtures("quick")
def test_what_can_not_pass_is_not_waited_for(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    patience = Patience(seconds=60, say=lines.append)
    with pytest.raises(StorageError, match="no such object"):
        patience.spend(lambda: store.read("absent"), on="x")
    with pytest.raises(StorageError, match="no bucket"):
        patience.spend(lambda: open_store("s3://no-such-bucket-at-all").write("x", b""), on="x")
    with pytest.raises(StorageError, match="taken this run over"):  # as `sr_train.run_folder.OwnedStore` raises it
        patience.spend(_raise_takeover, on="x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(StorageError, match="refuses these credentials"):
        patience.spend(lambda: store.write("x", b""), on="x")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    with pytest.raises(StorageError, match="no complete credentials"):
        patience.spend(lambda: store.write("x", b""), on="x")
    assert lines == []


def _raise_takeover() -> None:
    raise StorageError("s3://b/run: another driver has taken this run over, so this one stops")


def test_whoever_must_leave_ends_the_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_patience, "FIRST_PAUSE_S", 60.0)
    began = threading.Event()
    patience = Patience(seconds=60, say=lambda _: began.set())

    def full() -> None:
        raise StorageError(errno.ENOSPC, "full")

    def leave() -> None:
        assert began.wait(20)
        patience.given_up.set()

    threading.Thread(target=leave).start()
    started_s = time.monotonic()
    with pytest.raises(StorageError, match="full"):
        patience.spend(full, on="x")
    assert time.monotonic() - started_s < 20


@pytest.mark.usefixtures("quick")
def test_an_attempt_that_failed_elsewhere_counts_as_the_first() -> None:
    lines: list[str] = []
    failed = StorageError(errno.EIO, "broke off")
    assert Patience(seconds=60, say=lines.append).spend(lambda: 7, on="x can't be read", after=failed) == 7
    assert [line.split(" ")[0] for line in lines] == ["x", "storage"] and "broke off" in lines[0]


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("fault", ["503", "403"])
def test_a_patient_store_waits_at_each_of_its_requests(store: Store, weather: Weather, fault: str) -> None:
    lines: list[str] = []
    patient = PatientStore(store.uri, Patience(seconds=60, say=clears_up(weather, lines)))
    requests: list[Callable[[], object]] = [
        lambda: patient.write("x", b"1"),
        lambda: patient.exists("x"),
        lambda: patient.read_text("x"),
        lambda: patient.num_bytes("x"),
        lambda: [entry.key for entry in patient.list()],
        lambda: patient.delete("x"),
        lambda: patient.exists("x"),
    ]
    answers = []
    for request in requests:
        weather.turn_bad(fault)  # type: ignore[arg-type]
        answers.append(request())
    assert answers == [None, True, "1", 1, ["x"], None, False]
    assert len(lines) == 2 * len(requests)
