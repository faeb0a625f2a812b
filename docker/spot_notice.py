"""Has Ray drain this node when AWS says that it will take the instance: nothing in Ray asks AWS.

Runs beside Ray on every spot node (worker_start_ray_commands of cluster.yaml). Every five seconds it asks the metadata
service of the instance for an interruption notice, which comes about two minutes before the instance ends. On one, it
has Ray drain the node by then: no new work is put there, and training workers are told to save a checkpoint
(`ray.train.get_preemption_info()`). Needs Python's standard library and the `ray` command.

A rebalance recommendation ("elevated risk of interruption") is often followed by nothing: it drains with --on-rebalance
only.
"""

import argparse
import json
import logging
import subprocess
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

METADATA_URL = "http://169.254.169.254"
TOKEN_TTL_S = 21_600
REBALANCE_LEAD_S = 120
"""A recommendation names no time; the node is drained as if a notice had come."""

log = logging.getLogger("spot_notice")


@dataclass(frozen=True, kw_only=True)
class Notice:
    """The instance will be taken."""

    what: str
    """One line, for Ray's log and this one."""
    remaining_s: int
    """Until it happens; 0 or more."""


class Metadata:
    """The instance's metadata service, version 2: a token first, and again when it has run out."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._token = ""

    def get(self, path: str) -> str | None:
        """The document at `path` below /latest/meta-data, None where there is none (404); OSError if nobody answers."""
        for attempt in (1, 2):
            if not self._token:
                self._token = self._request("/latest/api/token", "PUT", "-ttl-seconds", str(TOKEN_TTL_S))
            try:
                return self._request(f"/latest/meta-data{path}", "GET", "", self._token)
            except urllib.error.HTTPError as error:
                if error.code == 404:
                    return None
                if error.code != 401 or attempt == 2:
                    raise
                self._token = ""
        raise AssertionError("unreachable")

    def _request(self, path: str, method: str, header: str, value: str) -> str:
        headers = {f"X-aws-ec2-metadata-token{header}": value}
        request = urllib.request.Request(self._url + path, method=method, headers=headers)
        # Never through a proxy: it would answer for another machine.
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=2) as response:
            return str(response.read().decode())


def find_notice(metadata: Metadata, *, on_rebalance: bool) -> Notice | None:
    """What the service says now. OSError if it doesn't answer; ValueError or KeyError if that is not as AWS documents
    it.
    """
    if document := metadata.get("/spot/instance-action"):
        told = json.loads(document)
        remaining_s = (_utc(told["time"]) - datetime.now(UTC)).total_seconds()
        return Notice(what=f"spot notice: {told['action']} at {told['time']}", remaining_s=max(0, int(remaining_s)))
    if on_rebalance and (document := metadata.get("/events/recommendations/rebalance")):
        return Notice(
            what=f"rebalance recommendation of {json.loads(document)['noticeTime']}", remaining_s=REBALANCE_LEAD_S
        )
    return None


def local_nodes(address: str | None) -> list[tuple[str, str]]:
    """Cluster (HOST:PORT) and hexadecimal id of each Ray node on this machine, from the raylets' command lines; with
    `address`, of that cluster alone.
    """
    nodes = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode(errors="replace").split("\0")
        except OSError:  # it has ended meanwhile, or is another user's
            continue
        if Path(words[0]).name != "raylet":
            continue
        flags = dict(word[2:].partition("=")[::2] for word in words if word.startswith("--"))
        cluster, node_id = flags.get("gcs-address", ""), flags.get("node_id", "")
        if cluster and node_id and address in (None, cluster):
            nodes.add((cluster, node_id))
    return sorted(nodes)


def drain(address: str, node_id: str, notice: Notice) -> bool:
    """Whether Ray has taken the request."""
    command = ["ray", "drain-node", "--address", address, "--node-id", node_id, "--reason-message", notice.what]
    command += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--deadline-remaining-seconds", str(notice.remaining_s)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except subprocess.TimeoutExpired:
        log.warning("ray drain-node took longer than 30 s")
        return False
    if done.returncode != 0:
        log.warning("ray drain-node exited with %s: %s", done.returncode, (done.stderr or done.stdout).strip()[-500:])
    return done.returncode == 0


def watch(options: argparse.Namespace) -> None:
    """Returns once the node drains. A service that doesn't answer, or a cluster that doesn't, is asked again."""
    metadata = Metadata(options.metadata_url)
    said = ""
    while True:
        try:
            notice, problem = find_notice(metadata, on_rebalance=options.on_rebalance), ""
        except (OSError, ValueError, KeyError) as error:
            notice, problem = None, f"the metadata service can't be asked: {type(error).__name__}: {error}"
        if problem != said:
            log.warning("%s", problem or "the metadata service answers again")
            said = problem
        if notice is not None:
            nodes = local_nodes(options.address)
            log.warning("%s: draining %s", notice.what, ", ".join(node for _, node in nodes) or "no node yet")
            drained = [drain(cluster, node, notice) for cluster, node in nodes]
            if drained and all(drained):
                return
        time.sleep(options.interval_s)


def _utc(text: str) -> datetime:
    """2026-01-31T08:22:00Z, as AWS writes times."""
    return datetime.strptime(text, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--address", help="drain nodes of this cluster only, HOST:PORT; all on this machine if not given"
    )
    parser.add_argument("--on-rebalance", action="store_true", help="drain on a rebalance recommendation too")
    parser.add_argument("--interval-s", type=float, default=5.0, help="seconds between two questions (AWS advises 5)")
    parser.add_argument("--metadata-url", default=METADATA_URL, help="the instance's metadata service")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    watch(parser.parse_args())


if __name__ == "__main__":
    main()
