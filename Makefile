# make demo | test | page | lint | coverage | wheel-test | docs | packages | boot-test | kubernetes | lock | clean
#
# Every target sets up what it needs (.ci/setup: Debian packages when root, the virtual environment .venv) and writes
# nothing outside this folder but those packages.
SHELL := /bin/bash
.DELETE_ON_ERROR:
.PHONY: help setup demo bench test page unit kills evict crashpoints soak sim dht-promise containerd lint format coverage coverage-report wheel-test docs packages boot-test kubernetes lock changelog clean

PYTEST = .venv/bin/python -m pytest -p no:cacheprovider -p no:randomly
FAST = tests/unit $(wildcard tests/property)
# What coverage is measured of: all that is quick and runs in the test process. The rest is `--not-measured`.
MEASURED = .venv/bin/coverage erase; .venv/bin/coverage run -m pytest -p no:cacheprovider -p no:randomly -m 'not slow' $(FAST)

help:
	@sed -n 's/^# make /make /p' Makefile; echo 'make setup | unit | format | changelog'

setup:
	@.ci/setup run

demo: setup
	@.venv/bin/p2pgz demo

# COVERAGE=1 measures coverage on the way, for `make coverage-report`.
# The images of the end-to-end tests are built first, so that no test's time limit has to hold the half minute that takes.
test:
	@.ci/setup test
	@[ "$$(id -u)" != 0 ] || .venv/bin/python tests/e2e/lab_images.py .cache >/dev/null || echo 'the images could not be built' >&2
	$(if $(COVERAGE),@$(MEASURED) $(ARGS); status=$$?; $(PYTEST) --not-measured $(ARGS) && exit $$status,$(PYTEST) $(ARGS))

unit:
	@.ci/setup test
	$(PYTEST) $(FAST) $(ARGS)

# 500 seeded kills of nodes and file systems under readers; one line of JSON. A failure prints its seed.
# make kills ARGS="--count 2000 --seed 7"
kills:
	@.ci/setup test
	@.venv/bin/python -m tests.e2e.restart.kills $(ARGS)

# Readers over all of an image in a pool of a tenth of it, in both modes; one line of JSON.
# make evict ARGS="--seconds 600 --seed 7 --mode tree"
evict:
	@.ci/setup test
	@.venv/bin/python -m tests.e2e.restart.evictions $(ARGS)

# Thousands of states that a power failure can leave a pool in, each recovered from; one line of JSON.
# make crashpoints ARGS="--states 20000 --seed 7"
crashpoints:
	@.ci/setup test
	@.venv/bin/python -m tests.unit.pool.crash_points $(ARGS)

# N nodes start the same image in the same second, in simulation; one line of JSON. See docs/explanation/scale.md
# make sim N=1000 ARGS="--seed 7 --dead-share 0.05"
sim: N ?= 1000
sim:
	@.ci/setup test
	@.venv/bin/python -m p2pgz.testing.sim --nodes $(N) $(ARGS)

# Half an hour of mixed load with random faults; memory, descriptors and tasks may not grow. One line of JSON.
# make soak ARGS="--minutes 3 --only paused --density 5"
soak:
	@.ci/setup test
	@.venv/bin/python -m tests.e2e.restart.soak $(ARGS)

# A day in the life of a DHT with 64 real servers and a Go client, instead of 24; needs Go and some minutes
dht-promise:
	@.ci/setup test
	P2PGZ_TEST_DHT_SERVERS=64 $(PYTEST) -q tests/interop/test_dht_peers.py tests/unit/p2p/test_dht_promise.py \
	    -k 'day_later or after_a_day' $(ARGS)

# The status page in a real browser; writes the pictures of the documentation. As root it installs chromium; the driver is
# in no other target, so that nobody else has to fetch it.
page:
	@.ci/setup test
	@command -v chromium >/dev/null || apt-get install -qy --no-install-recommends chromium
	@.venv/bin/python -c 'import playwright' 2>/dev/null || .venv/bin/uv pip install -q --python .venv/bin/python --group page
	P2PGZ_TEST_IMAGES=docs/images $(PYTEST) -q tests/e2e/web $(ARGS)

# Containers of a real containerd (built from Go modules, minutes at first), and its own test suite for snapshotters
containerd:
	@.ci/setup test
	@.ci/containerd
	P2PGZ_TEST_CONTAINERD=1 $(PYTEST) -q tests/e2e/containerd tests/interop/test_snapshotter_suite.py $(ARGS)

# The bars of docs/explanation/performance.md, each beside its yardstick; a quarter of an hour; one line of JSON at the end.
# make bench ARGS="--rows reads,image --scale 0.3 --repeat 5"; cold starts beside stargz-snapshotter: P2PGZ_BENCH_LAB=DIR
bench:
	@.ci/setup test
	@.venv/bin/python -m tests.perf.bars $(ARGS)

lint:
	@.ci/setup test
	@.ci/lint

format: setup
	.venv/bin/ruff check --fix-only -q .
	.venv/bin/ruff format .

# Line and branch coverage of what runs in the test process; core/ has no excuse, it is sans-io. What is slow runs in `test`.
coverage:
	@.ci/setup test
	@$(MEASURED) -q $(ARGS)
	@$(MAKE) --no-print-directory coverage-report

coverage-report:
	.venv/bin/coverage combine -q
	.venv/bin/coverage report --skip-covered
	.venv/bin/coverage report --include='p2pgz/core/*' --fail-under=100 >/dev/null || { echo 'core/ is below 100 %'; exit 1; }

wheel-test:
	@.ci/setup test
	@.ci/wheel-test $(ARGS)

# The generated parts of docs/reference: options, keys, requests. tests/docs fails when they are out of date.
# Then all pages as a book in dist/docs.
docs: setup
	.venv/bin/python .ci/reference.py
	.venv/bin/sphinx-build -q -n -W --keep-going -d dist/doctrees docs dist/docs
	@echo 'dist/docs/index.html'

# dist/packages/*.deb and *.rpm, for hosts with this machine's release or a later one; needs Go, for nfpm
packages: setup
	@.ci/packages

# What `make packages` has made, in a new Debian that boots with systemd; as root, needs debootstrap and systemd-nspawn
boot-test:
	@.ci/setup test
	@.ci/boot-test $(ARGS)

# The manifests in configs/kubernetes from the Helm chart, both checked; needs Go, for helm and kubeconform
kubernetes: setup
	@.ci/kubernetes

# New versions: edit the ranges in pyproject.toml, then this. `LOCK_ARGS=--upgrade` takes the newest of everything.
lock: setup
	.venv/bin/uv pip compile -q --generate-hashes --no-annotate --no-header --no-emit-index-url --no-emit-find-links \
	    --universal --python-version 3.11 --group dev pyproject.toml -o constraints.txt $(LOCK_ARGS)

# The fragments of changelog.d become a section of CHANGELOG.md: make changelog VERSION=0.2.0
changelog: setup
	.venv/bin/python .ci/changelog.py $(VERSION)

clean:
	rm -rf .venv .venv-wheel dist .mypy_cache .ruff_cache .import_linter_cache .hypothesis .coverage .coverage.*
