"""The durable queue with a receiver that the test controls."""

import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from sr_train import outbox
from sr_train.outbox import Outbox, RefusedError, replay
from sr_train.spool import Record


class Receiver:
    """Takes records, or fails, or hangs, as told."""

    def __init__(self) -> None:
        self.got: list[Record] = []
        self.calls = 0
        self.failing = threading.Event()
        self.failed = threading.Event()
        self.release = threading.Event()
        self.release.set()
        self.refuse: int | None = None

    def __call__(self, records: Sequence[Record], folder: Path) -> None:
        self.calls += 1
        self.release.wait(30)
        if self.failing.is_set():
            self.failed.set()
            raise ConnectionError("away")
        if any(record.get("i") == self.refuse for record in records if self.refuse is not None):
            raise RefusedError("never")
        self.got += [{**record, "content": (folder / record["file"]).read_bytes()} if "file" in record else record
                     for record in records]  # fmt: skip


def metrics(i: int) -> Record:
    return {"kind": "metrics", "i": i}


def test_everything_arrives_in_order_in_few_calls(tmp_path: Path) -> None:
    receiver = Receiver()
    box = Outbox(tmp_path, receiver, receiver="r", interval_s=0.2)
    for i in range(250):
        box.put(metrics(i))
    box.put({"kind": "file", "path": "a.txt"}, encode=lambda: b"hello")
    box.put(metrics(250))
    assert box.close(10) == 0
    assert [record["i"] for record in receiver.got if record["kind"] == "metrics"] == list(range(251))
    assert receiver.got[-2]["content"] == b"hello"
    assert receiver.calls < 20
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_lost_while_the_receiver_is_away(tmp_path: Path) -> None:
    receiver = Receiver()
    receiver.failing.set()
    box = Outbox(tmp_path, receiver, receiver="r", interval_s=0.01)
    box.put(metrics(0))
    assert receiver.failed.wait(10)
    box.put(metrics(1))
    receiver.failing.clear()
    assert box.close(20) == 0
    assert [record["i"] for record in receiver.got] == [0, 1]


def test_what_could_not_be_sent_is_counted_kept_and_replayed(tmp_path: Path) -> None:
    receiver = Receiver()
    receiver.failing.set()
    box = Outbox(tmp_path, receiver, receiver="r", interval_s=0.01)
    for i in range(3):
        box.put(metrics(i))
    assert box.close(0.5) == 3
    assert replay(tmp_path, receiver) == 3  # still away
    receiver.failing.clear()
    assert replay(tmp_path, receiver) == 0
    assert [record["i"] for record in receiver.got] == [0, 1, 2]
    assert replay(tmp_path, receiver) == 0
    assert len(receiver.got) == 3


def test_a_later_outbox_sends_what_an_earlier_one_left_first(tmp_path: Path) -> None:
    receiver = Receiver()
    receiver.failing.set()
    earlier = Outbox(tmp_path, receiver, receiver="r")
    earlier.put(metrics(0))
    assert earlier.close(0.3) == 1
    receiver.failing.clear()
    later = Outbox(tmp_path, receiver, receiver="r")
    later.put(metrics(1))
    assert later.close(10) == 0
    assert [record["i"] for record in receiver.got] == [0, 1]


def test_a_hanging_receiver_holds_up_neither_put_nor_close(tmp_path: Path) -> None:
    receiver = Receiver()
    receiver.release.clear()
    box = Outbox(tmp_path, receiver, receiver="r", interval_s=0.01)
    durations_s = []
    for i in range(2000):
        start = time.perf_counter()
        box.put(metrics(i))
        durations_s.append(time.perf_counter() - start)
    start = time.perf_counter()
    assert box.close(0.5) == 2000
    assert time.perf_counter() - start < 5
    # The median: on a busy machine some wait for their turn, the longest seen for a second.
    assert sorted(durations_s)[1000] < 0.05
    receiver.release.set()


def test_a_record_that_is_refused_does_not_block_the_others(tmp_path: Path) -> None:
    receiver = Receiver()
    receiver.refuse = 3
    box = Outbox(tmp_path, receiver, receiver="r")
    for i in range(6):
        box.put(metrics(i))
    assert box.close(10) == 1
    assert [record["i"] for record in receiver.got] == [0, 1, 2, 4, 5]
    (kept,) = tmp_path.glob("*/refused.jsonl")
    assert '"i": 3' in kept.read_text()


def test_no_password_reaches_the_log_or_the_spool(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    quoted = "request to http://alice:p@ss@host:5000/api failed"
    refused, away = threading.Event(), threading.Event()

    def deliver(records: Sequence[Record], folder: Path) -> None:
        if not refused.is_set():
            refused.set()
            raise RefusedError(quoted)
        away.set()
        raise ConnectionError(quoted)

    box = Outbox(tmp_path, deliver, receiver="r", interval_s=0.01)
    box.put(metrics(0))
    assert refused.wait(10)
    box.put(metrics(1))
    assert away.wait(10)
    assert box.close(0.5) == 2
    assert replay(tmp_path, deliver) == 2
    (kept,) = tmp_path.glob("*/refused.jsonl")
    assert caplog.text.count("http://***@host:5000/api") == 3, caplog.text
    assert "http://***@host:5000/api" in kept.read_text()
    assert "alice" not in caplog.text + kept.read_text()
    assert "ss@" not in caplog.text + kept.read_text()


def test_a_spool_that_breaks_does_not_fail_the_end(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    box = Outbox(tmp_path, Receiver(), receiver="r")
    (segment,) = tmp_path.iterdir()
    (segment / "records.jsonl").mkdir()  # root may read anything but this
    assert box.close(0.2) == 0
    assert "can't be read any more" in caplog.text


def test_memory_is_bounded_when_the_disk_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox, "MAX_ITEMS_IN_MEMORY", 10)
    box = Outbox(tmp_path, Receiver(), receiver="r")
    (segment,) = tmp_path.iterdir()
    (segment / "records.jsonl").mkdir()  # root may write anything but this
    for i in range(100):
        box.put(metrics(i))
    (segment / "records.jsonl").rmdir()
    undelivered = box.close(10)
    assert 85 <= undelivered <= 90


def test_a_closed_outbox_says_so(tmp_path: Path) -> None:
    box = Outbox(tmp_path, Receiver(), receiver="r")
    assert box.close(5) == 0
    assert box.close(5) == 0
    with pytest.raises(RuntimeError, match="closed"):
        box.put(metrics(0))
