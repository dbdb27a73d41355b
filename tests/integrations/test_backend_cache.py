"""A second process compiles nothing: it finds the graphs of the backend in inductor's caches."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("moecc.codegen.x86")
if torch.cuda.is_available():
    pytest.skip("this runs on the CPU, where Triton would be the GPU's", allow_module_level=True)

PROGRAM = """
import sys
sys.path.append(sys.argv[1])
import torch
from torch._dynamo.utils import counters
from tiny_models import relative, tiny
from moecc.integrations.dynamo.backend import compile_graph

model = tiny("olmoe").requires_grad_(False)
batch = torch.arange(6)[None]
out = torch.compile(model, backend=compile_graph, fullgraph=True)(batch, use_cache=False).logits
assert relative(out, model(batch).logits) < 1e-5
print(counters["aot_autograd"]["autograd_cache_hit"], counters["aot_autograd"]["autograd_cache_miss"])
"""


@pytest.mark.slow
def test_a_second_process_finds_the_graph(tmp_path: Path) -> None:
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    found = []
    for _ in range(2):
        command = [sys.executable, "-c", PROGRAM, str(Path(__file__).parent)]
        run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        found.append(run.stdout.split()[-2:])
    assert found == [["0", "1"], ["1", "0"]]
