"""A tuner in a process of its own, on a device that is not there: FOLDER REMOTE SHAPES TRIALS [GO].

Tunes token counts of 1, 2, 4 … Prints a line for each config that it prepares; with GO it waits for that file.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tuning_samples import FakeDevice, tuning, tuning_cache

from moecc.autotune.tune import Budget
from moecc.codegen.config import KernelConfigs


class LoudDevice(FakeDevice):
    def prepare(self, candidates: Sequence[KernelConfigs], timeout_s: float) -> list[str]:
        for _ in candidates:
            print("prepared", flush=True)
        return super().prepare(candidates, timeout_s)


def main(folder: str, remote: str, shapes: str, trials: str, go: str = "") -> None:
    opened = tuning_cache(Path(folder), remote)
    print("ready", flush=True)
    while go and not Path(go).exists():
        time.sleep(0.005)
    for power in range(int(shapes)):
        tuning(opened, LoudDevice(), tokens=1 << power, budget=Budget(trials=int(trials))).run()


if __name__ == "__main__":
    main(*sys.argv[1:])
