# What made results.jsonl of this folder and of ../frontier-search, from the root of a checkout of COMMIT. Each line goes
# on where it was cut off.
export OMP_NUM_THREADS=1
python benchmarks/run_all.py --profile benchmarks.profiles.frontier:SEARCH --jobs 2 --out benchmarks/results/frontier-search
python benchmarks/run_all.py --profile frontier --jobs 2 --out benchmarks/results/frontier --seeds 5 \
    --algos start,distill,grpo-rescue,ppo,grpo,distill-grpo

# From results.jsonl alone: the report, then the page.
python -m benchmarks.report benchmarks/results/frontier
python -m benchmarks.report.findings benchmarks/results/frontier --page docs/frontier.md
