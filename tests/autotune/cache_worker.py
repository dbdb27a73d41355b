"""A tuner in a process of its own: FOLDER REMOTE SEED FIRST LAST [GO]. Prints one line for each measurement.

It tunes those token counts that are not known, with one config, its seed's. With GO, a file, it waits for that file
and then adds its config to every key, known or not.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from cache_samples import cache, key, measured, record


def main(folder: str, remote: str, seed: str, first: str, last: str, go: str = "") -> None:
    one = cache(Path(folder), remote)
    print("ready", flush=True)
    while go and not Path(go).exists():
        time.sleep(0.005)
    for tokens in range(int(first), int(last)):
        if go or one.get(key(tokens)) is None:
            print(tokens, flush=True)
            one.put(record(tokens, measured(int(seed), 100.0 + int(seed))))


if __name__ == "__main__":
    main(*sys.argv[1:])
