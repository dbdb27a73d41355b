"""The device loads that an engine's dispatch over replicas makes of a placement."""

from __future__ import annotations

from moecc.solvers.placement.balance import DeviceLoads, Ints, LayerLoads
from moecc.solvers.placement.lp import LpDeviceLoads
from moecc.solvers.placement.near import NearDeviceLoads


def loads_of(table: LayerLoads, experts: Ints, device_of: Ints) -> DeviceLoads:
    """The loads that the table's dispatch makes of an assignment of units to devices."""
    if table.near is not None:
        return NearDeviceLoads(table, table.near, experts, device_of)
    if table.lp:
        return LpDeviceLoads(table, experts, device_of)
    return DeviceLoads(table, experts, device_of)
