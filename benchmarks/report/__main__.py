"""Write the report of a benchmark folder again: ``python -m benchmarks.report runs/NAME``."""

import tyro

from benchmarks.report.write import write_report

if __name__ == "__main__":
    written = tyro.cli(write_report, config=(tyro.conf.PositionalRequiredArgs,))
    print(written.table)
    print(written.page)
