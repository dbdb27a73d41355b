"""What a device and its links are: frozen plain data, in the units of the datasheets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

DTYPE_BYTES: Mapping[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2, "fp8": 1}
EXCHANGES = ("decode", "prefill", "collective")
MODELS = ("dense", "dense_fp8", "experts", "experts_fp8", "decode", "prefill", "collective")


@dataclass(frozen=True, kw_only=True)
class Link:
    """One way out of a device: NVLink or xGMI inside a node, the network between nodes.

    bandwidth_gb_s: 1e9 bytes/s per device and direction, by the datasheet.
    alpha_us, efficiency: per kind of exchange ("decode" and "prefill" all-to-all, "collective"): the time of
    an empty exchange, and the achieved fraction of the bandwidth.  Between nodes alpha counts once for every
    doubling of the nodes; a collective's inside a node once plus once for every doubling of the devices.
    """

    technology: str
    bandwidth_gb_s: float
    alpha_us: Mapping[str, float]
    efficiency: Mapping[str, float]

    def bytes_per_us(self, exchange: str) -> float:
        return self.bandwidth_gb_s * 1e3 * self.efficiency[exchange]


@dataclass(frozen=True, kw_only=True)
class Roofline:
    """How close a class of kernels comes to the roofs of its device, and its time on no data (us).

    compute_efficiency: achieved fraction of the peak, per dtype.
    """

    memory_efficiency: float
    compute_efficiency: Mapping[str, float]
    overhead_us: float


@dataclass(frozen=True, kw_only=True)
class DeviceSpec:
    """One device as its YAML file describes it; every number there names its source.

    cores: SMs, CUs or CPU cores.  registers_per_core: 32-bit registers.  memory_gb: 1e9 bytes.
    dense: ordinary kernels; its overhead is that of one launch.  experts: routed-expert layers;
    its overhead covers the routing, sorting and launches of one whole layer.
    tile_rows: rows to which an expert's share is padded, half of it being wasted on average.
    elementwise_efficiency: fraction of the memory bandwidth that activation and combine reach.
    error_pct: median held-out error of each latency model (a key of MODELS) that was compared with measurements.
    """

    name: str
    description: str
    vendor: str
    target: str
    calibrated: bool
    cores: int
    warp_size: int
    shared_memory_kb: float
    registers_per_core: int
    memory_gb: float
    memory_bandwidth_gb_s: float
    peak_tflops: Mapping[str, float]
    tile_rows: float
    elementwise_efficiency: float
    dense: Roofline
    experts: Roofline
    intra_link: Link
    inter_link: Link
    error_pct: Mapping[str, float]
    sources: Mapping[str, str]

    @property
    def memory_bytes(self) -> int:
        return int(self.memory_gb * 1e9)

    def confidence(self) -> str:
        """The sentence to print beside every latency that rests on this device."""
        if not self.error_pct:
            return f"{self.name}: datasheet constants, uncalibrated"
        errors = ", ".join(f"{model} {error:g} %" for model, error in self.error_pct.items())
        rest = [model for model in MODELS if model not in self.error_pct]
        if "fp8" not in self.peak_tflops:
            rest = [model for model in rest if not model.endswith("_fp8")]
        tail = f"; uncalibrated: {', '.join(rest)}" if rest else ""
        return f"{self.name}: fitted to measurements, median held-out error: {errors}{tail}"


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """`nodes` machines of `devices_per_node` equal devices."""

    device: DeviceSpec
    nodes: int = 1
    devices_per_node: int = 1

    @property
    def devices(self) -> int:
        return self.nodes * self.devices_per_node
