#!/usr/bin/env bash
# Makes the plans of configs/8b.py, 8b_sft.py, 1b.py and arm_7b.py: bash benchmarks/plans.sh [OUTPUT_DIR [NAME ...]]
#
# Writes a file NAME.json for each NAME into OUTPUT_DIR (default: benchmarks/plans). Without names, plans every entry in
# HARDWARE of the first three files, and arm_7b for v5p-4x4x8. The names of configs/8b_sft.py start with "8b_sft-", e.g.
# 8b_sft-lora-h200-1, those of configs/1b.py with "1b-", and those of configs/arm_7b.py with "arm_7b-".
# Needs pip install "jax[tpu]" for TPUs and pip install "jax[cuda13]" for GPUs, but no accelerator. A plan for TPUs takes 2
# to 10 minutes of CPU time.
set -uo pipefail
cd "$(dirname "$0")/.." || exit
out=${1:-benchmarks/plans}
shift || true
mkdir -p "$out"
if [ $# -eq 0 ]; then
    mapfile -t names < <(python - <<'PYTHON'
import runpy
for file, prefix in ("8b", ""), ("8b_sft", "8b_sft-"), ("1b", "1b-"):
    for name in filter(None, runpy.run_path(f"configs/{file}.py")["HARDWARE"]):
        print(prefix + name)
print("arm_7b-v5p-4x4x8")
PYTHON
    )
    set -- "${names[@]}"
fi
failed=0
for name in "$@"; do
    file=8b hardware=$name
    for other in 8b_sft 1b arm_7b; do
        if [[ $name == "$other"-* ]]; then file=$other hardware=${name#"$other"-}; fi
    done
    topology=${hardware#lora-} topology=${topology/-/:}
    echo "== $file, $hardware"
    python -m llada_jax.plan --config="configs/$file.py:$hardware" --topology="$topology" --json >"$out/$name.tmp" ||
        { failed=1; echo "   exit code $?"; }
    if [ -s "$out/$name.tmp" ]; then mv "$out/$name.tmp" "$out/$name.json"; else rm -f "$out/$name.tmp"; fi
done
exit "$failed"
