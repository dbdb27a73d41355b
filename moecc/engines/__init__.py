"""The files of inference engines: placements in and out, routing dumps in.

A format is a file here and a line in `formats.FORMATS`.
"""

from moecc.engines.convert import Conversion, convert
from moecc.engines.counts import read_counts
from moecc.engines.formats import FORMATS, Format, export_placement, read_placement

__all__ = [
    "FORMATS",
    "Conversion",
    "Format",
    "convert",
    "export_placement",
    "read_counts",
    "read_placement",
]
