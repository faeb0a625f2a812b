"""The promises of `Store`, on a disk and on a real S3 server, in good times and bad ones."""

from __future__ import annotations

import errno
import multiprocessing
import os
import pickle
import resource
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from sr_data import storage_s3
from sr_data.errors import StorageError
from sr_data.storage import Store, open_store, split_uri
from tests.support.disk import small_disk
from tests.support.faulty_proxy import Fault, faulty_proxy


@pytest.fixture
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_s3, "FIRST_PAUSE_S", 0.001)


@pytest.fixture(params=["disk", "s3", "s3_rgw"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """An empty store of each kind: every test that takes it states one behaviour for both."""
    if request.param == "disk":
        return open_store(str(tmp_path / "store"))
    return open_store(request.getfixturevalue(request.param).new_bucket() + "/a prefix")


def test_what_is_written_is_read_listed_and_deleted(store: Store) -> None:
    store.write("b/two.bin", b"22")
    store.write("a.txt", "grün".encode())
    store.write("b/one with space & ?.bin", b"")
    assert [(entry.key, entry.num_bytes) for entry in store.list()] == [
        ("a.txt", 5),
        ("b/one with space & ?.bin", 0),
        ("b/two.bin", 2),
    ]
    assert store.read_text("a.txt") == "grün"
    assert store.read("b/one with space & ?.bin") == b""
    assert (store.num_bytes("a.txt"), store.num_bytes("b/one with space & ?.bin")) == (5, 0)
    with pytest.raises(StorageError) as missing:
        store.num_bytes("c.txt")
    assert missing.value.errno == errno.ENOENT
    store.delete("a.txt")
    store.delete("a.txt")
    assert not store.exists("a.txt")
    assert store.exists("b/two.bin")
    assert not store.exists("b")


def test_a_listing_is_narrowed_by_a_prefix_and_never_stale(store: Store) -> None:
    assert store.list() == []
    store.write("x/1", b"1")
    store.write("x2/1", b"1")
    assert [entry.key for entry in store.list("x/")] == ["x/1"]
    assert [entry.key for entry in store.list("x")] == ["x/1", "x2/1"]
    before = store.list("x/")[0].version
    store.write("x/1", b"other")
    after = store.list("x/")[0]
    assert after.num_bytes == 5
    assert after.version != before
    assert store.list("absent/") == []


def test_a_missing_key_is_named_and_has_its_errno(store: Store) -> None:
    store.write("there", b"")
    with pytest.raises(StorageError, match="no such") as caught:
        store.read("not/there.png")
    assert str(caught.value).startswith(store.uri_of("not/there.png"))
    assert caught.value.errno == errno.ENOENT


def test_an_error_keeps_its_errno_between_processes(tmp_path: Path) -> None:
    """Tasks of Ray Data send theirs to the worker, which decides by it whether to wait."""
    with pytest.raises(StorageError) as caught:
        open_store(str(tmp_path)).read("absent")
    for error in (caught.value, StorageError(errno.EIO, "broke off"), StorageError("no number")):
        copy = pickle.loads(pickle.dumps(error))
        assert (type(copy), str(copy), copy.errno) == (type(error), str(error), error.errno)


@pytest.mark.parametrize("key", ["", "/etc/passwd", "../up", "a/../../up"])
def test_a_key_never_leaves_the_store(store: Store, key: str) -> None:
    uses = [store.read, store.exists, store.delete, lambda key: store.write(key, b"")]
    for use in uses + [store.list] * bool(key):
        with pytest.raises(StorageError, match="not a key below it"):
            use(key)


def test_works_from_many_threads_after_pickling_and_in_a_forked_child(store: Store) -> None:
    """Ray pickles stores; its workers and torch's loaders fork; eight threads read at once."""
    contents = {f"{number}": bytes([number]) * 1000 for number in range(40)}
    copy = pickle.loads(pickle.dumps(store))
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda item: copy.write(*item), contents.items()))
        assert dict(zip(contents, threads.map(store.read, contents), strict=True)) == contents
    with multiprocessing.get_context("fork").Pool(1) as child:
        assert child.apply_async(store.read, ("7",)).get(timeout=30) == contents["7"]


def test_a_probe_leaves_nothing_behind(store: Store) -> None:
    store.check_writable()
    assert store.list() == []


def test_uris() -> None:
    assert open_store("s3://bucket/a/b/").uri == "s3://bucket/a/b"
    assert open_store("s3://bucket").uri == "s3://bucket"
    assert open_store("file:///data/my%20images/").uri == "/data/my images"
    assert open_store("relative/x").uri == str(Path.cwd() / "relative/x")
    assert open_store("/data/x/").uri_of("a.png") == "/data/x/a.png"
    assert split_uri("s3://bucket/a/b.png") == (Store("s3://bucket/a"), "b.png")
    assert split_uri("s3://bucket/b.png") == (Store("s3://bucket"), "b.png")
    assert split_uri("/b.png") == (Store("/"), "b.png")


@pytest.mark.parametrize(
    ("uri", "says"),
    [
        ("", "empty URI"),
        ("s3:///key", "names no bucket"),
        ("file://data/x", "three slashes"),
        ("gs://bucket/x", "s3://bucket/prefix"),
        ("builtin://films", "builtin://photos"),
    ],
)
def test_a_uri_that_means_nothing_is_refused(uri: str, says: str) -> None:
    with pytest.raises(StorageError, match=says):
        open_store(uri)


def test_split_uri_refuses_a_whole_bucket() -> None:
    with pytest.raises(StorageError, match="whole bucket"):
        split_uri("s3://bucket")


# --- disk ------------------------------------------------------------------------------------------------------------


def test_the_built_in_photos_can_be_read_and_not_written() -> None:
    photos = open_store("builtin://photos")
    assert any(entry.key.startswith("train/") for entry in photos.list())
    with pytest.raises(StorageError, match=r"^builtin://photos/x: .*part of the package"):
        photos.write("x", b"")


def test_a_failed_write_keeps_the_previous_content_and_leaves_no_partial_file(tmp_path: Path) -> None:
    """RLIMIT_FSIZE makes the kernel refuse the write half-way, as a full disk does. In a child: it can't be lifted."""
    store = open_store(str(tmp_path))
    store.write("checkpoint", b"previous")
    with (
        multiprocessing.get_context("fork").Pool(1, _limit_file_size, (4096,)) as child,
        pytest.raises(StorageError, match=f"^{tmp_path}/checkpoint: .*saved before is untouched"),
    ):
        child.apply(store.write, ("checkpoint", bytes(10_000)))
    assert store.read("checkpoint") == b"previous"
    assert os.listdir(tmp_path) == ["checkpoint"]


def test_a_full_disk_is_said_to_be_full(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "64k") as folder:
        store = open_store(str(folder))
        store.write("checkpoint", b"previous")
        with pytest.raises(StorageError, match="the disk is full") as caught:
            store.write("checkpoint", bytes(1_000_000))
        assert caught.value.errno == errno.ENOSPC
        assert store.read("checkpoint") == b"previous"
        assert os.listdir(folder) == ["checkpoint"]


def test_a_read_only_disk_shows_at_the_probe(tmp_path: Path) -> None:
    with (
        small_disk(tmp_path / "disk", "64k,ro") as folder,
        pytest.raises(StorageError, match=r"mounted read-only"),
    ):
        open_store(str(folder)).check_writable()


def test_links_to_folders_are_followed_and_circles_are_not(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/1.png").write_bytes(b"1")
    (tmp_path / "store").mkdir()
    (tmp_path / "store/link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "store/up").symlink_to(tmp_path / "store")
    assert [entry.key for entry in open_store(str(tmp_path / "store")).list()] == ["link/1.png"]


def test_a_folder_where_a_file_should_be_and_the_reverse(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    store.write("folder/file", b"")
    with pytest.raises(StorageError, match="a folder, not a file"):
        store.read("folder")
    with pytest.raises(StorageError, match="a file, not a folder"):
        store.write("folder/file/below", b"")


def test_text_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    store.write("x.json", b"\xff")
    with pytest.raises(StorageError, match=r"x.json: is not UTF-8"):
        store.read_text("x.json")


def _limit_file_size(num_bytes: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))


# --- S3 --------------------------------------------------------------------------------------------------------------


def test_a_listing_longer_than_a_page(any_s3: Any) -> None:
    store = open_store(any_s3.new_bucket() + "/p")
    keys = [f"{number:04}" for number in range(1005)]
    with ThreadPoolExecutor(16) as threads:
        list(threads.map(lambda key: store.write(key, b""), keys))
    assert [entry.key for entry in store.list()] == keys


def test_a_large_file_goes_in_parts_and_arrives_whole(any_s3: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_s3, "MULTIPART_ABOVE_BYTES", 6 * 2**20)
    monkeypatch.setattr(storage_s3, "MIN_PART_BYTES", 5 * 2**20)
    store = open_store(any_s3.new_bucket())
    data = os.urandom(11 * 2**20)
    store.write("checkpoint", data)
    assert store.read("checkpoint") == data
    assert store.list()[0].version.endswith("-3")


@pytest.mark.usefixtures("any_s3")
def test_a_missing_bucket() -> None:
    store = open_store("s3://no-such-bucket-here/p")
    for use in (store.list, store.check_writable):
        with pytest.raises(StorageError, match=r"^s3://no-such-bucket-here/p.*no bucket 'no-such-bucket-here'"):
            use()


@pytest.mark.parametrize("changed", [{"AWS_SECRET_ACCESS_KEY": "wrong"}, {"AWS_ACCESS_KEY_ID": "unknown"}])
def test_wrong_credentials(any_s3: Any, monkeypatch: pytest.MonkeyPatch, changed: dict[str, str]) -> None:
    store = open_store(any_s3.new_bucket())
    store.write("x", b"")  # a client with the right credentials exists: the new ones must be looked at all the same
    for name, value in changed.items():
        monkeypatch.setenv(name, value)
    # EACCES means credentials that the server knows, which may pass; the answer to exists() has no body to tell.
    uses = {store.list: errno.EPERM, store.check_writable: errno.EPERM}
    uses |= {lambda: store.read("x"): errno.EPERM, lambda: store.exists("x"): errno.EACCES}
    for use, number in uses.items():
        with pytest.raises(StorageError, match=r"refuses these credentials.*AWS_ACCESS_KEY_ID") as caught:
            use()
        assert caught.value.errno == number
        assert "attempts" not in str(caught.value)


def test_no_credentials(s3: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(s3.new_bucket())
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(StorageError, match=r"no complete credentials.*AWS_ACCESS_KEY_ID"):
        store.list()


@pytest.mark.usefixtures("s3", "quick_retries")
def test_an_endpoint_where_nothing_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free.getsockname()[1]}")
    with pytest.raises(StorageError, match=r"^s3://b/p: .*can't be reached after 6 attempts; check AWS_ENDPOINT_URL"):
        open_store("s3://b/p").list()


@pytest.mark.usefixtures("s3", "quick_retries")
def test_an_endpoint_that_never_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_s3, "READ_TIMEOUT_S", 0.2)
    monkeypatch.setattr(storage_s3, "MAX_ATTEMPTS", 2)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # the kernel accepts, nobody reads
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(StorageError, match=r"does not answer within 0.2 s"):
            open_store("s3://b/p").list()


@pytest.mark.usefixtures("quick_retries")
@pytest.mark.parametrize("fault", ["truncate", "503", "drop", "lost"])
def test_a_fault_that_passes_is_not_noticed(any_s3: Any, monkeypatch: pytest.MonkeyPatch, fault: Fault) -> None:
    """Every request fails once in its first attempt, at every step of a read, a listing and an upload in parts."""
    monkeypatch.setattr(storage_s3, "MULTIPART_ABOVE_BYTES", 6 * 2**20)
    monkeypatch.setattr(storage_s3, "MIN_PART_BYTES", 5 * 2**20)
    store = open_store(any_s3.new_bucket())
    data = os.urandom(7 * 2**20)
    with faulty_proxy(any_s3.endpoint_url, lambda _method, _path, attempt: fault if attempt == 1 else None) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        store.write("small", b"small")
        store.write("large", data)
        assert [entry.key for entry in store.list()] == ["large", "small"]
        assert store.read("large") == data
        assert store.exists("small")
        store.delete("small")
        assert not store.exists("small")


@pytest.mark.usefixtures("quick_retries")
def test_a_body_that_is_always_cut_short_is_an_error_and_never_short_data(
    s3: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(s3.new_bucket())
    store.write("x.png", bytes(100_000))
    with faulty_proxy(s3.endpoint_url, lambda method, _p, _a: "truncate" if method == "GET" else None) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        with pytest.raises(StorageError, match=r"x.png: the transfer kept breaking off after 6 attempts"):
            store.read("x.png")


@pytest.mark.usefixtures("quick_retries")
def test_an_upload_that_fails_for_good_keeps_the_previous_content(any_s3: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_s3, "MULTIPART_ABOVE_BYTES", 6 * 2**20)
    monkeypatch.setattr(storage_s3, "MIN_PART_BYTES", 5 * 2**20)
    monkeypatch.setattr(storage_s3, "MAX_ATTEMPTS", 2)
    store = open_store(any_s3.new_bucket())
    store.write("checkpoint", b"previous")
    with faulty_proxy(any_s3.endpoint_url, lambda _m, path, _a: "503" if "partNumber=2" in path else None) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        with pytest.raises(StorageError, match=r"checkpoint: .*503"):
            store.write("checkpoint", bytes(7 * 2**20))
    monkeypatch.setenv("AWS_ENDPOINT_URL", any_s3.endpoint_url)
    assert store.read("checkpoint") == b"previous"
    bucket = store.uri.removeprefix("s3://")
    assert "Uploads" not in any_s3.client().list_multipart_uploads(Bucket=bucket)
