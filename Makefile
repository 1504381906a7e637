# Two commands do everything on a fresh machine; each makes the environment it needs (once).
#   make demo      the AN4 recipe: speech recognition with an fp and a packed 2-bit LM, ends with a table
#   make test      the test suite on the newest host (Python 3.11, ESPnet 202511, torch 2.13)
#   make sanitize  the kernel tests under the address, undefined-behaviour and thread sanitizers
#   make drills    kills and full disks at random moments, longer than in make test: MPQ_DRILL_SECONDS=60 for each drill
#   make fuzz      readers (atheris) and C entry points (libFuzzer) under random input, MPQ_FUZZ_SECONDS each
#   make bench     speed, load time and memory against ESPnet, PyTorch and ONNX Runtime: tests/bench/RESULTS.md
#   make test-k2   the same suite on Python 3.10, torch 1.13.1, k2 1.23.4, ESPnet 202412
# Local data instead of downloads: MPQ_DATA_ROOT=/path/to/data make test
SHELL := /bin/bash
.PHONY: demo test bench drills sanitize test-k2 lint venv venv-k2 has-python-3.10 clean

PYTEST_ARGS ?=
BENCH_ARGS ?=

venv:
	@conf/env/make_venv.sh .venv 3.11 conf/env/newest.txt

venv-k2:
	@conf/env/make_venv.sh .venv-k2 3.10 conf/env/k2.txt

demo: venv
	cd egs/an4/mpq1 && ./run.sh --python "$(CURDIR)/.venv/bin/python"

test: venv
	.venv/bin/python -m pytest $(PYTEST_ARGS)

# The columns of ONNX Runtime need: .venv/bin/python -m pip install onnx onnxruntime
# A part of it: make bench BENCH_ARGS="--parts latency --sizes 2x650 --threads 1"; the rows of earlier
# runs stay (build/bench/results.json). Whole decoding of an experiment: tests/bench/bench_decode.py.
bench: venv
	.venv/bin/python tests/bench/bench_kernels.py --markdown tests/bench/RESULTS.md $(BENCH_ARGS)

# LD_PRELOAD because Python itself is not built with the sanitizer; its leaks are not ours. It keeps freed memory, so
# the test of resident memory says nothing here. MPQ_N_EXAMPLES=10000: the long run.
sanitize: venv
	.venv/bin/python -m espnet_mpq.kernels.build --sanitize --output build/sanitize/libmpq_kernels.so
	MPQ_KERNEL_LIBRARY="$(CURDIR)/build/sanitize/libmpq_kernels.so" MPQ_N_EXAMPLES=$${MPQ_N_EXAMPLES:-2000} \
	  LD_PRELOAD="$$($${CXX:-c++} -print-file-name=libasan.so)" ASAN_OPTIONS=detect_leaks=0 \
	  .venv/bin/python -m pytest tests/kernels tests/runtime --timeout 0 \
	  --deselect tests/runtime/test_memory.py::test_resident_memory_is_about_one_copy $(PYTEST_ARGS)
	$${CXX:-c++} -std=c++17 -O1 -g -pthread -fsanitize=thread -ffp-contract=off -o build/sanitize/races \
	  tests/kernels/csrc/races.cpp $(addprefix espnet_mpq/kernels/csrc/,matrix.cpp products.cpp lstm_layers.cpp lstm_lm.cpp \
	  memory.cpp threads.cpp path_scalar.cpp)
	build/sanitize/races

# Every round prints its seed; MPQ_DRILL_SEED=N PYTEST_ARGS="-k killed" repeats one, MPQ_DRILL_N=20: so many rounds.
# Mounting small disks needs root; without it files are limited in size instead.
drills: venv
	MPQ_DRILL_SECONDS=$${MPQ_DRILL_SECONDS:-60} .venv/bin/python -m pytest tests/drills -s --timeout 0 $(PYTEST_ARGS)

# Coverage-guided where atheris and clang are there, and says so where not; short forms run in make test.
fuzz: venv
	tests/fuzz/fuzz.sh "$(CURDIR)/.venv/bin/python"

test-k2: venv-k2
	.venv-k2/bin/python -m pytest $(PYTEST_ARGS)

lint: venv
	.venv/bin/ruff check espnet_mpq tests egs setup.py

has-python-3.10:
	@conf/env/make_venv.sh --find 3.10 > /dev/null

clean:
	rm -rf .venv .venv-k2 build *.egg-info
