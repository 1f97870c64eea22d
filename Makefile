# Needs Python 3.11 or newer, git and make; everything else is installed into .venv.
#
#   make setup   .venv with fxopt (editable) and all extras but bench, at the versions of constraints.txt
#   make test    ruff, mypy, pytest                     make test JOBS=4 PYTEST_ARGS='-k fold'
#   make demo    the tour: docs/demo.py
#   make tutorial   docs/tutorial.md and its pictures: docs/make_tutorial.py
#   make sweep   every model of the zoo: tests/sweep.py
#   make catalogue   what the passes leave of well-known models: tests/catalogue.py
#   make bench   runtimes against each other, docs/benchmarks.md: docs/make_benchmarks.py     BENCH_ARGS='--only resnet'
#   make ablation   what each step is worth in time, docs/ablation.md: docs/make_ablation.py     BENCH_ARGS as above
#   make profile   where the time goes: docs/make_profile.py
#   make lowering   which library multiplies what: docs/make_lowering.py
#   make onnx   the rewritten graphs in ONNX Runtime, docs/exporting.md: docs/make_onnx.py     ONNX_ARGS='--only resnet'
#   make sync   what one collective instead of two is worth: docs/make_sync.py
#   make clean   what tools left behind; .venv stays

PYTHON ?= python3
JOBS ?= 2
PYTEST_ARGS ?=
BENCH_ARGS ?=
ONNX_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PEERS := $(VENV)/.peers

.PHONY: setup test demo tutorial sweep catalogue bench ablation profile lowering onnx sync clean
.DELETE_ON_ERROR:

setup: $(STAMP)

# torch goes first and alone, at exactly the constrained version: torchvision and timm then take the one that is there,
# and no range can bring in another build of it.
$(STAMP): pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --constraint constraints.txt "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[dev,onnx,zoo,demo]'
	touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "fxopt needs Python 3.11 or newer; name one: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

test: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/mypy --strict fxopt passes
	$(BIN)/pytest -n $(JOBS) --dist worksteal $(PYTEST_ARGS)

demo: $(STAMP)
	$(BIN)/python docs/demo.py

tutorial: $(STAMP)
	$(BIN)/python docs/make_tutorial.py

sweep: $(STAMP)
	$(BIN)/python tests/sweep.py

catalogue: $(STAMP)
	$(BIN)/python tests/catalogue.py

bench: $(PEERS)
	$(BIN)/python docs/make_benchmarks.py $(BENCH_ARGS)

ablation: $(STAMP)
	$(BIN)/python docs/make_ablation.py $(BENCH_ARGS)

profile: $(STAMP)
	$(BIN)/python docs/make_profile.py

lowering: $(STAMP)
	$(BIN)/python docs/make_lowering.py

onnx: $(STAMP)
	$(BIN)/python docs/make_onnx.py $(ONNX_ARGS)

sync: $(STAMP)
	$(BIN)/python docs/make_sync.py

# The runtimes that fxopt is measured against; nothing else needs them.
$(PEERS): $(STAMP)
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[bench]'
	touch $@

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name $(VENV) -prune -o -type d -name __pycache__ -exec rm -rf {} +
