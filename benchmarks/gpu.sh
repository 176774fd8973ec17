#!/usr/bin/env bash
# What only a GPU can show, in at most 12 minutes on one device:
#
#     benchmarks/gpu.sh [FOLDER]    # default outputs/gpu
#
# Out: FOLDER/machine.txt (device, versions, commit, date), FOLDER/tests.txt (FlexAttention's kernels, bf16, LoRA, 4 and 8
# bits, resampling; vLLM where it is installed) and rows of benchmarks/speed_gpu.csv (speed and memory beside TRL). Each
# part has a limit and the others go on without it. Exit status: 0 if every part ended well.
set -uo pipefail
cd "$(dirname "$0")/.."
folder=${1:-outputs/gpu}
python=${PYTHON:-.venv/bin/python}
mkdir -p "$folder"
status=0

{
    date -u +%F
    git rev-parse --short HEAD
    nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
    "$python" - <<'EOF'
from importlib.metadata import PackageNotFoundError, version
for name in ("torch", "transformers", "accelerate", "peft", "trl", "bitsandbytes", "vllm"):
    try:
        print(name, version(name))
    except PackageNotFoundError:
        print(name, "is not installed")
EOF
} >"$folder/machine.txt" 2>&1 || status=1
timeout 300 "$python" -m pytest -m gpu tests/gpu -rs --durations=0 >"$folder/tests.txt" 2>&1 || status=1
timeout 360 "$python" benchmarks/speed.py --num_turns 1 >"$folder/speed.txt" 2>&1 || status=1
"$python" benchmarks/speed.py --table >"$folder/speed.md" 2>>"$folder/speed.txt" || status=1
tail -n 3 "$folder"/machine.txt "$folder"/tests.txt "$folder"/speed.txt
exit $status
