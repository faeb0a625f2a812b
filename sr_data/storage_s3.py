"""A prefix in an S3 bucket, as a storage backend: bounded waits, own retries, whole bodies, errors with a remedy."""

from __future__ import annotations

import errno
import os
import random
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import aiohttp
import s3fs
from botocore import exceptions as boto
from botocore.parsers import ResponseParserError
from fsspec.asyn import sync

from sr_data.errors import StorageError
from sr_data.storage import FileEntry

CONNECT_TIMEOUT_S = 5.0
READ_TIMEOUT_S = 20.0  # silence on the connection, not the time a large file takes
MAX_ATTEMPTS = 6
MAX_RETRY_S = 30.0  # no new attempt after this long
FIRST_PAUSE_S = 0.25  # doubles: 0.25 + 0.5 + 1 + 2 + 4, a restarting gateway's worth
MULTIPART_ABOVE_BYTES = 32 * 2**20
MIN_PART_BYTES = 16 * 2**20
_MAX_PARTS = 10_000  # S3's limit
_PART_THREADS = 4

_CREDENTIALS = "check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN, on the cluster's workers too"
_ENDPOINT = "check AWS_ENDPOINT_URL and the network"
_RETRIED_CODES = {"SlowDown", "RequestTimeout", "InternalError", "ServiceUnavailable", "IncompleteBody", "BadDigest",
                  "XAmzContentSHA256Mismatch", "OperationAborted"}  # fmt: skip
_WRONG_CREDENTIALS = {"InvalidAccessKeyId", "SignatureDoesNotMatch"}
_FAILURES = (OSError, boto.BotoCoreError, boto.ClientError, aiohttp.ClientError)

T = TypeVar("T")

_clients: dict[tuple[object, ...], s3fs.S3FileSystem] = {}


class _TruncatedError(OSError):
    """A body shorter than announced."""


class _UploadLostError(StorageError):
    """The server no longer knows a multipart upload."""


_RETRIED_ERRORS = (
    _TruncatedError,
    boto.HTTPClientError,
    boto.ConnectionError,
    boto.IncompleteReadError,
    ResponseParserError,
    aiohttp.ClientError,
    TimeoutError,
)


@dataclass(frozen=True, slots=True)
class S3Prefix:
    """Keys below `prefix` in `bucket`. See `sr_data.storage.Store` for what each method promises."""

    bucket: str
    prefix: str

    def list(self, prefix: str) -> list[FileEntry]:
        """Page by page, straight from the server."""
        base = f"{self.prefix}/" if self.prefix else ""
        entries: list[FileEntry] = []
        page: dict[str, str] = {}
        while True:
            request = {"Prefix": base + prefix, **page}
            answer = self._call("list_objects_v2", prefix, **request)
            for item in answer.get("Contents", ()):
                if not item["Key"].endswith("/"):  # a "folder" that a console has made
                    key, etag = item["Key"].removeprefix(base), item["ETag"].strip('"')
                    entries.append(FileEntry(key=key, num_bytes=item["Size"], version=etag))
            if not answer.get("IsTruncated"):
                return sorted(entries, key=lambda entry: entry.key)
            page = {"ContinuationToken": answer["NextContinuationToken"]}

    def read(self, key: str) -> bytes:
        """One GET, its length compared with the one announced."""

        async def get() -> bytes:
            answer = await _client()._call_s3("get_object", Bucket=self.bucket, Key=self._full(key))
            async with answer["Body"] as body:
                data: bytes = await body.read()
            if len(data) != answer["ContentLength"]:
                raise _TruncatedError(f"received {len(data)} of {answer['ContentLength']} bytes")
            return data

        return self._retried(key, get)

    def write(self, key: str, data: bytes) -> None:
        """One PUT, or a completed multipart upload: S3 shows neither before it is whole."""
        if len(data) <= MULTIPART_ABOVE_BYTES:
            self._call("put_object", key, Key=self._full(key), Body=data)
        else:
            try:
                self._write_parts(key, data)
            except _UploadLostError:
                # The answer to the completion was lost and its repetition finds no upload. Whether it took effect
                # nobody can tell, and sending everything again is right in both cases.
                self._write_parts(key, data)

    def num_bytes(self, key: str) -> int:
        """One HEAD."""
        length: int = self._call("head_object", key, Key=self._full(key))["ContentLength"]
        return length

    def exists(self, key: str) -> bool:
        """One HEAD; a refusal is an error, not an absence."""
        try:
            self._call("head_object", key, Key=self._full(key))
        except StorageError as error:
            if error.errno == errno.ENOENT:
                return False
            raise
        return True

    def delete(self, key: str) -> None:
        """One DELETE, which S3 answers alike whether or not the key was there."""
        self._call("delete_object", key, Key=self._full(key))

    def _write_parts(self, key: str, data: bytes) -> None:
        target = {"Key": self._full(key)}
        upload = {**target, "UploadId": self._call("create_multipart_upload", key, **target)["UploadId"]}
        part_bytes = max(MIN_PART_BYTES, -(-len(data) // _MAX_PARTS))

        def send(number: int) -> dict[str, object]:
            body = data[(number - 1) * part_bytes : number * part_bytes]
            answer = self._call("upload_part", key, PartNumber=number, Body=body, **upload)
            return {"PartNumber": number, "ETag": answer["ETag"]}

        try:
            with ThreadPoolExecutor(_PART_THREADS, "s3-part") as threads:
                parts = list(threads.map(send, range(1, -(-len(data) // part_bytes) + 1)))
            self._call("complete_multipart_upload", key, MultipartUpload={"Parts": parts}, **upload)
        except StorageError as error:
            self._abandon(upload)
            if error.__cause__ is not None and _response(error.__cause__)[0] == "NoSuchUpload":
                raise _UploadLostError(error.args[0]) from error
            raise
        except BaseException:
            self._abandon(upload)
            raise

    def _abandon(self, upload: dict[str, str]) -> None:
        """Frees the parts of a failed upload. That failure is what the caller must hear of, not another one here."""
        try:
            self._call_once("abort_multipart_upload", **upload)
        except _FAILURES:
            return

    def _full(self, key: str) -> str:
        return f"{self.prefix}/{key}" if self.prefix else key

    def _call_once(self, method: str, **arguments: Any) -> dict[str, Any]:
        client = _client()
        answer: dict[str, Any] = sync(client.loop, client._call_s3, method, Bucket=self.bucket, **arguments)
        return answer

    def _call(self, method: str, about_key: str, **arguments: Any) -> dict[str, Any]:
        return self._retry(about_key, lambda: self._call_once(method, **arguments))

    def _retried(self, about_key: str, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        def once() -> T:
            result: T = sync(_client().loop, work)
            return result

        return self._retry(about_key, once)

    def _retry(self, about_key: str, work: Callable[[], T]) -> T:
        """`work` done, again after a pause if the network or the server failed; StorageError if that didn't help."""
        started, pause_s = time.monotonic(), FIRST_PAUSE_S
        for attempt in range(1, MAX_ATTEMPTS + 1):
            try:
                return work()
            except StorageError:
                raise  # from an inner retry, with its message already made
            except _FAILURES as error:
                waited_s = time.monotonic() - started
                if not _is_passing(error) or attempt == MAX_ATTEMPTS or waited_s > MAX_RETRY_S:
                    raise self._explained(error, about_key, attempt) from error
            # Spread, so that 100 workers don't come back at once.
            time.sleep(pause_s * random.uniform(0.5, 1.0))
            pause_s *= 2
        raise AssertionError("unreachable: the last attempt returns or raises")

    def _explained(self, error: BaseException, key: str, attempts: int) -> StorageError:
        uri = "/".join(part for part in (f"s3://{self.bucket}", self.prefix, key) if part)
        number, what, advice = _diagnosis(error, self.bucket)
        tries = f" after {attempts} attempts" if attempts > 1 else ""
        explained = StorageError(f"{uri}: {what}{tries}{advice and '; '}{advice} ({_detail(error)})")
        explained.errno = number
        return explained


def _client() -> s3fs.S3FileSystem:
    """The client of this process for the AWS_* variables as they are now. s3fs's own cache would outlive a change."""
    aws = tuple(sorted(item for item in os.environ.items() if item[0].startswith("AWS_")))
    identity = (os.getpid(), aws)  # a forked child can't use its parent's connections
    if identity not in _clients:
        # No lock, which a fork could copy while it is held: at worst a second client is made and dropped, unconnected.
        _clients.setdefault(identity, _new_client())
    return _clients[identity]


def _new_client() -> s3fs.S3FileSystem:
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
        endpoint = os.environ.get(name, "")
        if endpoint and not endpoint.startswith(("http://", "https://")):  # boto would say it, and a password in it
            raise StorageError(f"{name} is no URL: http://HOST:PORT or https://HOST:PORT is expected")
    client = s3fs.S3FileSystem(
        skip_instance_cache=True,
        use_listings_cache=False,
        config_kwargs={
            "connect_timeout": CONNECT_TIMEOUT_S,
            "read_timeout": READ_TIMEOUT_S,
            "retries": {"total_max_attempts": 1},  # one place retries: S3Prefix._retry
            "max_pool_connections": 32,
            # Ceph's gateway (and others) refuse uploads with the checksum trailers that are boto's default.
            "request_checksum_calculation": "when_required",
            "response_checksum_validation": "when_required",
        },
    )
    client.retries = 1
    return client


def _response(error: BaseException) -> tuple[str, int]:
    """(S3 error code, HTTP status) of the answer behind an error; ("", 0) if there was no answer."""
    original = error if isinstance(error, boto.ClientError) else error.__cause__
    if not isinstance(original, boto.ClientError):
        return "", 0
    response = original.response
    return response.get("Error", {}).get("Code", ""), response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)


def _is_passing(error: BaseException) -> bool:
    code, status = _response(error)
    if code or status:
        return code in _RETRIED_CODES or status >= 500 or status == 429
    return isinstance(error, _RETRIED_ERRORS)


def _diagnosis(error: BaseException, bucket: str) -> tuple[int, str, str]:
    """(errno, what is wrong, what to do about it)."""
    code, status = _response(error)
    if code == "NoSuchBucket":
        return errno.ENOENT, f"there is no bucket {bucket!r} at this endpoint", f"create it, or {_ENDPOINT}"
    if code in ("NoSuchKey", "404") or status == 404:
        return errno.ENOENT, "there is no such object (or no such bucket)", ""
    if "Quota" in code or code == "EntityTooLarge":
        return errno.ENOSPC, "the storage quota is used up", "what was saved before is untouched"
    if code in _WRONG_CREDENTIALS:
        return errno.EPERM, "the server refuses these credentials", _CREDENTIALS
    if status in (401, 403):
        return errno.EACCES, "the server refuses these credentials", _CREDENTIALS
    if isinstance(error, boto.NoCredentialsError | boto.PartialCredentialsError):
        return errno.EPERM, "no complete credentials were found", _CREDENTIALS
    if isinstance(error, _TruncatedError | boto.IncompleteReadError | aiohttp.ClientPayloadError):
        return errno.EIO, "the transfer kept breaking off", ""
    if isinstance(error, boto.ReadTimeoutError):
        return errno.ETIMEDOUT, f"the server does not answer within {READ_TIMEOUT_S:g} s", _ENDPOINT
    if isinstance(error, boto.HTTPClientError | boto.ConnectionError | aiohttp.ClientError | TimeoutError):
        return errno.EHOSTUNREACH, "the endpoint can't be reached", _ENDPOINT
    if isinstance(error, boto.ParamValidationError):
        return errno.EINVAL, "not a valid bucket name or key", ""
    if 300 <= status < 500 and status != 429:
        return errno.EINVAL, "the storage server refuses", ""
    return errno.EIO, "the storage server failed", ""


def _detail(error: BaseException) -> str:
    code, status = _response(error)
    said = f"{code}: {error}" if code else f"{type(error).__name__}: {error}"
    return f"HTTP {status}, {said}" if status else said
