# Every command of the project; `make` alone lists them.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python -m
INSTALL := $(RUN) pip install --quiet --disable-pip-version-check
# Stamps: touched once all packages, or those of a deployment, are installed.
READY := $(VENV)/.ready
BENCH_READY := $(VENV)/.bench-ready
RUNTIME := $(VENV)/.runtime
# One test process per core, each with its own servers.
WORKERS ?= auto
SOURCES := $(wildcard chronos tests bench docs)

# The value of a variable in .env, without quotes. Not `include .env`: make would interpret a $ or a #
# in a password.
from_env_file = $(shell sed -n 's/^$(1)=//p' .env 2>/dev/null | tail -n 1 | sed "s/^[\"']\(.*\)[\"']$$/\1/")
RESTART_WORKER ?= $(call from_env_file,RESTART_WORKER)
RESTART_SERVER ?= $(call from_env_file,RESTART_SERVER)

.PHONY: help setup setup-runtime demo test test-faults check check-deploy format bench bench-peers bench-scale \
	docs run-worker run-beat \
	restart-worker restart-server clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-15s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

setup: $(READY) ## Create or update .venv with all pinned packages (PYTHON=python3.12)

setup-runtime: $(RUNTIME) ## The same for a deployment: only what the worker and commands need

demo: $(READY) ## Run the migration on an embedded PostgreSQL (ARGS=--keep)
	@$(RUN) chronos demo $(ARGS)

test: $(READY) ## Run the tests on embedded servers (ARGS="-k name", PG_BIN=folder)
	$(RUN) pytest -n $(WORKERS) $(ARGS)

test-faults: $(READY) ## Run the slow tests that stop servers and kill processes
	$(RUN) pytest -m faults -n $(WORKERS) $(ARGS)

check: check-deploy ## Check format, lint, types, spelling and deploy/
	$(RUN) ruff format --check .
	$(RUN) ruff check .
	$(RUN) mypy $(SOURCES)
	$(VENV)/bin/codespell

# systemdlint asks for Delegate=, which is for units that manage their own cgroups, and takes a umask for a file mode.
# systemd-analyze is stricter, but not on every machine; the programs named in the units need not be on this one.
UNITS := $(wildcard deploy/systemd/*.service deploy/systemd/*.timer)
check-deploy: $(READY) ## Lint deploy/ and .github/ and check them against schemas
	$(VENV)/bin/yamllint --strict deploy .github .pre-commit-config.yaml .yamllint.yaml
	$(VENV)/bin/hadolint --failure-threshold info deploy/Dockerfile
	$(VENV)/bin/check-jsonschema --builtin-schema vendor.compose-spec deploy/compose.yaml
	$(VENV)/bin/kubernetes-validate --strict $(wildcard deploy/kubernetes/*.yaml)
	$(VENV)/bin/check-jsonschema --builtin-schema vendor.github-issue-forms $(filter-out %/config.yml,$(wildcard .github/ISSUE_TEMPLATE/*.yml))
	$(VENV)/bin/check-jsonschema --builtin-schema vendor.github-issue-config .github/ISSUE_TEMPLATE/config.yml
	$(VENV)/bin/pre-commit validate-config
	@echo "systemdlint $(UNITS)"; \
	found=$$($(VENV)/bin/systemdlint --norootfs $(UNITS) 2>&1); code=$$?; \
	! echo "$$found" | grep -vE '\[Security\.(Delegate|UMaskOW)\]|^$$' && [ $$code -le 1 ]
	@if command -v systemd-analyze >/dev/null; then \
		echo "systemd-analyze verify $(UNITS)"; \
		copy=$$(mktemp -d) && trap 'rm -r "$$copy"' EXIT && \
		for unit in $(UNITS); do sed 's|=/opt/chronos/bin/[a-z]*|=/bin/true|' $$unit >"$$copy/$${unit##*/}"; done && \
		! systemd-analyze verify "$$copy"/* 2>&1 | grep chronos-; \
	else echo "systemd-analyze is not installed here: only systemdlint has checked the units"; fi

format: $(READY) ## Format the code and fix what ruff can fix
	$(RUN) ruff format .
	$(RUN) ruff check --fix .

docs: $(READY) ## Write docs/API.md from the docstrings
	$(RUN) docs.make_api

bench: $(READY) ## Measure speed, WAL and stalls (ROWS=1000000)
	@$(RUN) bench $(if $(ROWS),--rows $(ROWS)) $(ARGS)

bench-peers: $(BENCH_READY) ## Compare with pgslice, pg_partman, pg-partsmith (ROWS=500000)
	@$(RUN) bench.peers $(if $(ROWS),--rows $(ROWS)) $(ARGS)

bench-scale: $(READY) ## Migrate a very large table; run it again to resume (ROWS=72000000)
	@$(RUN) bench.scale $(if $(ROWS),--rows $(ROWS)) $(ARGS)

# restart-worker creates a .restart file and sends SIGTERM; the loop then starts the process again,
# in the same terminal and with the new code.
define run_celery
	@mkdir -p .run && rm -f .run/$(1).restart; \
	while :; do \
		status=0; $(RUN) celery -A chronos.worker $(1) --pidfile=.run/$(1).pid $(2) || status=$$?; \
		rm .run/$(1).restart 2>/dev/null || exit $$status; \
	done
endef

run-worker: $(RUNTIME) ## Run the Celery worker in this terminal (ARGS=--concurrency=2)
	$(call run_celery,worker,--loglevel=INFO $(ARGS))

run-beat: $(RUNTIME) ## Run Celery beat, the nightly schedule, in this terminal
	$(call run_celery,beat,--loglevel=INFO --schedule=.run/beat-schedule $(ARGS))

restart-worker: ## Restart worker and beat: RESTART_WORKER, or those of run-worker and run-beat
ifneq ($(strip $(RESTART_WORKER)),)
	$(RESTART_WORKER)
else
	@restarted=; \
	for name in worker beat; do \
		pid=$$(cat .run/$$name.pid 2>/dev/null) || continue; \
		ps -p $$pid -o args= | grep -q chronos.worker || continue; \
		touch .run/$$name.restart && kill -TERM $$pid && restarted="$$restarted $$name"; \
	done; \
	if [ -n "$$restarted" ]; then echo "restarting:$$restarted"; else \
		echo "nothing to restart: make run-worker and run-beat are not running here; set RESTART_WORKER (in .env or" \
			"on the command line) to the command that restarts your worker and beat" >&2; exit 1; \
	fi
endif

restart-server: ## Restart your application's server with RESTART_SERVER
ifneq ($(strip $(RESTART_SERVER)),)
	$(RESTART_SERVER)
else
	@echo "the server belongs to your application, not to chronos: set RESTART_SERVER (in .env or on the" \
		"command line) to the command that restarts it, e.g. RESTART_SERVER='systemctl restart myapp'" >&2; exit 1
endif

clean: ## Remove all caches; .venv stays, as a worker may run from it
	rm -rf .mypy_cache .pytest_cache .ruff_cache
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

# Packages are installed in place: a worker may be running from $(VENV), so no target clears it.
$(READY): requirements-dev.txt $(RUNTIME)
	$(INSTALL) -r requirements-dev.txt
	@touch $@

$(RUNTIME): requirements.txt | $(VENV)/bin/pip
	$(INSTALL) -r requirements.txt
	@touch $@

$(VENV)/bin/pip:
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) was not found: install Python 3.11 or newer, or name one: make setup PYTHON=/path/to/python" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "chronos needs Python 3.11 or newer, and $(PYTHON) is older: make setup PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "$(PYTHON) cannot create a virtual environment: install its venv module (Debian: apt-get install python3-venv)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(BENCH_READY): $(READY) requirements-bench.txt
	$(INSTALL) -r requirements-bench.txt
	@touch $@
