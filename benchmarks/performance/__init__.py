"""The parts of `benchmarks/throughput.py`: how fast environments, sampling and training are."""
