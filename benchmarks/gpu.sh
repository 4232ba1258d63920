#!/usr/bin/env bash
# Runs everything that needs a GPU, in one command: bash benchmarks/gpu.sh OUTPUT_DIR
#
# The parts are: the test suite; benchmarks of the attention kernels, of the train step at 150M, 1B and 8B parameters
# (with profiles), of the sampler, the cross-entropy, likelihoods, reading and writing models, and the start-up; and
# short real runs, whose samples a person can read.
# Needs: pip install -e ".[test,gpu]". Each part writes a log into OUTPUT_DIR. A failed part does not stop the others.
set -uo pipefail
cd "$(dirname "$0")/.." || exit
out=${1:?usage: bash benchmarks/gpu.sh OUTPUT_DIR}
mkdir -p "$out"
export JAX_PLATFORMS=cuda XLA_PYTHON_CLIENT_MEM_FRACTION=0.9
failed=0
part() {
    local name=$1
    shift
    echo "== $name: $*"
    "$@" >"$out/$name.log" 2>&1 || { failed=1; echo "   failed, see $out/$name.log"; }
    tail -n 3 "$out/$name.log"
}

part devices python -c 'import jax; print(jax.__version__, jax.devices())'
# Many processes share the GPU, so none of them may preallocate its memory.
part tests env JAX_DISABLE_MOST_OPTIMIZATIONS=false XLA_PYTHON_CLIENT_PREALLOCATE=false python -m pytest -q \
    -n "$(nproc)" --dist loadfile
part attention python benchmarks/attention.py --shapes=4x4096x32x4x64,2x4096x32x32x128 --rounds=10
part train_step python benchmarks/train_step.py --cases=150m,1b,8b,8b_lora --profile="$out/profile"
# The reference kernel holds all attention scores in memory. With more sequences they would not fit.
part train_step_plain python benchmarks/train_step.py --cases=150m,1b --attention=reference --remat=full --unroll=1 \
    --batch_size=2
part train_step_same python benchmarks/train_step.py --cases=150m,1b --remat=full --unroll=1 --batch_size=2
part train_step_xla python benchmarks/train_step.py --cases=8b --attention=xla
# All that fits: fewer layers of the same width, so that the optimizer's part is small.
part train_step_width python benchmarks/train_step.py --cases=8b --layers=8 --batch_size=8 --unroll=0
part sampler python benchmarks/sampler.py
# The shape of the 8B model with random weights. The prompt is as long as GSM8K's, the requests are like HellaSwag's.
shape_8b=(--layers=32 --width=4096 --heads=32 --feed_forward=12288 --vocab_size=126464)
part sampler_8b python benchmarks/sampler.py "${shape_8b[@]}" --prompt_length=1000 --gen_length=256 --steps=256 \
    --block_length=256 --repeats=2
part likelihood_8b python benchmarks/likelihood.py "${shape_8b[@]}" --threads=16 --samples=128 --chunk=32 --repeats=2
part convert python benchmarks/convert.py
# Four processes share the GPU, so none of them may preallocate its memory.
part cross_entropy env XLA_PYTHON_CLIENT_PREALLOCATE=false python benchmarks/cross_entropy.py \
    --tokens=16384 --rows=4 --width=4096 --chunk=2048 --dtype=bfloat16
part startup python benchmarks/startup.py
part quickstart python -m llada_jax.train --config=configs/quickstart.py --workdir="$out/quickstart" --config.steps=2800
part sample python -m llada_jax.sample --model="$out/quickstart" --prompt="import " --gen_length=64
part chat bash -c "printf 'import os\n/again\n' | python -m llada_jax.chat --model='$out/quickstart' --temperature=0.7"
# Tunes the quickstart's model on sums: once all of its parameters (rank 0), once only low-rank adapters (rank 8).
awk 'BEGIN { for (a = 1; a <= 40; a++) for (b = 1; b <= 40; b++)
    printf "{\"question\": \"%d + %d?\", \"answer\": \"%d\"}\n", a, b, a + b }' >"$out/sums.jsonl"
part sums python -m llada_jax.prepare --chat --input="$out/sums.jsonl" --output="$out/sums" --tokenizer="$out/quickstart" \
    --sequence_length=128
for rank in 0 8; do
    part "tuned_rank_$rank" python -m llada_jax.train --config=configs/small_sft.py --workdir="$out/tuned_rank_$rank" \
        --config.init_from="$out/quickstart" --config.data.path="$out/sums" --config.sequence_length=128 \
        --config.steps=600 --config.model.lora.rank=$rank --config.sampling.prompts='("7 + 8?",)'
done
exit "$failed"
