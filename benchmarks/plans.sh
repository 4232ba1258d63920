#!/usr/bin/env bash
# The plans of configs/8b.py for all its hardware: bash benchmarks/plans.sh [OUTPUT_DIR [NAME ...]]
# Writes NAME.json into OUTPUT_DIR (benchmarks/plans), for all names in HARDWARE of configs/8b.py or those given.
# Needs pip install "jax[tpu]" and, for the h200 plan, "jax[cuda13]"; no accelerator. A plan takes 2 to 4 CPU minutes.
set -uo pipefail
cd "$(dirname "$0")/.." || exit
out=${1:-benchmarks/plans}
shift || true
mkdir -p "$out"
if [ $# -eq 0 ]; then
    mapfile -t names < <(python - <<'PYTHON'
import runpy
print("\n".join(filter(None, runpy.run_path("configs/8b.py")["HARDWARE"])))
PYTHON
    )
    set -- "${names[@]}"
fi
failed=0
for name in "$@"; do
    topology=${name/-/:}
    echo "== $topology"
    python -m llada_jax.plan --config="configs/8b.py:$name" --topology="$topology" --json >"$out/$name.tmp" ||
        { failed=1; echo "   exit code $?"; }
    if [ -s "$out/$name.tmp" ]; then mv "$out/$name.tmp" "$out/$name.json"; else rm -f "$out/$name.tmp"; fi
done
exit "$failed"
