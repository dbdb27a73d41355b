"""The process in which candidates run, where some of them are bad, by the columns of gate_up."""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any

import torch

from moecc.autotune import device_worker
from moecc.codegen.config import KernelConfigs

HANGS, CRASHES, WRONG, DOES_NOT_COMPILE, GOOD = 8, 16, 256, 128, 64


class BadBench(device_worker.Bench):
    def compile(self, configs: KernelConfigs) -> None:
        if configs.gate_up.block_n == DOES_NOT_COMPILE:
            os.kill(os.getpid(), signal.SIGABRT)
        super().compile(configs)

    def _call(self, configs: KernelConfigs, number: int) -> Any:
        if self.task.purpose == "time" and configs.gate_up.block_n == HANGS:
            time.sleep(3600)
        if self.task.purpose == "time" and configs.gate_up.block_n == CRASHES:
            os.kill(os.getpid(), signal.SIGSEGV)
        out, routed = super()._call(configs, number)
        return (out + 1 if configs.gate_up.block_n == WRONG else out), routed


if __name__ == "__main__":
    device_worker.Bench = BadBench  # type: ignore[misc]
    with torch.inference_mode():
        device_worker.main(int(sys.argv[1]))
