"""Devices and links as data, and the latency models that rest on them."""

from __future__ import annotations

from moecc.hardware.latency import (
    AllGather,
    AllToAll,
    Compute,
    ExpertLayer,
    GroupedGemm,
    Work,
    latency_us,
    uniform_distinct,
)
from moecc.hardware.load import device_names, load_device, parse_device
from moecc.hardware.memory import MemoryUse
from moecc.hardware.spec import DTYPE_BYTES, Cluster, DeviceSpec, Link, Roofline

__all__ = [
    "AllGather",
    "AllToAll",
    "Cluster",
    "Compute",
    "DTYPE_BYTES",
    "DeviceSpec",
    "ExpertLayer",
    "GroupedGemm",
    "Link",
    "MemoryUse",
    "Roofline",
    "Work",
    "device_names",
    "latency_us",
    "load_device",
    "parse_device",
    "uniform_distinct",
]
