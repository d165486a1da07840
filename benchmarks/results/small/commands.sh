# What made results.jsonl, from the root of a checkout whose ../shared holds data and model. Each line goes on where it
# was cut off, and a record that is there is not made again. IMDB of the first line ran at 7d014df, whose settings of
# IMDB are those of f761f8a, at which CommonGen of the second ran; TL;DR, the guide and learners
# from the base model ran at 8caeeff, the rest at d6c86b4. METEOR needs Java.
export OMP_NUM_THREADS=1
run() {
    python benchmarks/run_all.py --profile small --source ../shared/data --base ../shared/models/base-7m --dtype auto \
        --jobs 2 --out benchmarks/results/small --tasks "$1" --algos "$2" --seeds "$3"
}
run imdb sl,best-of-4,ppo,ppo++,d2lols 5
run commongen sl,best-of-4,ppo,ppo++,d2lols 5
run imdb d2lols-early 5
run imdb aggrevated,lols,dr-po,rloo,guided-rloo 3
run commongen d2lols-early 5
run commongen aggrevated,lols,dr-po,rloo,guided-rloo 3
run imdb rloo,guided-rloo 5
run commongen rloo,guided-rloo 5
run tldr sl,guide,best-of-4,ppo,ppo++,d2lols,rloo,guided-rloo 3
run tldr aggrevated,lols,d2lols-early,dr-po 3
run tldr sl,best-of-4,ppo,ppo++,d2lols,rloo,guided-rloo,d2lols-early 5
run imdb guide 3
run commongen guide 3
run imdb ppo-from-base,ppo++-from-base,d2lols-from-base 4

# From results.jsonl alone: summary.json, table.md, curves.png, learning_curves.csv and report.html; then the page.
python -m benchmarks.report benchmarks/results/small
python -m benchmarks.report.findings benchmarks/results/small --page docs/evidence.md
