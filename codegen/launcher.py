"""Host side of one MoE layer: checks tensors, allocates, launches.

Emitted modules carry this source behind their kernels, so it imports nothing else of this project.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import triton

from moecc.codegen.frozen import (
    ONE_LAUNCH_TOKENS,
    Config,
    Constants,
    Layer,
    call_bytes,
    counters_of,
    kernel_constants,
    kernel_sequence,
    tiles_of,
)
from moecc.codegen.kernels.down import combine_kernel, down_kernel
from moecc.codegen.kernels.gate_up import gate_up_kernel
from moecc.codegen.kernels.plan import plan_kernel, scatter_kernel
from moecc.codegen.kernels.router import router_kernel

Weights = Mapping[str, torch.Tensor]


class Plan(NamedTuple):
    """A routing in the order in which the GEMMs walk it; int32 unless said otherwise."""

    topk_ids: torch.Tensor  # [tokens, slots], any integer type
    topk_weights: torch.Tensor  # [tokens, slots] fp32
    slot_rank: torch.Tensor  # [tokens, slots]
    block_counts: torch.Tensor  # [token blocks, experts]
    expert_offsets: torch.Tensor  # [experts + 1]
    tile_expert: torch.Tensor  # [tiles_max]
    tile_row: torch.Tensor  # [tiles_max]
    num_tiles: torch.Tensor  # [1]
    sorted_slots: torch.Tensor  # [tokens * slots]
    counters: torch.Tensor  # zero between launches

    @property
    def tile_map(self) -> tuple[torch.Tensor, ...]:
        """What a GEMM reads, in the order of its arguments."""
        return (self.sorted_slots, self.expert_offsets, self.tile_expert, self.tile_row, self.num_tiles)


class Launcher:
    """One layer with its kernel configs: target -> kernel -> block sizes and launch options.

    `weights` maps, contiguous and in the layer's dtype: `gate` [experts, hidden]; `gate_up` [experts + shared,
    columns, hidden], gate and up or up alone; `down` [experts + shared, hidden, intermediate]; and, of any float type,
    where the layer has them: `router_bias` and `correction_bias` [experts], `gate_up_bias` [experts + shared,
    columns], `down_bias` [experts + shared, hidden]. In a transposed layout the last two dimensions of `gate_up` and
    `down` change places; in an interleaved one gate and up take turns.
    Every method raises ValueError for a tensor that does not fit, RuntimeError for a device without configs.
    """

    def __init__(self, layer: Layer, configs: Mapping[str, Config]) -> None:
        self.layer, self.configs = layer, configs
        self._idle_counters: dict[tuple[torch.device, int], torch.Tensor] = {}
        self._known_constants: dict[tuple[object, ...], dict[str, Constants]] = {}

    def forward(
        self,
        x: torch.Tensor,
        weights: Weights,
        *,
        residual: torch.Tensor | None = None,
        logits: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The layer on x [..., hidden], plus `residual` of that shape; `logits` [..., experts] replace the gate."""
        rows = self._rows(x)
        if not len(rows):
            return torch.empty_like(x)
        plan = self._route(rows, weights, logits, sort=True)
        self._scatter(plan)
        return self._compute(rows, plan, weights, residual).reshape(x.shape)

    def route(
        self, x: torch.Tensor, weights: Weights, *, logits: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids int32 and weights fp32 [tokens, top_k + shared]; the shared experts, weight 1, come last."""
        rows = self._rows(x)
        if not len(rows):
            empty = torch.empty((0, self.layer.slots), device=x.device)
            return empty.int(), empty
        return self._route(rows, weights, logits, sort=False)[:2]

    def experts(
        self,
        x: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        weights: Weights,
        *,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The experts alone, for a routing made elsewhere: ids and weights [tokens, k], any k.

        The ids of a token are distinct; one outside [0, len(gate_up)) is another device's and adds nothing. The
        number of experts is that of the weights given.
        """
        rows = self._rows(x)
        if topk_ids.shape != topk_weights.shape:
            raise ValueError(
                f"topk_ids {list(topk_ids.shape)} and topk_weights {list(topk_weights.shape)} differ in shape"
            )
        plan = self._plan_given(rows, topk_ids, topk_weights, expert_count(weights, "gate_up"))
        if plan is None:
            return torch.zeros_like(x) if residual is None else residual.clone()
        return self._compute(rows, plan, weights, residual).reshape(x.shape)

    def launches(self, tokens: int, target: str) -> tuple[str, ...]:
        """The kernels that one `forward` launches, in order."""
        return kernel_sequence(self.configs[target], tokens)

    def workspace_bytes(self, tokens: int, target: str) -> int:
        """Device memory in bytes that `forward` allocates besides its output."""
        layer = self.layer
        return call_bytes(
            layer,
            self.configs[target],
            tokens=tokens,
            experts=layer.total_experts,
            shared=layer.shared,
            routed_here=True,
            element_bytes=getattr(torch, layer.dtype).itemsize,
        )

    def _route(
        self, rows: torch.Tensor, weights: Weights, logits: torch.Tensor | None, *, sort: bool
    ) -> Plan:
        layer, tokens = self.layer, len(rows)
        shape = (tokens, layer.slots)
        ids = torch.empty(shape, dtype=torch.int32, device=rows.device)
        topk_weights = torch.empty(shape, device=rows.device)
        plan = self._plan(ids, topk_weights, experts=layer.total_experts, shared=layer.shared)
        constants = self._constants(plan, layer.total_experts, has_logits=logits is not None, sort=sort)
        parts = constants["router"]["SPLIT_H"]
        if logits is not None:
            logits = logits.reshape(-1, layer.experts).contiguous()
            expect("logits", logits, (tokens, layer.experts))
            gate = logits
        else:
            gate = _tensor(weights, "gate", (layer.experts, layer.hidden), rows.dtype)
            scratch = (parts, tokens, layer.experts)
            logits = torch.empty(scratch, device=rows.device) if parts > 1 else rows
        biases = [
            _tensor(weights, name, (layer.experts,)) if layer.router[switch] else rows
            for name, switch in (("router_bias", "HAS_ROUTER_BIAS"), ("correction_bias", "SELECTION_BIAS"))
        ]
        grid = (len(plan.block_counts), parts)
        router_kernel[grid](rows, gate, *biases, logits, *plan, tokens, **constants["router"])
        return plan

    def _plan_given(
        self, rows: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor, experts: int
    ) -> Plan | None:
        """The plan of a routing that was made elsewhere, None if it is empty."""
        if topk_ids.ndim != 2 or len(topk_ids) != len(rows):
            raise ValueError(f"topk_ids are {list(topk_ids.shape)}, not [{len(rows)}, k]")
        if topk_ids.is_floating_point() or topk_ids.device != rows.device:
            raise ValueError(
                f"topk_ids are {topk_ids.dtype} on {topk_ids.device}, not integers on {rows.device}"
            )
        if not topk_ids.numel():
            return None
        plan = self._plan(topk_ids.contiguous(), topk_weights.float().contiguous(), experts=experts)
        constants = self._constants(plan, experts)["plan"]
        plan_kernel[(len(plan.block_counts),)](plan.topk_ids, *plan[2:], len(rows), **constants)
        self._scatter(plan)
        return plan

    def _scatter(self, plan: Plan) -> None:
        """Fills sorted_slots where the launch that planned has left it to a second one."""
        if len(plan.topk_ids) <= ONE_LAUNCH_TOKENS:
            return
        constants = self._constants(plan, len(plan.expert_offsets) - 1)
        grid = (triton.cdiv(plan.topk_ids.numel(), constants["scatter"]["SCATTER_BLOCK"]),)
        arrays = (plan.topk_ids, plan.slot_rank, plan.block_counts, plan.sorted_slots)
        scatter_kernel[grid](*arrays, len(plan.topk_ids), **constants["scatter"])

    def _compute(
        self, rows: torch.Tensor, plan: Plan, weights: Weights, residual: torch.Tensor | None
    ) -> torch.Tensor:
        h, _ = self._gate_up(rows, plan, weights)
        return self._down(h, plan, weights, residual)

    def _gate_up(
        self, rows: torch.Tensor, plan: Plan, weights: Weights, *, keep_h: bool = True, keep_pre: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(h [rows, intermediate], pre [rows, columns]) in sorted order; what is not kept is an unrelated tensor."""
        layer, (tokens, slots) = self.layer, plan.topk_ids.shape
        experts = len(plan.expert_offsets) - 1
        gate_up, bias = self._expert_weights("gate_up", weights, experts, (layer.columns, layer.hidden))
        held = tokens * min(slots, experts)
        h = rows.new_empty((held, layer.intermediate)) if keep_h else rows
        pre = rows.new_empty((held, layer.columns)) if keep_pre else rows
        constants = self._constants(plan, experts, keep_h=keep_h, keep_pre=keep_pre)["gate_up"]
        grid = (len(plan.tile_expert) * triton.cdiv(layer.intermediate, constants["BLOCK_N"]),)
        gate_up_kernel[grid](rows, gate_up, bias, h, pre, *plan.tile_map, **constants)
        return h, pre

    def _down(
        self, h: torch.Tensor, plan: Plan, weights: Weights, residual: torch.Tensor | None = None
    ) -> torch.Tensor:
        """[tokens, hidden]: h [rows, intermediate] through the second GEMM, weighted and summed."""
        layer, (tokens, slots) = self.layer, plan.topk_ids.shape
        experts, hidden = len(plan.expert_offsets) - 1, layer.hidden
        down, bias = self._expert_weights("down", weights, experts, (hidden, layer.intermediate))
        if residual is not None:
            residual = residual.reshape(-1, hidden).contiguous()
            expect("residual", residual, (tokens, hidden))
        constants = self._constants(plan, experts, has_residual=residual is not None)
        partial = h.new_empty((tokens * slots, hidden))
        out = h.new_empty((tokens, hidden))
        tail = (out if residual is None else residual, out)
        grid = (len(plan.tile_expert) * triton.cdiv(hidden, constants["down"]["BLOCK_N"]),)
        routing = (plan.topk_ids, plan.topk_weights, partial, *tail, *plan.tile_map, plan.counters, tokens)
        down_kernel[grid](h, down, bias, *routing, **constants["down"])
        if not constants["down"]["FUSE_COMBINE"]:
            combine_slots(partial, plan.topk_ids, *tail, constants["combine"])
        return out

    def _expert_weights(
        self, name: str, weights: Weights, experts: int, shape: tuple[int, int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The tensor of that name and its bias; `shape` is (outputs, inputs). Without a bias, the tensor twice."""
        stored = shape[::-1] if self.layer.layout["TRANSPOSED"] else shape
        tensor = _tensor(weights, name, (experts, *stored), getattr(torch, self.layer.dtype))
        if not self.layer.has_expert_bias:
            return tensor, tensor
        return tensor, _tensor(weights, f"{name}_bias", (experts, shape[0]))

    def _plan(self, ids: torch.Tensor, topk_weights: torch.Tensor, *, experts: int, shared: int = 0) -> Plan:
        tokens, slots = ids.shape
        config = self.configs[self._target(ids.device)]
        blocks = triton.cdiv(tokens, config["router"]["BLOCK_T"])
        tiles = max(tiles_of(tokens, slots, experts, shared, config), 1)
        sizes = (tokens * slots, blocks * experts, experts + 1, tiles, tiles, 1, tokens * slots)
        arrays = [torch.empty(size, dtype=torch.int32, device=ids.device) for size in sizes]
        arrays[1] = arrays[1].view(blocks, experts)
        counters = self._zero_counters(ids.device, counters_of(blocks, self.layer.hidden, config))
        return Plan._make((ids, topk_weights, *arrays, counters))

    def _zero_counters(self, device: torch.device, count: int) -> torch.Tensor:
        """Counters that are zero now; kernels leave them so, and launches on one stream share them."""
        # A capture only records the memset, and on the host a kernel may have stopped inside.
        if device.type == "cpu" or torch.cuda.is_current_stream_capturing():
            return torch.zeros(count, dtype=torch.int32, device=device)
        key = (device, torch.cuda.current_stream(device).cuda_stream)
        if key not in self._idle_counters or len(self._idle_counters[key]) < count:
            self._idle_counters[key] = torch.zeros(count, dtype=torch.int32, device=device)
        return self._idle_counters[key]

    def _constants(self, plan: Plan, experts: int, **switches: bool) -> dict[str, Constants]:
        """Made once: with memory streaming through the caches, what a call computes anew is slow."""
        tokens, slots = plan.topk_ids.shape
        target = self._target(plan.topk_ids.device)
        config = self.configs[target]
        key = (target, kernel_sequence(config, tokens), slots, experts, *switches.items())
        if key not in self._known_constants:
            self._known_constants[key] = kernel_constants(
                self.layer,
                config,
                tokens=tokens,
                slots=slots,
                experts=experts,
                backend=backend_of(target),
                **switches,
            )
        return self._known_constants[key]

    def _target(self, device: torch.device) -> str:
        if not isinstance(router_kernel, triton.JITFunction):
            target = "interpret"
        elif device.type == "cpu" and _runs_on_x86():
            target = "x86"
        elif device.type != "cuda":
            raise RuntimeError(
                f"no kernels for device {device}: set TRITON_DEFAULT_BACKEND=x86 where moecc is installed, or "
                "TRITON_INTERPRET=1 to interpret them there"
            )
        elif torch.version.hip:
            target = torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
        else:
            target = "sm_{}{}".format(*torch.cuda.get_device_capability(device))
        if target not in self.configs:
            raise RuntimeError(f"no configs for {target}: this module has {', '.join(self.configs)}")
        return target

    def _rows(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[-1] != self.layer.hidden or x.dtype != getattr(torch, self.layer.dtype):
            raise ValueError(
                f"x is {x.dtype} {list(x.shape)}, not {self.layer.dtype} [..., {self.layer.hidden}]"
            )
        return x.reshape(-1, self.layer.hidden).contiguous()


def combine_slots(
    partial: torch.Tensor,
    topk_ids: torch.Tensor,
    residual: torch.Tensor,
    out: torch.Tensor,
    constants: Constants,
) -> None:
    """out [tokens, hidden] = the sum of each token's slots of `partial`, and of `residual` if the constants say so."""
    grid = (triton.cdiv(len(out), constants["BLOCK_T"]), triton.cdiv(out.shape[1], constants["BLOCK_H"]))
    combine_kernel[grid](partial, topk_ids, residual, out, len(out), **constants)


def _runs_on_x86() -> bool:
    """Whether Triton's driver is moecc's backend for CPU tensors."""
    return bool(triton.runtime.driver.active.get_current_target().backend == "x86")


def backend_of(target: str) -> str:
    if target in ("interpret", "x86"):
        return target
    return "hip" if target.startswith("gfx") else "cuda"


def _tensor(
    weights: Weights, name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None
) -> torch.Tensor:
    """weights[name], of that shape, contiguous, and of that dtype if one is given."""
    if name not in weights:
        raise ValueError(f"weights lack {name!r} {list(shape)}")
    tensor = weights[name]
    expect(name, tensor, shape)
    if dtype is not None and tensor.dtype != dtype:
        raise ValueError(f"{name} is {tensor.dtype}, not {dtype}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} is not contiguous")
    return tensor


def expert_count(weights: Weights, name: str) -> int:
    if name not in weights:
        raise ValueError(f"weights lack {name!r}")
    return len(weights[name])


def expect(name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        raise ValueError(f"{name} is {list(tensor.shape)}, not {list(shape)}")
