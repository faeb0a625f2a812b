"""Records on disk: order, restarts, half-written lines, and who may touch a segment."""

from pathlib import Path

import pytest

from sr_train.spool import Segment, orphans


def test_records_come_back_in_order_and_only_undelivered_ones(tmp_path: Path) -> None:
    segment = Segment.create(tmp_path)
    for i in range(5):
        segment.append({"kind": "metrics", "i": i})
    found = segment.read(max_records=2)
    assert [record["i"] for record, _ in found] == [0, 1]
    segment.mark_sent([record for record, _ in found], found[-1][1])
    assert [record["i"] for record, _ in segment.read(10)] == [2, 3, 4]
    assert segment.num_pending() == 3


def test_a_later_process_takes_over_what_was_not_delivered(tmp_path: Path) -> None:
    first = Segment.create(tmp_path)
    first.append({"kind": "metrics", "i": 0})
    first.append({"kind": "file", "path": "a/b.txt"}, b"hello")
    (_, offset), _ = first.read(10)
    first.mark_sent([], offset)
    assert orphans(tmp_path) == []  # its process is alive: it holds the lock
    first.close()

    (later,) = orphans(tmp_path)
    ((record, offset),) = later.read(10)
    assert (later.folder / record["file"]).read_bytes() == b"hello"
    later.mark_sent([record], offset)
    later.close()
    assert list(tmp_path.iterdir()) == []  # nothing left to deliver: nothing left on disk


def test_half_a_line_is_not_read(tmp_path: Path) -> None:
    segment = Segment.create(tmp_path)
    segment.append({"kind": "metrics", "i": 0})
    with (segment.folder / "records.jsonl").open("a") as out:
        out.write('{"kind": "metr')  # as a killed process leaves it
    assert [record["i"] for record, _ in segment.read(10)] == [0]


def test_a_line_that_a_power_cut_damaged_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    segment = Segment.create(tmp_path)
    for i in range(3):
        segment.append({"kind": "metrics", "i": i})
    path = segment.folder / "records.jsonl"
    first, rest = path.read_bytes().split(b"\n", 1)
    path.write_bytes(b"\0" * len(first) + b"\n" + rest + b"\0\0\0\n")
    found = segment.read(10)
    assert [record["i"] for record, _ in found] == [1, 2]
    assert "a damaged line" in caplog.text
    segment.mark_sent([record for record, _ in found], found[-1][1])
    assert segment.read(10) == [] and segment.num_pending() == 0


def test_what_a_power_cut_left_of_the_mark_means_that_all_is_sent_again(tmp_path: Path) -> None:
    segment = Segment.create(tmp_path)
    segment.append({"kind": "metrics", "i": 0})
    (segment.folder / "sent").write_text("")
    segment.close()
    (later,) = orphans(tmp_path)
    assert [record["i"] for record, _ in later.read(10)] == [0]


def test_a_spool_that_can_not_be_read_holds_nothing_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert orphans(tmp_path / "none") == []
    assert caplog.text == ""
    (tmp_path / "spool").write_text("a file")
    assert orphans(tmp_path / "spool") == []
    assert "can't be read" in caplog.text


def test_refused_records_stay_to_be_looked_at(tmp_path: Path) -> None:
    segment = Segment.create(tmp_path)
    segment.append({"kind": "file", "path": "x.txt"}, b"content")
    ((record, offset),) = segment.read(10)
    segment.set_aside(record, "path not allowed")
    segment.mark_sent([record], offset)
    assert (segment.num_pending(), segment.num_refused()) == (0, 1)
    segment.close()
    assert (segment.folder / "refused" / record["file"]).read_bytes() == b"content"


def test_a_disk_that_refuses_is_an_error_and_leaves_no_half_line(tmp_path: Path) -> None:
    segment = Segment.create(tmp_path)
    segment.append({"kind": "metrics", "i": 0})
    (segment.folder / "records.jsonl").chmod(0o400)
    blocked = segment.folder / "files" / "000000"
    blocked.write_text("in the way")
    with pytest.raises(OSError, match="000000"):
        segment.append({"kind": "file", "path": "x.txt"}, b"content")
    assert segment.num_pending() == 1
