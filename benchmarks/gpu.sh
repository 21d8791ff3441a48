#!/usr/bin/env bash
# Figures of one GPU in at most eight minutes: `benchmarks/gpu.sh [--quick] [--out FOLDER]`.
# Laws, ratios at 32 M and 1 G parameters, ResNet-18, an exact graph of 1e6 x 64; they go
# to FOLDER/gpu.csv. Needs what is imported below and no network; --quick runs on a CPU.
set -euo pipefail
cd "$(dirname "$0")/.."
python="${PYTHON:-python3}"
"$python" -c "import flax, jax, optax, sklearn, tqdm"
# One process at a time has the GPU; parameters of 4 GB need most of it.
export XLA_PYTHON_CLIENT_MEM_FRACTION="${XLA_PYTHON_CLIENT_MEM_FRACTION:-.92}"
exec "$python" -m benchmarks.speed --gpu --minutes 8 "$@"
