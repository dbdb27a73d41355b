"""What figures measured on a CPU are set against: its read bandwidth, and what it is."""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
import tempfile
import threading
from pathlib import Path
from typing import Any

import torch
import triton

from moecc.runtime.load import x86_level

READ_SOURCE = """
#include <stddef.h>
#include <stdint.h>
typedef uint64_t line __attribute__((vector_size(64), aligned(64)));
uint64_t read_streams(const line *p, size_t lines, size_t streams) {
    line sum[4] = {{0}};
    size_t each = lines / streams;
    for (size_t i = 0; i < each; i += 4)
        for (size_t s = 0; s < streams; s++)
            for (size_t j = 0; j < 4; j++) sum[j] |= p[s * each + i + j];
    line all = sum[0] | sum[1] | sum[2] | sum[3];
    return all[0] | all[1] | all[2] | all[3] | all[4] | all[5] | all[6] | all[7];
}
"""


class PlainRead:
    """Reads memory with as many threads as torch has and does nothing with it; in C, for torch's sum is slower.

    A call reads 256 MiB of 1 GiB, in `streams` sequential streams a thread.
    """

    BYTES = 1 << 28

    def __init__(self, streams: int) -> None:
        self._streams = ctypes.c_size_t(streams)
        self._read = _read_library().read_streams
        self._pool = torch.ones(4, self.BYTES // 8, dtype=torch.int64)

    def __call__(self, call: int) -> None:
        threads = torch.get_num_threads()
        share = self.BYTES // threads // 4096 * 4096
        start = -(-self._pool[call % 4].data_ptr() // 64) * 64
        lines = ctypes.c_size_t((share - 64) // 64 // 32 * 32)
        readers = [
            threading.Thread(
                target=self._read, args=(ctypes.c_void_p(start + i * share), lines, self._streams)
            )
            for i in range(threads)
        ]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join()


def _read_library() -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "read.c"), Path(folder, "read.so")
        source.write_text(READ_SOURCE, encoding="ascii")
        options = ["-O3", "-march=native", "-shared", "-fPIC"]
        subprocess.run(["cc", *options, "-o", str(library), str(source)], check=True)
        return ctypes.CDLL(str(library))


def machine() -> dict[str, Any]:
    """What the figures depend on; nothing that names the machine."""
    lines = Path("/proc/cpuinfo").read_text(encoding="ascii").splitlines()
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    return {
        "cpu": facts["model name"],
        "family_model": f"{facts['cpu family']}/{facts['model']}",
        "level": x86_level(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cache": facts["cache size"],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
    }
