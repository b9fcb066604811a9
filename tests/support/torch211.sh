#!/bin/sh
# The tests of what touches torch, under torch 2.11 and torchvision 0.26, the oldest that pyproject.toml takes and what GPU hosts have.
# In .venv-torch211, made the first time (6 GB): the rest as requirements-dev.lock says, without Ray and MLflow, which those hosts lack too.
#
#   torch211.sh [ARGUMENTS OF PYTEST]
set -eu
cd "$(dirname "$0")/../.."
there=.venv-torch211
wanted=$(cat requirements-dev.lock pyproject.toml tests/support/torch211.sh | sha256sum | cut -d ' ' -f 1)
if [ "$(cat $there/installed 2>/dev/null || true)" != "$wanted" ]; then
    echo "installing torch 2.11 into $there" >&2
    .venv/bin/uv venv --quiet --clear --python .venv/bin/python $there
    # Torch and torchvision want their own CUDA libraries and Triton, and torch an older setuptools than the lock has.
    sed -n 's/^\([a-z0-9][^ ]*==[^\\]*\).*/\1/p' requirements-dev.lock |
        grep -vE '^(torch|torchvision|triton|setuptools|nvidia-[a-z0-9-]*|cuda-[a-z0-9-]*)==' >$there/constraints.txt
    printf 'torch==2.11.0\ntorchvision==0.26.0\n' >>$there/constraints.txt
    printf 'ray\nmlflow\n' >$there/excludes.txt
    UV_LINK_MODE="${UV_LINK_MODE:-copy}" .venv/bin/uv pip install --quiet --python $there/bin/python --compile-bytecode \
        --constraints $there/constraints.txt --excludes $there/excludes.txt -r pyproject.toml --extra dev
    echo "$wanted" >$there/installed
fi
$there/bin/python -c 'import torch, torchvision, triton; print(f"torch {torch.__version__}, torchvision {torchvision.__version__}, Triton {triton.__version__}")'
files="tests/simclr tests/pipelines/bench/test_bench.py tests/pipelines/bench/test_speed.py tests/pipelines/evaluation
    tests/pipelines/train/test_checkpoints.py tests/pipelines/train/test_tpu.py"
# The code of this checkout, which is not installed there. Test files stay whole, each with its fixtures.
# shellcheck disable=SC2086
PYTHONPATH="$PWD" exec $there/bin/python -m pytest --numprocesses 2 --dist loadgroup --no-loadscope-reorder -rsfE "$@" $files
