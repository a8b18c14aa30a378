# Everything runs in .venv, which the first target that needs it creates.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
MODEL ?= llava-1.5-7b
WEIGHTS ?= auto
PRECISION ?= fp16
PORT ?= 8000
BUNDLE ?= build/$(MODEL)
OUTPUT ?= build/eval/$(notdir $(BUNDLE))-$(notdir $(basename $(DATA)))
DEMO := build/demo
SCENES := build/scenes
TINY := benchmarks/tiny/checkpoint

# The model that comes with this repository has its own questions, checkpoint and selectors to compare.
ifeq ($(MODEL),flashvlm-tiny)
WEIGHTS := $(TINY)
DATA ?= $(SCENES)/test.jsonl
BUDGETS ?= full,192,128,64,32,16
SELECTOR ?= all
POSITIONS ?= contiguous original
PICTURES := $(SCENES)/few/test
endif
POSITIONS ?= contiguous

.DEFAULT_GOAL := help
.PHONY: help install demo serve live test check lint types unit runtime-lanes device-lane page-lane llamacpp-lane vllm-lane test-gpu onnx engine report eval bench bench-export bench-start bench-parity clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:[^#]*## /\t/' | expand -t 16

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

install: $(VENV)/installed ## create .venv with everything that development needs

# Bundles are made again when the code that makes them changes.
EXPORTER := $(shell find flashvlm_export export tests/helpers/tiny_llava.py -name '*.py')

demo: $(DEMO)/bundle/manifest.json ## a picture and seven questions through the exported graph, beside PyTorch
	$(BIN)/python examples/demo.py $(DEMO)/bundle $(TINY) --heatmap $(DEMO)/kept.png

serve: $(DEMO)/bundle/manifest.json ## flashvlm-tiny at http://127.0.0.1:8000, a page and an OpenAI-compatible API (PORT)
	$(BIN)/flashvlm serve $(DEMO)/bundle --positions original --port $(PORT)

live: $(DEMO)/bundle/manifest.json ## a video that it makes, and a standing question answered about its newest frame
	$(BIN)/python examples/moving_scene.py $(DEMO)/clip.mp4
	$(BIN)/flashvlm live $(DEMO)/bundle --source $(DEMO)/clip.mp4 --positions original --output $(DEMO)/live.mp4 --overwrite \
	  --prompt "Is the red circle on the left or on the right?"

$(DEMO)/bundle/manifest.json: $(VENV)/installed $(EXPORTER) $(TINY)/model.safetensors
	$(BIN)/flashvlm export flashvlm-tiny --output $(DEMO)/bundle --overwrite --precision fp32 --split flashvlm-soft

# Pictures and questions of benchmarks/tiny: 1,050 to measure accuracy, a few for reports, 64 to calibrate with.
$(SCENES)/test.jsonl: count := 1050
$(SCENES)/few/test.jsonl: count := 14
$(SCENES)/calibration/dev.jsonl: count := 64
$(SCENES)/test.jsonl $(SCENES)/few/test.jsonl $(SCENES)/calibration/dev.jsonl: benchmarks/tiny/scenes.py benchmarks/tiny/dataset.py $(VENV)/installed
	$(BIN)/python benchmarks/tiny/dataset.py $(@D) --split $(basename $(@F)) --count $(count) --overwrite

test: lint types unit runtime-lanes device-lane ## lint, types, tests; runtime on Python 3.10 and 3.12 where installed

check: test ## exactly what CI runs

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/installed
	$(BIN)/mypy

# In several processes, each of which takes whole files.
unit: $(VENV)/installed
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

runtime-lanes: build/lane/bundle/manifest.json
	@for version in 3.10 3.12; do tests/runtime_lane.sh $$version build/lane || exit 1; done

device-lane: build/lane/bundle/manifest.json
	tests/device_lane.sh "$(abspath $(BIN))/flashvlm" build/lane

build/lane/bundle/manifest.json: $(VENV)/installed $(EXPORTER)
	$(BIN)/python tests/helpers/tiny_llava.py build/lane/checkpoint
	$(BIN)/flashvlm export build/lane/checkpoint --output build/lane/bundle --overwrite --engine-check required \
	  --split divprune,cdpruner

page-lane: $(VENV)/installed ## the page in headless Chromium (Debian: apt-get install chromium); fails without it
	FLASHVLM_REQUIRE_BROWSER=1 $(BIN)/python -m pytest tests/server/test_page.py tests/server/test_live_page.py

# llama.cpp is compiled, some minutes on two cores, for this machine and without its tools.
llamacpp-lane: $(VENV)/installed ## llama.cpp, compiled into .venv, and the tests that need it
	CMAKE_ARGS="-DLLAMA_BUILD_TOOLS=OFF -DLLAVA_BUILD=OFF" \
	  $(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[llamacpp]'
	$(BIN)/python -m pytest tests/runtime/test_llm_llamacpp.py tests/integration/test_same_answer.py -k llamacpp

vllm-lane: build/lane/bundle/manifest.json ## a vLLM server on loopback, in .venv-vllm, and the tests that ask it
	tests/vllm_lane.sh "$(abspath $(BIN))/python" build/lane

# In an environment of its own: onnxruntime and onnxruntime-gpu overwrite each other.
test-gpu: build/lane/bundle/manifest.json ## tests that need an NVIDIA GPU; fails without one
	test -f .venv-gpu/installed || { $(PYTHON) -m venv .venv-gpu && \
	  .venv-gpu/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[cuda,rtx]' pytest && \
	  touch .venv-gpu/installed; }
	FLASHVLM_REQUIRE_GPU=1 FLASHVLM_TEST_BUNDLE=build/lane/bundle .venv-gpu/bin/python -m pytest tests/gpu

onnx: $(VENV)/installed ## export MODEL (WEIGHTS=auto|DIR|random) to BUNDLE
	$(BIN)/flashvlm export $(MODEL) --weights $(WEIGHTS) --output $(BUNDLE) $(if $(SELECTOR),--split $(SELECTOR))

# PRECISION=fp16|int8; TARGET: a row of flashvlm targets, without it the GPU at hand. A bundle that stands is used. Where
# only the device itself can build, what comes out is the archive for it.
engine: $(VENV)/installed ## engine of MODEL in BUNDLE, exported and calibrated first where needed (PRECISION, TARGET)
	$(if $(TARGET),$(BIN)/flashvlm targets $(TARGET))
	test -f $(BUNDLE)/manifest.json || \
	  $(BIN)/flashvlm export $(MODEL) --weights $(WEIGHTS) --output $(BUNDLE) --precision fp16 \
	    $(if $(SELECTOR),--split $(SELECTOR))
	test $(PRECISION) != int8 || test -f $(BUNDLE)/visual.int8.onnx || $(BIN)/flashvlm calibrate $(BUNDLE)
	$(BIN)/flashvlm build $(BUNDLE) --precision $(PRECISION) $(if $(TARGET),--target $(TARGET)) --pack --overwrite

EXPORT_ONCE = test -f $(BUNDLE)/manifest.json || \
  $(BIN)/flashvlm export $(MODEL) --weights $(WEIGHTS) --output $(BUNDLE) $(if $(SELECTOR),--split $(SELECTOR))

# What make eval has found joins the report.
EVALUATED = $(firstword $(wildcard $(OUTPUT)/results.json $(OUTPUT)/flashvlm/results.json))

report: $(VENV)/installed $(addsuffix .jsonl,$(PICTURES)) ## parity and latency of MODEL against PyTorch (WEIGHTS=DIR), exported first where needed
	@test -f "$(WEIGHTS)/config.json" || { echo "make report: WEIGHTS=DIR has to name a checkpoint, to compare with" >&2; exit 2; }
	$(EXPORT_ONCE)
	$(BIN)/flashvlm report $(BUNDLE) --checkpoint $(WEIGHTS) --output $(BUNDLE)-report \
	  $(if $(PICTURES),--images $(PICTURES) --prompts $(PICTURES).txt) $(patsubst %/results.json,--eval %,$(EVALUATED))

# BUDGETS: a list such as full,128,32. SELECTOR: a list, or all, to compare. POSITIONS: contiguous, original or, with
# SELECTOR, both. What is answered is kept in OUTPUT and not asked again.
eval: $(VENV)/installed $(filter $(SCENES)/%,$(DATA)) ## accuracy of MODEL in BUNDLE, exported first where needed, on DATA (BUDGETS, SELECTOR, POSITIONS, OUTPUT)
	$(if $(DATA),,$(error DATA=FILE.jsonl is missing: flashvlm dataset makes one from the files of a benchmark))
	$(EXPORT_ONCE)
	for positions in $(POSITIONS); do \
	  $(BIN)/flashvlm eval $(BUNDLE) --data $(DATA) --output $(OUTPUT) $(if $(BUDGETS),--budgets $(BUDGETS)) \
	    $(if $(SELECTOR),--selector $(SELECTOR)) --positions $$positions || exit 1; \
	done

bench: $(VENV)/installed ## full-size latency of the fused graph against PyTorch
	$(BIN)/python benchmarks/visual_latency.py

bench-export: $(VENV)/installed ## peak memory of exporting a full-size checkpoint
	$(BIN)/python benchmarks/export_memory.py

bench-start: $(VENV)/installed build/lane/bundle/manifest.json ## import and open time of the runtime
	$(BIN)/python benchmarks/start_up.py build/lane/bundle

bench-parity: build/parity/visual.int8.onnx $(SCENES)/few/test.jsonl ## each precision of flashvlm-tiny against PyTorch
	$(BIN)/flashvlm report build/parity --checkpoint $(TINY) --images $(SCENES)/few/test --prompts $(SCENES)/few/test.txt \
	  --max-images 14 --budgets 128,64,32 --rounds 5 --max-tokens 8 --output build/parity-report

build/parity/visual.int8.onnx: $(VENV)/installed $(EXPORTER) $(TINY)/model.safetensors $(SCENES)/calibration/dev.jsonl
	$(BIN)/flashvlm export flashvlm-tiny --output build/parity --overwrite --diversity farthest
	$(BIN)/flashvlm calibrate build/parity --images $(SCENES)/calibration/dev --prompts $(SCENES)/calibration/dev.txt --tolerance none

clean: ## remove what the targets above made, .venv included
	rm -rf build dist $(VENV) .venv-3.* .venv-gpu .venv-vllm
