"""Speed, memory and size of several models side by side."""

from eigenslice.bench.options import BenchOptions
from eigenslice.bench.runs import bench

__all__ = ["BenchOptions", "bench"]
