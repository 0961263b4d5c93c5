#!/bin/sh
# What the GPU backend must show on a machine with an NVIDIA GPU: right answers first, then speed.
# usage: bench/gpu.sh [OXSEEK]      the binary; default: oxseek of PATH
set -eu
oxseek=${1:-oxseek}
root=$(dirname "$0")/..
"$oxseek" selftest --device cuda --goldens "$root/goldens"
for weights in bf16 fp8; do
    "$oxseek" bench --device cuda --shape v2-lite --weights "$weights" -p 4096 -n 64 -b 1 -d 0 -r 3
    "$oxseek" bench --device cuda --shape v2-lite --weights "$weights" -p 0 -n 64 -b 1,8,64 -d 1000 -r 3
done
"$oxseek" bench --device cuda --kernels -r 5
