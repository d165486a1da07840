"""What all runs need, made ready once in the process that theirs are forked from."""

import gc

from textgym.process import importing

with importing():
    import agents.evaluation  # noqa: F401
    import benchmarks.comparison.runner  # noqa: F401
    import textgym.metrics.base  # noqa: F401
    from benchmarks.comparison.warm_start import code_fingerprint

    code_fingerprint()  # it reads all files, and is kept
gc.freeze()  # no process looks for garbage among modules
