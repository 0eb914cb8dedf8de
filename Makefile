# Every command of the project; `make` alone lists them.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python -m
READY := $(VENV)/.ready
# As many tests at a time as there are cores; each process has servers of its own.
WORKERS ?= auto
SOURCES := $(wildcard chronos tests bench docs)

# The value of a variable in .env, without quotes. The file is not included: in a makefile a $ or a #
# within a password would mean something else.
from_env_file = $(shell sed -n 's/^$(1)=//p' .env 2>/dev/null | tail -n 1 | sed "s/^[\"']\(.*\)[\"']$$/\1/")
RESTART_WORKER ?= $(call from_env_file,RESTART_WORKER)
RESTART_SERVER ?= $(call from_env_file,RESTART_SERVER)

.PHONY: help setup demo test test-faults check format bench run-worker run-beat \
	restart-worker restart-server clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-15s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

setup: $(READY) ## Create .venv with everything pinned in it (PYTHON=python3.12)

demo: $(READY) ## Run the migration on an embedded PostgreSQL (ARGS=--keep)
	@$(RUN) chronos demo $(ARGS)

test: $(READY) ## Run the tests on embedded servers (ARGS="-k name", PG_BIN=folder)
	$(RUN) pytest -n $(WORKERS) $(ARGS)

test-faults: $(READY) ## Run the slow tests that stop servers and kill processes
	$(RUN) pytest -m faults -n $(WORKERS) $(ARGS)

check: $(READY) ## Check format, lint, types and spelling
	$(RUN) ruff format --check .
	$(RUN) ruff check .
	$(RUN) mypy $(SOURCES)
	$(VENV)/bin/codespell

format: $(READY) ## Format the code and fix what ruff can fix
	$(RUN) ruff format .
	$(RUN) ruff check --fix .

bench: $(READY) ## Measure speed, WAL and stalls (ROWS=1000000)
	@$(RUN) bench $(if $(ROWS),--rows $(ROWS)) $(ARGS)

# restart-worker leaves a .restart file and ends the process politely; the loop then starts it anew,
# in the same terminal and with the new code.
define run_celery
	@mkdir -p .run && rm -f .run/$(1).restart; \
	while :; do \
		status=0; $(RUN) celery -A chronos.worker $(1) --pidfile=.run/$(1).pid $(2) || status=$$?; \
		rm .run/$(1).restart 2>/dev/null || exit $$status; \
	done
endef

run-worker: $(READY) ## Run the Celery worker in this terminal (ARGS=--concurrency=2)
	$(call run_celery,worker,--loglevel=INFO $(ARGS))

run-beat: $(READY) ## Run Celery beat, the nightly schedule, in this terminal
	$(call run_celery,beat,--loglevel=INFO --schedule=.run/beat-schedule $(ARGS))

restart-worker: ## Restart worker and beat: by RESTART_WORKER, else those of run-worker and run-beat
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
		echo "nothing to restart: no make run-worker or run-beat runs here; set RESTART_WORKER (in .env or" \
			"on the command line) to the command that restarts your worker and beat" >&2; exit 1; \
	fi
endif

restart-server: ## Restart your application's server by RESTART_SERVER
ifneq ($(strip $(RESTART_SERVER)),)
	$(RESTART_SERVER)
else
	@echo "the server is your application's, not chronos': set RESTART_SERVER (in .env or on the" \
		"command line) to the command that restarts it, e.g. RESTART_SERVER='systemctl restart myapp'" >&2; exit 1
endif

clean: ## Remove .venv and every cache
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(READY): requirements.txt requirements-dev.txt
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) is not there: install Python 3.11 or newer, or name one: make setup PYTHON=/path/to/python" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "chronos needs Python 3.11 or newer, and $(PYTHON) is older: make setup PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "$(PYTHON) cannot make a virtual environment: install its venv module (Debian: apt-get install python3-venv)" >&2; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	$(RUN) pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@
