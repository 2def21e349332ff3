#!/bin/sh
# Check and measure a GPU: sh benchmarks/gpu.sh [SMOLLM2.gguf]   (results in gpu.json)
# An environment in .venv-gpu is made first, unless PYTHON names an interpreter that has eigenslice.
set -eu
cd "$(dirname "$0")/.."
if [ -z "${PYTHON:-}" ]; then
    PYTHON=.venv-gpu/bin/python
    if [ ! -x "$PYTHON" ]; then
        python3 -m venv .venv-gpu
        "$PYTHON" -m pip install --quiet --constraint constraints.txt torch==2.13.0
        "$PYTHON" -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
    fi
fi
"$PYTHON" -c 'import torch; assert torch.cuda.is_available(), "torch sees no CUDA device: nothing was measured"'
"$PYTHON" -m pytest -q -n 0 tests/runtime/test_emulated_gpu.py tests/runtime/test_precision.py
exec "$PYTHON" benchmarks/gpu.py -o gpu.json ${1:+--smollm2 "$1"}
