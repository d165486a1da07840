# What made results.jsonl, from the root of a checkout whose ../shared holds data and model; with code of 893c59b and the profile of
# dfa1adf. The guide's texts are those of benchmarks/guides. METEOR needs Java.
export OMP_NUM_THREADS=1
python benchmarks/run_all.py --profile benchmarks.profiles.gemma:GEMMA --source ../shared/data --base ../shared/models/base-7m \
    --out benchmarks/results/gemma

# From results.jsonl alone: the report, then the page.
python -m benchmarks.report benchmarks/results/gemma
python -m benchmarks.report.findings benchmarks/results/gemma --page docs/stronger_guide.md
