"""Links from matrices and from nvidia-smi's table, and the errors of both."""

from __future__ import annotations

import json

import numpy as np
import pytest

from moecc.errors import InputError
from moecc.solvers.placement.links import Links

TOPOLOGY = """\
\x1b[4m	GPU0	GPU1	GPU2	GPU3	NIC0	CPU Affinity	NUMA Affinity\x1b[0m
GPU0	 X 	NV4	SYS	SYS	PIX	0-15	0
GPU1	NV4	 X 	SYS	SYS	PIX	0-15	0
GPU2	SYS	SYS	 X 	PHB	SYS	16-31	1
GPU3	SYS	SYS	PHB	 X 	SYS	16-31	1
NIC0	PIX	PIX	SYS	SYS	 X

Legend:

  X    = Self
  SYS  = Connection traversing PCIe as well as the SMP interconnect between NUMA nodes
"""


def test_tiers_by_node():
    links = Links.by_node(4, 2, (0.0, 1.0, 5.0))
    assert links.tiers == ("same device", "same node", "other node")
    assert links.tier.tolist() == [[0, 1, 2, 2], [1, 0, 2, 2], [2, 2, 0, 1], [2, 2, 1, 0]]
    assert links.cost[0].tolist() == [0, 1, 5, 5]


def test_nvidia_smi_table():
    links = Links.from_topology(TOPOLOGY)
    assert links.tiers == ("same device", "NV4", "PHB", "SYS")
    assert links.tier.tolist() == [[0, 1, 3, 3], [1, 0, 3, 3], [3, 3, 0, 2], [3, 3, 2, 0]]
    # 4 NVLinks of 25 GB/s: 0.01 us per 1000 bytes; PCIe 4.0 x16: 32 GB/s.
    assert links.cost[0, 1] == pytest.approx(1e-5)
    assert links.cost[0, 2] == pytest.approx(1e-3 / 32)


def test_hosts_are_repeated_over_nodes():
    links = Links.from_topology(TOPOLOGY, nodes=2, other_node_gb_s=50.0)
    assert links.devices == 8
    assert links.tiers[-1] == "other node"
    assert (links.tier[:4, 4:] == 4).all()
    assert links.cost[0, 4] == pytest.approx(1e-3 / 50)
    assert (links.cost[4:, 4:] == links.cost[:4, :4]).all()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nothing here", "topo.txt:1:1: there is no line of GPU0"),
        (TOPOLOGY.replace("PHB", "XYZ"), "topo.txt:4:18: 'XYZ' is not a link"),
        (
            TOPOLOGY.replace("GPU3	SYS	SYS	PHB	 X 	SYS	16-31	1\n", ""),
            "topo.txt:1:1: GPU3 has no row",
        ),
        (TOPOLOGY.replace("GPU1	NV4	 X ", "GPU1	NV4	NV4"), "topo.txt:3:1: GPU1 is not marked X"),
        (
            TOPOLOGY.replace("GPU0	 X 	NV4	SYS	SYS	PIX	0-15	0", "GPU0	 X 	NV4"),
            "topo.txt:2:1: GPU0 lists 2",
        ),
    ],
)
def test_bad_tables_are_refused_with_their_place(text, message):
    with pytest.raises(InputError) as error:
        Links.from_topology(text, where="topo.txt")
    assert str(error.value).startswith(message)
    assert "; hint: " in str(error.value)


def test_matrices_round_trip():
    cost = np.array([[0, 0.5, 2], [0.5, 0, 2], [2, 1.5, 0]])
    for links in (
        Links.from_json(json.dumps(cost.tolist()), 1),
        Links.from_json(json.dumps({"cost": cost.tolist()}), 1),
        Links.from_csv("# us per byte\n" + "\n".join(",".join(map(str, row)) for row in cost) + "\n\n", 1),
    ):
        assert np.array_equal(links.cost, cost)
        assert links.tier[0].tolist() == [0, 2, 2]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0,1\n1,x\n", "links.csv:2:3: 'x' is not a cost"),
        ("0,1\n-1,0\n", "links.csv:2:1: -1.0 is not a cost"),
        ("0,1\n1,nan\n", "links.csv:2:3: nan is not a cost"),
        ("0,1,2\n1,0,2\n", "links.csv:1:1: row 0 has 3 entries, but there are 2 rows"),
        ("", "links.csv: it has 0 rows"),
        ("1,1\n1,0\n", "links: device 0 pays 1.0 for a byte to itself"),
    ],
)
def test_bad_csv_is_refused_with_its_place(text, message):
    with pytest.raises(InputError) as error:
        Links.from_csv(text, 1)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[0, 1],\n [1", "links.json:2:4: not valid JSON"),
        ('{"a": 1}', "links.json: there is no matrix"),
        ("[[0, true], [1, 0]]", "links.json: row 0, column 1: True is not a cost"),
        ("[[]]", "links.json: row 0 has 0 entries"),
    ],
)
def test_bad_json_is_refused_with_its_place(text, message):
    with pytest.raises(InputError) as error:
        Links.from_json(text, 1)
    assert str(error.value).startswith(message)
