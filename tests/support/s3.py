"""Real S3 servers on loopback: moto's with authentication on, and Ceph RGW on a memory store."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import requests
from botocore.config import Config

from tests.support.process import PATIENCE_S, Child, ServerError, accepts_tcp, answers_http, free_ports

REGION = "us-east-1"
CEPH_PROGRAMS = ("ceph-mon", "ceph-osd", "ceph", "monmaptool", "radosgw", "radosgw-admin")
_bucket_numbers = itertools.count()


@dataclass(frozen=True)
class S3Server:
    """One running server and the credentials of its user."""

    kind: str
    endpoint_url: str
    access_key: str
    secret_key: str
    children: tuple[Child, ...]

    @property
    def env(self) -> dict[str, str]:
        """What a client needs in its environment: boto3, s3fs, pyarrow and MLflow all read these."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint_url,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_DEFAULT_REGION": REGION,
            "AWS_REGION": REGION,
            "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",  # else RGW answers 411 to pyarrow's uploads
            "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",
        }

    def client(self, **changes: Any) -> Any:
        """A boto3 client with the server's credentials (`changes`: other ones)."""
        options: dict[str, Any] = {
            "endpoint_url": self.endpoint_url,
            "aws_access_key_id": self.access_key,
            "aws_secret_access_key": self.secret_key,
            "region_name": REGION,
            "config": Config(retries={"max_attempts": 1}, s3={"addressing_style": "path"}),
        }
        return boto3.client("s3", **(options | changes))

    def new_bucket(self) -> str:
        """Makes an empty bucket that no other test has; returns `s3://name`."""
        name = f"bucket-{next(_bucket_numbers)}-{uuid.uuid4().hex[:8]}"
        self.client().create_bucket(Bucket=name)
        return f"s3://{name}"

    def stop(self) -> None:
        """Ends the server's processes, the last started first."""
        for child in reversed(self.children):
            child.stop()


def start_moto(folder: Path, *, host: str = "127.0.0.1") -> S3Server:
    """moto's S3 server. It accepts anything until its user exists, from then on only valid signatures."""
    (port,) = free_ports(1)
    endpoint_url = f"http://{host}:{port}"
    command = [sys.executable, "-m", "moto.server", "-H", host, "-p", str(port)]
    child = Child.start("moto", command, log_path=folder / "moto.log", env=os.environ)
    try:
        child.wait_until(lambda: answers_http(f"{endpoint_url}/moto-api/"))
        setup = {"aws_access_key_id": "setup", "aws_secret_access_key": "setup", "region_name": REGION}
        iam = boto3.client("iam", endpoint_url=endpoint_url, **setup)
        iam.create_user(UserName="sr")
        allow_s3 = '{"Version":"2012-10-17","Statement":[{"Effect":"Allow","Action":"s3:*","Resource":"*"}]}'
        iam.put_user_policy(UserName="sr", PolicyName="s3", PolicyDocument=allow_s3)
        key = iam.create_access_key(UserName="sr")["AccessKey"]
        requests.post(f"{endpoint_url}/moto-api/reset-auth", data="0", timeout=10).raise_for_status()
    except BaseException:
        child.stop()
        raise
    return S3Server("moto", endpoint_url, key["AccessKeyId"], key["SecretAccessKey"], (child,))


def missing_ceph_programs() -> list[str]:
    """The programs of Debian's ceph-mon, ceph-osd, ceph-common and radosgw that this machine lacks."""
    return [name for name in CEPH_PROGRAMS if shutil.which(name) is None]


def start_rgw(folder: Path) -> S3Server:
    """Ceph RGW: one monitor, one OSD in memory, one gateway, all in the foreground as children."""
    v2_port, v1_port, rgw_port = free_ports(3)
    conf = ["--conf", str(_write_ceph_conf(folder, v2_port, v1_port)), "--no-mon-config"]
    children: list[Child] = []

    def daemon(name: str, *command: str) -> Child:
        path = folder / f"{name}.out"
        children.append(Child.start(name, [*command, *conf, "-f"], log_path=path, env=os.environ))
        return children[-1]

    def tool(*command: str) -> None:
        done = subprocess.run([*command], capture_output=True, text=True, timeout=60)
        if done.returncode != 0:
            raise ServerError(f"{' '.join(command)} exited with {done.returncode}:\n{done.stderr[-2000:]}")

    try:
        monmap = str(folder / "monmap")
        fsid = (folder / "fsid").read_text()
        addresses = f"[v2:127.0.0.1:{v2_port},v1:127.0.0.1:{v1_port}]"
        tool("monmaptool", "--create", "--addv", "a", addresses, "--fsid", fsid, monmap)
        tool("ceph-mon", *conf, "--mkfs", "-i", "a", "--monmap", monmap)
        daemon("ceph-mon", "ceph-mon", "-i", "a").wait_until(lambda: accepts_tcp(v2_port))
        osd_uuid = str(uuid.uuid4())
        tool("ceph", *conf[:2], "osd", "new", osd_uuid)
        tool("ceph-osd", *conf, "-i", "0", "--mkfs", "--osd-uuid", osd_uuid)
        daemon("ceph-osd", "ceph-osd", "-i", "0")
        frontend = f"beast endpoint=127.0.0.1:{rgw_port} tcp_nodelay=1"
        gateway = daemon("radosgw", "radosgw", "-n", "client.rgw", "--rgw-frontends", frontend)
        admin = ["radosgw-admin", *conf, "-n", "client.rgw", "user", "create", "--uid=sr", "--display-name=sr"]
        tool(*admin, "--access-key=SRACCESSKEY0001", "--secret-key=srsecret0001")
        gateway.wait_until(lambda: answers_http(f"http://127.0.0.1:{rgw_port}"))
        server = S3Server("rgw", f"http://127.0.0.1:{rgw_port}", "SRACCESSKEY0001", "srsecret0001", tuple(children))
        _wait_for_first_write(server)
    except BaseException:
        for child in reversed(children):
            child.stop()
        raise
    return server


def _write_ceph_conf(folder: Path, v2_port: int, v1_port: int) -> Path:
    """A one-node cluster without authentication between its own daemons (they listen on loopback only)."""
    for name in ("mon", "osd", "rgw", "run", "log"):
        (folder / name).mkdir()
    fsid = str(uuid.uuid4())
    (folder / "fsid").write_text(fsid)
    options: Mapping[str, object] = {
        "fsid": fsid,
        "mon_initial_members": "a",
        "mon_host": f"[v2:127.0.0.1:{v2_port},v1:127.0.0.1:{v1_port}]",
        "auth_cluster_required": "none",
        "auth_service_required": "none",
        "auth_client_required": "none",
        "osd_pool_default_size": 1,
        "osd_pool_default_min_size": 1,
        "osd_pool_default_pg_num": 4,
        "osd_pool_default_pgp_num": 4,
        "osd_pool_default_pg_autoscale_mode": "off",
        "mon_allow_pool_size_one": "true",
        "mon_max_pg_per_osd": 1000,
        "osd_crush_chooseleaf_type": 0,
        "osd_objectstore": "memstore",
        "memstore_device_bytes": 2 << 30,
        "mon_data": folder / "mon",
        "osd_data": folder / "osd",
        "rgw_data": folder / "rgw",
        "run_dir": folder / "run",
        "admin_socket": "",  # its path would pass the 107 characters of a Unix socket in a deep folder
        "pid_file": folder / "run" / "$name.pid",
        "log_file": folder / "log" / "$name.log",
        "mon_cluster_log_file": folder / "log" / "cluster.log",
        "ms_bind_msgr2": "true",
        "ms_mon_client_mode": "crc",  # authentication `none` and the default `secure` don't go together
        "ms_client_mode": "crc",
        "public_addr": "127.0.0.1",
        "cluster_addr": "127.0.0.1",
        "rgw_enable_usage_log": "false",
        "rgw_lifecycle_work_time": "00:00-00:01",
        "setuser_match_path": "/nonexistent",
    }
    path = folder / "ceph.conf"
    path.write_text("[global]\n" + "".join(f"{key}={value}\n" for key, value in options.items()))
    return path


def _wait_for_first_write(server: S3Server, timeout_s: float = PATIENCE_S) -> None:
    """The gateway listens before its pools are active; a bucket is the first thing that needs them."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            server.new_bucket()
            return
        except server.client().exceptions.ClientError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)
