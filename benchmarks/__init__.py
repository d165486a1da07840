"""Comparisons of algorithms: runs, statistics and reports."""
