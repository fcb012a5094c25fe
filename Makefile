# make demo: models learn to read, to draw and to move scanned digits, and are examined.  make test: the tests.
# make drawings: the second and third of these alone.  make deep: tests that take minutes.  make test-mesh: every plan on
# real ranks.  make test-ascend: every family lowered for Ascend NPUs by torchair and computed from its graph, and the
# Ascend C kernels in the host emulator, every shape and seeded bug.
# make bench: this machine's limits, ours and peers in turn, also on a GPU if there is one (ARGS=--quick: in ten minutes,
# on CPU alone).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN := runs/demo
ASCEND := $(CURDIR)/.venv-ascend
export TORCHINDUCTOR_CACHE_DIR := $(CURDIR)/.cache/inductor
export TMPDIR := $(CURDIR)/.cache/tmp
export HF_HUB_OFFLINE := 1
# threads that wait must not spin: beside any other process that makes a step fifty times slower
export OMP_WAIT_POLICY := passive

.PHONY: demo drawings test deep test-mesh test-ascend ascend-families ascend-rest bench clean
.DELETE_ON_ERROR:

$(VENV)/core: pyproject.toml
	mkdir -p $(TMPDIR)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade "pip>=25.1"
	$(BIN)/python -m pip install -q torch==2.13.0
	$(BIN)/python -m pip install -q -e . --group demo
	touch $@

$(VENV)/test: $(VENV)/core
	$(BIN)/python -m pip install -q --group dev --group oracle
	$(BIN)/python -m pip install -q --no-deps --target $(VENV)/torchvision torchvision==0.28.0
	touch $@

demo: $(VENV)/core
	mkdir -p $(TMPDIR)
	rm -rf $(RUN)
	PYTHON=$(BIN)/python sh programs/demo.sh $(RUN)

drawings: $(VENV)/core
	mkdir -p $(TMPDIR)
	rm -rf runs/drawings
	PYTHON=$(BIN)/python sh programs/drawings.sh runs/drawings

test: $(VENV)/test
	mkdir -p $(TMPDIR)
	$(BIN)/python -m pytest $(ARGS)

deep: $(VENV)/test
	mkdir -p $(TMPDIR)
	$(BIN)/python -m pytest -m deep $(ARGS)

test-mesh: $(VENV)/test
	mkdir -p $(TMPDIR)
	$(BIN)/python tests/mesh_ranks.py

test-ascend: $(VENV)/test .venv-ascend/ready
	mkdir -p $(TMPDIR)
	OMP_NUM_THREADS=1 $(MAKE) --no-print-directory -j2 ascend-families ascend-rest

# by the real torchair, beside each other on two cores
GE := LD_LIBRARY_PATH=$(ASCEND)/stubs TORCH_DEVICE_BACKEND_AUTOLOAD=0 $(ASCEND)/bin/python -m pytest -m "deep or not deep"

ascend-families:
	$(GE) tests/test_ge.py

ascend-rest:
	$(GE) tests/test_ge_ours.py tests/test_ge_meshes.py tests/test_devices.py
	$(BIN)/python -m pytest tests/test_ascend_kernels.py -s -m "deep or not deep"

# torch_npu and stand-ins for CANN's libraries, apart from the main environment, where torch would not start with them
.venv-ascend/ready: pyproject.toml mmfunc/kernels/ge/stubs.py mmfunc/kernels/ge/stubs.cpp
	mkdir -p $(TMPDIR)
	test -x $(ASCEND)/bin/python || $(PYTHON) -m venv $(ASCEND)
	echo '*' > $(ASCEND)/.gitignore
	$(ASCEND)/bin/python -m pip install -q --upgrade "pip>=25.1"
	$(ASCEND)/bin/python -m pip install -q torch==2.13.0 torch-npu==2.13.0 protobuf scipy decorator attrs psutil pyyaml "pytest>=8" -e .
	$(ASCEND)/bin/python mmfunc/kernels/ge/stubs.py $(ASCEND)/stubs
	touch $@

# alone on the machine a thread that waits spins for some 100 us before it sleeps: a step of decoding has 400 such waits
bench: $(VENV)/test
	mkdir -p $(TMPDIR)
	$(BIN)/python -m pip install -q --group bench
	env -u OMP_WAIT_POLICY GOMP_SPINCOUNT=30000 OMP_NUM_THREADS=2 $(BIN)/python benchmarks/suite.py $(ARGS)

clean:
	rm -rf $(VENV) .cache runs build *.egg-info
