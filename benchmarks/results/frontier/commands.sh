# What made results.jsonl of this folder and table.md of ../frontier-search, from the root of a checkout. Code of environments and
# algorithms was that of feee520; rows of the profile were added until d8fc1ba, and those that had run did not change. Each line
# goes on where it was cut off: of the search, "distill-grpo" with other steps than 1e-5 and 3e-5 was not run.
export OMP_NUM_THREADS=1
python benchmarks/run_all.py --profile benchmarks.profiles.frontier:SEARCH --jobs 2 --out benchmarks/results/frontier-search
run() {
    python benchmarks/run_all.py --profile frontier --jobs 2 --out benchmarks/results/frontier --algos "$1" --seeds "$2"
}
run start,distill,grpo-rescue,distill-grpo 5
run ppo,grpo 2

# The other tasks, HPT and LUFFY, with code of 90bc56b: the start policy of the parities is the same to the bit (its fingerprint in
# results.jsonl). The map's runs, without its column of 0.7 and without AdaBack, with code of 7eea89f.
python benchmarks/run_all.py --profile frontier --out benchmarks/results/frontier --tasks parities --algos hpt,luffy
python benchmarks/run_all.py --profile frontier --out benchmarks/results/frontier --tasks star-graph,fork,countdown \
    --algos start,distill,grpo,grpo-rescue,distill-grpo,hpt,luffy
python benchmarks/run_all.py --profile benchmarks.profiles.frontier:MAP --jobs 2 --out benchmarks/results/frontier-map

# From results.jsonl alone: the report, then the page.
python -m benchmarks.report benchmarks/results/frontier
python -m benchmarks.report.findings benchmarks/results/frontier --page docs/frontier.md
python -m benchmarks.report.map benchmarks/results/frontier-map --out docs/frontier_map.png

# half-way, with code of 0fb76f6 on another machine, where the start policy of the parities would differ in its last digits. Its row
# distill-grpo had the step of the parities then, and was replaced by the one that the search chose.
python benchmarks/run_all.py --profile frontier --out benchmarks/results/frontier --tasks half-way \
    --algos start,distill,grpo-rescue,distill-grpo --seeds 2
python benchmarks/run_all.py --profile frontier --out benchmarks/results/frontier --tasks half-way --algos grpo
python benchmarks/run_all.py --profile benchmarks.profiles.frontier:HALF_WAY_SEARCH --out benchmarks/results/frontier-half-way-search

# half-way-long, with code of c423854 on a third machine; its start policy differs from that of half-way in its last digits. The rows
# with a schedule, with that code and the profile of 505ab70. Before them both ran with constant steps: table.md of
# ../frontier-half-way-constant, from runs of this profile as it was in c423854, now the profile HALF_WAY_CONSTANT.
python benchmarks/run_all.py --profile frontier --out benchmarks/results/frontier --tasks half-way-long \
    --algos start,distill --seeds 2
python benchmarks/run_all.py --profile frontier --out benchmarks/results/frontier --tasks half-way-long \
    --algos grpo-rescue,distill-grpo --seeds 2
python benchmarks/run_all.py --profile benchmarks.profiles.frontier:HALF_WAY_CONSTANT --out benchmarks/results/frontier-half-way-constant

# half-way-weak, and PPO on half-way-long, on the machine and with the code of half-way-long (c423854) and this folder's profile. Row
# distill-grpo of half-way-weak had the step of half-way's before, and was replaced.
python benchmarks/run_all.py --profile frontier --out benchmarks/results/frontier --tasks half-way-long --algos ppo
weak() {
    python benchmarks/run_all.py --profile frontier --out benchmarks/results/frontier --tasks half-way-weak --algos "$1" --seeds "$2"
}
weak ppo,rloo 1
weak start,distill,grpo 2
weak distill-grpo 3
weak grpo-rescue 4
python benchmarks/run_all.py --profile benchmarks.profiles.frontier:HALF_WAY_WEAK_SEARCH \
    --out benchmarks/results/frontier-half-way-weak-search
