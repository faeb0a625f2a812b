"""The nodes' CPU image, built without a container engine, and a job in it: where SR_EXPECT_BUILDAH=1 asks for it.

SR_CPU_WHEELS=FOLDER names the CPU wheels of torch where PyTorch's own index is out of reach.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.e2e

TAG = "localhost/sr-ray-test:cpu"


@pytest.mark.timeout(1800)
def test_an_image_is_built_without_a_daemon_and_trains(repo: Path) -> None:
    if os.environ.get("SR_EXPECT_BUILDAH") != "1":
        pytest.skip("building an image takes minutes and 3 GB: SR_EXPECT_BUILDAH=1 does it")
    missing = [name for name in ("buildah", "debootstrap") if shutil.which(name) is None]
    assert not missing, f"{', '.join(missing)} not installed, and SR_EXPECT_BUILDAH=1 says that it is there"
    wheels = ["--wheels", folder] if (folder := os.environ.get("SR_CPU_WHEELS")) else []
    built = subprocess.run(
        [repo / "docker" / "build_without_daemon.sh", "--target", "cpu", "--tag", TAG, *wheels],
        capture_output=True,
        text=True,
        timeout=1800,
    )
    try:
        assert built.returncode == 0, (built.stdout + built.stderr)[-8000:]
        assert "smoke job: trained, edsr-x2 version 1 registered" in built.stdout
        inspected = subprocess.run(["buildah", "inspect", "--type", "image", TAG], capture_output=True, check=True)
        image = json.loads(inspected.stdout)["Docker"]
        assert image["config"]["User"] == "1000"
        assert "HOME=/home/ray" in image["config"]["Env"], "the cluster launcher reads it there"
        assert "healthz" in " ".join(image["config"]["Healthcheck"]["Test"])
        # Base, Debian's packages, environment, code: what changes most comes last.
        assert len(image["rootfs"]["diff_ids"]) == 4
        root = subprocess.run(["buildah", "from", "--pull-never", TAG], capture_output=True, text=True, check=True)
        mounted = subprocess.run(["buildah", "mount", root.stdout.strip()], capture_output=True, text=True, check=True)
        try:
            there = Path(mounted.stdout.strip())
            left = [*there.glob("run/secrets/*"), *there.glob("opt/uv*"), *there.glob("root/.config/*")]
            left += [*there.glob("var/tmp/uv/*"), *there.glob("var/lib/apt/lists/*"), *there.glob("usr/bin/gcc*")]
            assert left == [], "what builds stays behind"
            assert not (there / "opt/sr-ray/tests").exists() and (there / "opt/sr-ray/sr_train/loop.py").exists()
        finally:
            subprocess.run(["buildah", "rm", root.stdout.strip()], capture_output=True, check=False)
    finally:
        subprocess.run(["buildah", "rmi", TAG], capture_output=True, check=False)
