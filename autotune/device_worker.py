"""The process in which candidates run: it may crash or hang, and then only a candidate is lost.

Started by `moecc.autotune.device` with the descriptor of a socket. The first message holds the fields of `Task`; then
it answers ("check", configs), ("time", configs, number) and ("compile", configs) with (result, problem).
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Literal

import torch
from triton.runtime.jit import JITFunction

from moecc.autotune.checking import TOLERANCE, relative_difference
from moecc.autotune.draws import Draw, draw_routing
from moecc.codegen.config import KernelConfigs, LayerShape
from moecc.codegen.launcher import Launcher
from moecc.codegen.switches import freeze_configs, freeze_layer

# Weights in all, in bytes, of which no part is still in a cache when its turn comes again.
PAST_CACHES = 256 << 20
MAX_COPIES = 16
# A sample lasts at least this long: clocks and interrupts are small beside it.
SAMPLE_S = 4e-3
DRAWS = 8
# A candidate that hangs while nobody waits for it any more, because the tuner was killed, ends after this.
MOST_SECONDS = 600


@dataclass(frozen=True, kw_only=True)
class Task:
    """shares: of the experts in the routing, empty for a uniform one.

    purpose: to `compile` memory is only reserved and nothing runs, to `check` one copy of the weights suffices.
    """

    shape: LayerShape
    target: str
    default: KernelConfigs
    device: str
    shares: tuple[float, ...] = ()
    purpose: Literal["time", "check", "compile"] = "time"


class Bench:
    """A layer with random weights, in as many copies as no cache holds, and routings that follow each other."""

    def __init__(self, task: Task) -> None:
        self.task, shape, runs = task, task.shape, task.purpose != "compile"
        self.launchers: dict[KernelConfigs, Launcher] = {}
        generator = torch.Generator().manual_seed(len(task.shares))
        layer_bytes = 3 * shape.held_experts * shape.hidden * shape.intermediate * 2
        copies = min(max(PAST_CACHES // layer_bytes, 1), MAX_COPIES) if task.purpose == "time" else 1
        self.weights = [_weights(shape, task.device, generator if runs else None) for _ in range(copies)]
        self.draws = [
            draw_routing(shape, number, task.shares, generator, task.device)
            for number in range(max(DRAWS, shape.experts // shape.top_k) if runs else 1)
        ]
        self.expected = self._result(task.default) if runs else []
        self.calls = self._calls() if task.purpose == "time" else 1

    def compile(self, configs: KernelConfigs) -> None:
        """Into Triton's cache; what takes long, and nothing runs."""
        self._call(configs, 0)

    def check(self, configs: KernelConfigs) -> str:
        """What is wrong with the result, or ""."""
        found = map(relative_difference, self._result(configs), self.expected)
        wrong = [difference for difference in found if not difference <= TOLERANCE[self.task.shape.dtype]]
        return f"its result differs by {wrong[0]:.1e} from that of the default config" if wrong else ""

    def time_us(self, configs: KernelConfigs, number: int) -> float:
        self._synchronize()
        began = time.perf_counter()
        for call in range(self.calls):
            self._call(configs, number * self.calls + call)
        self._synchronize()
        return (time.perf_counter() - began) / self.calls * 1e6

    def _calls(self) -> int:
        """Calls of one sample, by the time of the default config's third call."""
        self._call(self.task.default, 1)
        self._synchronize()
        began = time.perf_counter()
        self._call(self.task.default, 2)
        self._synchronize()
        return max(1, round(SAMPLE_S / (time.perf_counter() - began)))

    def _result(self, configs: KernelConfigs) -> list[torch.Tensor]:
        """Outputs, and the router's weights in order: between two experts that all but tie any choice is right."""
        out, routed = self._call(configs, 0)
        self._synchronize()
        return [out, *([routed.sort(dim=1).values] if routed is not None else [])]

    def _call(self, configs: KernelConfigs, number: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The router where the layer has one, and the experts for a routing that is drawn."""
        if configs not in self.launchers:
            frozen = {self.task.target: freeze_configs(configs)}
            self.launchers[configs] = Launcher(freeze_layer(self.task.shape), frozen)
        launcher = self.launchers[configs]
        draw: Draw = self.draws[number % len(self.draws)]
        weights = self.weights[number // len(self.draws) % len(self.weights)]
        routed = None
        if self.task.shape.slots is None:
            routed = launcher.route(draw.x, weights)[1]
        return launcher.experts(draw.x, draw.ids, draw.topk_weights, weights), routed

    def _synchronize(self) -> None:
        if self.task.device == "cuda":
            torch.cuda.synchronize()


def _weights(shape: LayerShape, device: str, generator: torch.Generator | None) -> dict[str, torch.Tensor]:
    dtype = getattr(torch, shape.dtype)
    held, hidden, columns = shape.held_experts, shape.hidden, shape.gate_up_columns
    gate_up, down = (columns, hidden), (hidden, shape.intermediate)
    order = -1 if shape.transposed else 1
    sizes: dict[str, tuple[int, ...]] = {
        "gate": (shape.experts, hidden),
        "gate_up": (held, *gate_up[::order]),
        "down": (held, *down[::order]),
    }
    floats: dict[str, tuple[int, ...]] = {}
    if shape.has_router_bias:
        floats["router_bias"] = (shape.experts,)
    if shape.router.selection_bias:
        floats["correction_bias"] = (shape.experts,)
    if shape.has_expert_bias:
        floats |= {"gate_up_bias": (held, columns), "down_bias": (held, hidden)}
    made = {name: torch.empty(size, dtype=dtype, device=device) for name, size in sizes.items()}
    made |= {name: torch.empty(size, device=device) for name, size in floats.items()}
    if generator:
        for tensor in made.values():
            _fill(tensor, generator)
    return made


def _fill(tensor: torch.Tensor, generator: torch.Generator) -> None:
    """Normal with variance 1 / inputs, a block again and again: drawing all would take longer than tuning."""
    flat = tensor.view(-1)
    block = (torch.randn(min(flat.numel(), 1_000_003), generator=generator) * tensor.shape[-1] ** -0.5).to(
        tensor
    )
    for start in range(0, flat.numel(), len(block)):
        part = flat[start : start + len(block)]
        part.copy_(block[: len(part)])


def _answer(bench: Bench, message: tuple[Any, ...]) -> tuple[Any, str]:
    work: dict[str, Callable[..., Any]] = {
        "check": bench.check,
        "time": bench.time_us,
        "compile": bench.compile,
    }
    try:
        return work[message[0]](*message[1:]), ""
    except Exception as error:
        return None, f"{type(error).__name__}: {error}"


def _compile_only() -> None:
    """From now on launches of this process compile, and run nothing."""
    run = JITFunction.run

    def compile_only(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        return run(self, *arguments, grid=grid, warmup=True, **options)

    JITFunction.run = compile_only


def main(descriptor: int) -> None:
    signal.alarm(MOST_SECONDS)
    connection: Connection[Any, Any] = Connection(descriptor)
    task = Task(**connection.recv())
    if task.purpose == "compile":
        _compile_only()
    bench = Bench(task)
    connection.send((None, ""))
    while True:
        signal.alarm(0)
        try:
            message = connection.recv()
        except EOFError:
            return
        signal.alarm(MOST_SECONDS)
        connection.send(_answer(bench, message))


if __name__ == "__main__":
    with torch.inference_mode():
        main(int(sys.argv[1]))
