"""Write the report of a benchmark folder again: ``python -m benchmarks.report runs/NAME``."""

import sys

import tyro

from benchmarks.report.write import ReportFiles, write_report
from textgym.rendering import visible

if __name__ == "__main__":
    try:
        written: ReportFiles = tyro.cli(write_report, config=(tyro.conf.PositionalRequiredArgs,))
    except (ImportError, OSError, ValueError) as error:
        print(f"error: {visible(str(error))}", file=sys.stderr)
        sys.exit(2)
    print(written.table)
    print(written.page)
