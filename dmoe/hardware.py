"""What this machine can do, measured, for its advert.

Owns: names and sizes of CPU, memory and GPUs, and a short benchmark of expert work and memory. Does not own: adverts.

Invariants:
1. Never fails: what cannot be found out is empty or 0.
2. Takes well under a second; run it in a thread.
"""

import logging
import os
import platform
import shutil
import subprocess
from pathlib import Path
from time import perf_counter

import numpy as np
import psutil

from p2p.core.advert import Gpu, Hardware

log = logging.getLogger(__name__)

BENCHMARK_SECONDS = 0.12
MEMORY_BENCHMARK_BYTES = 32 << 20
NVIDIA_TIMEOUT_SECONDS = 5.0
_ROWS, _HIDDEN, _INTERMEDIATE = 4, 576, 384


def measure() -> Hardware:
    """Everything about this machine (blocking, up to about 0.3 s without a GPU)."""
    return Hardware(
        cpu=cpu_name()[:256],
        cores=usable_cores(),
        ram_bytes=psutil.virtual_memory().total,
        gpus=gpus(),
        expert_kflop_per_s=expert_kflop_per_s(),
        memory_bytes_per_s=memory_bytes_per_s(),
    )


def device_class(provider: str) -> str:
    """What kind of machine computes: answers of one kind are equal bit for bit. ``provider``: ONNX Runtime's name."""
    machine = platform.machine().lower()
    kind = provider.removesuffix("ExecutionProvider").lower()
    return f"{'x86_64' if machine == 'amd64' else machine}-{kind}"[:32]


def cpu_name() -> str:
    """The CPU's model name, or the architecture if the system does not tell."""
    try:
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError as error:
        log.debug("no CPU name: %s", error)
    return platform.processor() or platform.machine()


def usable_cores() -> int:
    """Cores this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on every system
        return os.cpu_count() or 1


def gpus() -> tuple[Gpu, ...]:
    """NVIDIA GPUs with their memory; empty without driver or GPU."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ()
    query = [tool, "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=NVIDIA_TIMEOUT_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        log.info("nvidia-smi failed: %s", error)
        return ()
    return parse_gpus(done.stdout)


def parse_gpus(text: str) -> tuple[Gpu, ...]:
    """Lines ``name, MiB`` as nvidia-smi prints them; lines it cannot read are left out."""
    found = []
    for line in text.splitlines()[:64]:
        name, _, memory = line.rpartition(",")
        if name.strip() and memory.strip().isdigit():
            found.append(Gpu(name.strip()[:256], int(memory) << 20))
    return tuple(found)


def expert_kflop_per_s() -> int:
    """Speed of one expert FFN (gate, up, down, as in SwiGLU) on few rows, in kFLOP/s of one call at a time."""
    generator = np.random.default_rng(0)
    rows = generator.normal(size=(_ROWS, _HIDDEN)).astype(np.float32)
    gate, up = (generator.normal(size=(_HIDDEN, _INTERMEDIATE)).astype(np.float32) for _ in range(2))
    down = generator.normal(size=(_INTERMEDIATE, _HIDDEN)).astype(np.float32) / _INTERMEDIATE
    flop = 2 * _ROWS * 3 * _HIDDEN * _INTERMEDIATE
    best = float("inf")
    end = perf_counter() + BENCHMARK_SECONDS
    while (start := perf_counter()) < end:
        a = rows @ gate
        (a / (1.0 + np.exp(-np.abs(a))) * (rows @ up)) @ down
        best = min(best, perf_counter() - start)
    return int(flop / best / 1000)


def memory_bytes_per_s() -> int:
    """Speed at which large arrays are read, on one core."""
    block = np.ones(MEMORY_BENCHMARK_BYTES // 8)
    best = float("inf")
    for _ in range(4):
        start = perf_counter()
        block.sum()
        best = min(best, perf_counter() - start)
    return int(MEMORY_BENCHMARK_BYTES / best)
