"""Benchmarks of textgym: the comparison of algorithms, its report, and measurements of speed."""

from textgym.packages import foreign_package

if (message := foreign_package("agents")) is not None:
    raise ImportError(message)
