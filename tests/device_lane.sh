#!/usr/bin/env bash
# The way to a Jetson, as far as it goes without one: pack, unpack, install into Python 3.10 from the wheel, refuse to
# build here, answer with ONNX Runtime. `uname` and JetPack's tensorrt package are stand-ins; all else is real.
# usage: tests/device_lane.sh FLASHVLM LANE_DIR   (LANE_DIR/bundle is a bundle to pack)
set -euo pipefail
flashvlm=$1
lane=$2
python=$(tests/find_python.sh 3.10)
if [ -z "$python" ]; then
  echo "device lane: Python 3.10 is not installed here; not tested"
  exit 0
fi
export PIP_CONSTRAINT=$PWD/constraints.txt
rm -rf "$lane/device"
mkdir -p "$lane/device/tools"
printf '#!/bin/sh\necho aarch64\n' > "$lane/device/tools/uname"
chmod +x "$lane/device/tools/uname"
echo '__version__ = "10.3.0"' > "$lane/device/tools/tensorrt.py"
"$flashvlm" pack "$lane/bundle" --target orin-agx --precision fp16 --output "$lane/device/packed.tar"
cd "$lane/device"
tar -xf packed.tar
cd bundle-orin-agx
PATH=$PWD/../tools:$PATH PYTHONPATH=$PWD/../tools PYTHON=$python ./install.sh
if ./build.sh 2> refused.txt; then
  echo "device lane: an engine for Orin was built without one" >&2
  exit 1
fi
grep -q "has to be built on that device" refused.txt
.venv/bin/python -c 'from PIL import Image; Image.linear_gradient("L").save("photo.png")'
.venv/bin/flashvlm run bundle --image photo.png --prompt "What is this?" --budget 4 --max-tokens 4 --json > answer.json
.venv/bin/python - <<'PY'
import importlib.util, json

(answer,) = json.load(open("answer.json"))["answers"]
assert (answer["kept_tokens"], answer["new_tokens"]) == (4, 4), answer
assert importlib.util.find_spec("torch") is None
PY
echo "device lane: packed, installed and run on $("$python" --version)"
