#!/usr/bin/env bash
# Runs inside an image (`docker run --rm -i sr-ray:cpu bash -s < docker/smoke_job.sh`): a head node, a job that trains a
# small EDSR on the built-in photos with two workers and registers it, and a look at what is there and what must not be.
# Every port is a free one, and only what was started here is stopped: the machine's other clusters stay as they are.
set -euo pipefail
[ "$(id -u)" != 0 ] || { echo "the image runs as root" >&2; exit 1; }
for place in /opt/sr-ray /opt/venv; do
    ! touch "$place/x" 2>/dev/null || { echo "the user can change the image's programs in $place" >&2; exit 1; }
done

folder=$(mktemp -d /tmp/smoke-XXXX)
cd "$folder"
export RAY_AUTH_MODE=disabled RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=0 OMP_WAIT_POLICY=PASSIVE NO_PROXY=127.0.0.1 no_proxy=127.0.0.1
read -r gcs jobs agent agent_grpc client metrics manager objects env_agent < <(python - <<'PYTHON'
import contextlib, socket
with contextlib.ExitStack() as stack:
    sockets = [stack.enter_context(socket.socket()) for _ in range(9)]
    for it in sockets:
        it.bind(("127.0.0.1", 0))
    print(*(it.getsockname()[1] for it in sockets))
PYTHON
)
ray start --head --block --num-cpus=3 --num-gpus=0 --object-store-memory=200000000 --temp-dir="$folder/ray" \
    --node-ip-address=127.0.0.1 --dashboard-host=127.0.0.1 --port="$gcs" --dashboard-port="$jobs" \
    --dashboard-agent-listen-port="$agent" --dashboard-agent-grpc-port="$agent_grpc" --ray-client-server-port="$client" \
    --metrics-export-port="$metrics" --node-manager-port="$manager" --object-manager-port="$objects" \
    --runtime-env-agent-port="$env_agent" --min-worker-port=0 --max-worker-port=0 >head.log 2>&1 </dev/null &
head=$!
trap 'kill "$head" 2>/dev/null || true; wait "$head" 2>/dev/null || true; rm -rf "$folder"' EXIT
for _ in $(seq 120); do
    # The image's own health check, on this node's port.
    if wget -q -T 4 -O - "http://127.0.0.1:$agent/api/local_raylet_healthz" 2>/dev/null | grep -q success; then break; fi
    kill -0 "$head" || { cat head.log >&2; exit 1; }
    sleep 0.5
done

ray job submit --address "http://127.0.0.1:$jobs" -- \
    python /opt/sr-ray/pipelines/train_edsr.py --model.num-blocks 1 --model.num-channels 8 --data.patch-px-hr 32 \
    --optim.total-patches 320 --optim.global-batch-size 16 --schedule.warmup-patches 32 \
    --validation.interval-patches 160 --checkpoint.interval-patches 160 --run.num-workers 2 --run.name smoke \
    --run.storage "$folder/runs" --tracking.uri "sqlite:///$folder/mlflow.db"
test -s runs/smoke/result.json
python - <<'PYTHON'
import json
from pathlib import Path

from mlflow import MlflowClient

result = json.loads(Path("runs/smoke/result.json").read_text())
[version] = MlflowClient("sqlite:///mlflow.db").search_model_versions("")
print(f"smoke job: trained, {version.name} version {version.version} registered, {sorted(result)}")
PYTHON
