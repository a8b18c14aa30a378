#!/usr/bin/env bash
# Makes .venv beside this script, with flashvlm-export and what it needs on this device, and checks the bundle.
# PYTHON=/path/to/python chooses another interpreter than python3.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
. ./target.env
python=${PYTHON:-python3}

fail() {
  echo "install.sh: $1" >&2
  shift
  printf '  %s\n' "$@" >&2
  exit 1
}

[ "$(uname -m)" = "$MACHINE" ] ||
  fail "this archive is for another machine" "received: $(uname -m)" "expected: $MACHINE ($DEVICES)"

version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])') ||
  fail "there is no $python" "what to do: sudo apt install python3, or PYTHON=/path/to/python ./install.sh"
case $version in
  3.10 | 3.11 | 3.12) ;;
  *) fail "the runtime does not run on this Python" "received: $version" "expected: 3.10 to 3.12" ;;
esac
if [ -n "$OFFLINE" ] && [ "$version" != "$PYTHON_VERSION" ]; then
  fail "the wheels in this archive are for another Python" "received: $version" "expected: $PYTHON_VERSION"
fi

# JetPack brings TensorRT for its own Python; there is no wheel to install.
if [ -n "$SYSTEM_TENSORRT" ]; then
  tensorrt=$("$python" -c 'import tensorrt; print(tensorrt.__version__)') ||
    fail "JetPack's TensorRT is not installed for $python" "what to do: sudo apt install nvidia-jetpack"
  case $tensorrt in
    "$SYSTEM_TENSORRT".*) ;;
    *) echo "NOTE: TensorRT $tensorrt; JetPack $JETPACK has $SYSTEM_TENSORRT. The engine is built for the one here." >&2 ;;
  esac
fi

"$python" -m venv --system-site-packages .venv ||
  fail "$python cannot make a virtual environment" "what to do: sudo apt install python3-venv"
.venv/bin/python -m pip install --quiet ${OFFLINE:+--no-index --find-links wheels} --requirement requirements.txt
.venv/bin/flashvlm inspect bundle --verify
echo "installed; next: ./build.sh"
