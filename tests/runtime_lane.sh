#!/usr/bin/env bash
# Tests of runtime, server and evaluation on another Python with ONNX Runtime and the server alone, as on a device: no torch.
# usage: tests/runtime_lane.sh VERSION LANE_DIR   (LANE_DIR/bundle is a bundle to test with)
set -euo pipefail
version=$1
lane=$2
python=$(tests/find_python.sh "$version")
if [ -z "$python" ]; then
  echo "runtime lane: Python $version is not installed here; not tested"
  exit 0
fi
venv=.venv-$version
if [ ! -f "$venv/installed" ] || [ pyproject.toml -nt "$venv/installed" ]; then
  "$python" -m venv "$venv"
  "$venv/bin/python" -m pip install --quiet --constraint constraints.txt --editable '.[ort,serve]' openai pytest-xdist
  touch "$venv/installed"
fi
echo "runtime lane: $("$venv/bin/python" --version)"
FLASHVLM_TEST_BUNDLE=$lane/bundle "$venv/bin/python" -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile \
  tests/runtime tests/server tests/evaluation tests/integration/test_eval_cli.py
