"""Record the two traces of this folder from the checkpoint that train.py wrote: `python record.py`."""

from __future__ import annotations

import argparse
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory

from train import source_files

from moecc.frontend.trace import save_trace
from moecc.integrations.routing_recorder import record

HERE = Path(__file__).parent
LICENCES = Path("/usr/share/common-licenses")  # of Debian and its descendants
TOKENS = 16384
SEQUENCE_LENGTH = 256


def write_prose(folder: Path) -> list[Path]:
    """English that the model was not trained on: the language reference in pydoc, and licence texts."""
    topics: dict[str, str] = import_module("pydoc_data.topics").topics
    for name, text in topics.items():
        (folder / f"{name}.txt").write_text(text, "utf-8")
    # a symbolic link there is a second name of the same text
    return [folder, *(path for path in sorted(LICENCES.iterdir()) if not path.is_symlink())]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, default=HERE / "checkpoint")
    parser.add_argument("--out", type=Path, default=HERE / "traces")
    arguments = parser.parse_args()
    arguments.out.mkdir(exist_ok=True)
    with TemporaryDirectory() as folder:
        inputs = {"code": source_files()[1], "prose": write_prose(Path(folder))}
        for name, paths in inputs.items():
            routing = record(
                arguments.checkpoint, paths, tokens=TOKENS, sequence_length=SEQUENCE_LENGTH, name=name
            )
            save_trace(arguments.out / f"{name}.npz", routing)
            print(f"{name}: {len(routing.topk_ids)} tokens")


if __name__ == "__main__":
    main()
