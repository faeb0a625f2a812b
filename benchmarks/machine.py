"""The machine that benchmarks run on: what it is, what it can, and the CPU time that was spent on it."""

import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

_CLOCK_TICKS_PER_S = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100


def num_cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_s(excluded_pid: int | None = None) -> float:
    """CPU seconds of this process, its descendants and those that have ended, but for one process.

    Without Linux's /proc: of this process and its children that have ended.
    """
    if not Path("/proc/self/stat").exists():
        return sum(os.times()[:4])
    children: dict[int, list[int]] = {}
    ticks: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()  # the name before it may hold anything
        except OSError:
            continue  # it has ended
        pid = int(path.parent.name)
        children.setdefault(int(fields[1]), []).append(pid)
        ticks[pid] = sum(int(field) for field in fields[11:15])  # user, system, and those of children waited for
    todo, total = [os.getpid()], 0
    while todo:
        pid = todo.pop()
        if pid != excluded_pid:
            total += ticks.get(pid, 0)
            todo += children.get(pid, [])
    return total / _CLOCK_TICKS_PER_S


def precisions(device: torch.device) -> tuple[str, ...]:
    """float32, and bf16 where the device computes in it: on a CPU without such instructions PyTorch emulates it."""
    has_bf16 = torch.cuda.is_bf16_supported() if device.type == "cuda" else _cpu_has_bf16()
    return ("float32", "bf16") if has_bf16 else ("float32",)


def _cpu_has_bf16() -> bool:
    try:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    except (AttributeError, RuntimeError):  # a PyTorch without oneDNN
        return False


def hardware(device: torch.device) -> Mapping[str, Any]:
    """Name and size of what is measured; for CUDA also how PyTorch computes "float32" on it."""
    found: dict[str, Any] = {"device": device.type, "CPU": _cpu_name(), "CPUs": num_cpus()}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "GPU": properties.name,
            "GPU GiB": round(properties.total_memory / 2**30),
            "as float32 in convolutions": torch.backends.cudnn.conv.fp32_precision,  # "none": ieee
            "as float32 in matrix products": torch.backends.cuda.matmul.fp32_precision,
        }
    return found | {"PyTorch threads": torch.get_num_threads()}


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
