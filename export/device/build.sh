#!/usr/bin/env bash
# Builds the engine on this device. Arguments go to flashvlm build, such as --precision int8 or --profile batch=1.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
. ./target.env
if [ ! -x .venv/bin/flashvlm ]; then
  echo "build.sh: nothing is installed yet; run ./install.sh" >&2
  exit 1
fi
exec .venv/bin/flashvlm build bundle --target "$TARGET" --precision "$PRECISION" "$@"
