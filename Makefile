.DEFAULT_GOAL := help
SHELL := bash
# The orchestrator, and its token; not on make's own command line, which a process list shows
URL ?= http://localhost:8080
# What the example's jobs ask: in a cluster agents know the orchestrator by another name than you do
TARGET_URL ?= $(URL)/health
# The folder of the run to start, and the id of the run to follow or to cancel
DIR ?= example
RUN ?=
export URL TARGET_URL TOKEN DIR RUN
VENV := .venv
PY := $(VENV)/bin/python
UV_VERSION := 0.13.9
# uv does not look into pyenv's folder by itself, and pyenv's shims start only the chosen version.
FIND_PYTHON := PATH="$$PATH$$(printf ':%s' $${PYENV_ROOT:-$$HOME/.pyenv}/versions/3.1[2-9]*/bin)"

help: ## Show this list
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):.*## (.*)/  make \1|\2/' | column -t -s '|'

$(VENV)/ready: requirements.txt requirements-dev.txt
	@command -v uv >/dev/null || test -x .uv/bin/uv || { \
	  echo "Installing uv $(UV_VERSION) into .uv"; python3 -m venv .uv && .uv/bin/pip install -q uv==$(UV_VERSION); } \
	  || { echo "No uv and no python3 with venv to install it: see https://docs.astral.sh/uv/"; exit 1; }
	@uv=$$(command -v uv || echo .uv/bin/uv); \
	$(FIND_PYTHON) $$uv venv -q --clear --python '>=3.12' $(VENV) 2>.uv-error || { \
	  tail -n 3 .uv-error; rm -f .uv-error; \
	  echo "No Python 3.12 or newer was found, and none could be downloaded: install one."; exit 1; }; \
	rm -f .uv-error; $$uv pip install -q --python $(PY) -r requirements-dev.txt
	@touch $@

install: $(VENV)/ready ## Make the environment in .venv

demo: $(VENV)/ready ## Run the example from start to end on this machine and show its results
	@$(PY) example/client.py demo

run: $(VENV)/ready ## Serve on http://localhost:8080 (PORT=) until interrupted
	@HOST=$${HOST:-127.0.0.1} $(PY) -m app

start: $(VENV)/ready ## Post the example, or the run in a folder (DIR=), to URL, and follow it
	@$(PY) example/client.py start "$$DIR"

follow: $(VENV)/ready ## Follow a run (RUN=ID) until it has ended
	@$(PY) example/client.py follow "$$RUN"

status: $(VENV)/ready ## List the runs in flight, and those that have just ended
	@$(PY) example/client.py status

cancel: $(VENV)/ready ## Cancel a run (RUN=ID), or drop what is kept of one that has ended
	@$(PY) example/client.py cancel "$$RUN"

servers: ## Install RabbitMQ and Redis for the tests and the bench, where that can be done
	@command -v redis-server >/dev/null && test -x /usr/lib/rabbitmq/bin/rabbitmq-server || { \
	  command -v apt-get >/dev/null && { \
	    if [ "$$(id -u)" = 0 ]; then as=; else as=sudo; fi; \
	    echo "Installing rabbitmq-server and redis-server"; \
	    $$as apt-get update -q >/dev/null && DEBIAN_FRONTEND=noninteractive \
	    $$as apt-get install -yq --no-install-recommends rabbitmq-server redis-server >/dev/null; } || true; }

test: $(VENV)/ready servers ## Run all tests, against servers that they start themselves
	@$(PY) -m pytest -n 6

test-fast: $(VENV)/ready ## Run the tests that need no server
	@$(PY) -m pytest -m "not servers" -q

soak: $(VENV)/ready servers ## Run random runs under random kills, for SOAK_SECONDS (300)
	@$(PY) test_app.py

bench: $(VENV)/ready servers ## Measure speed and memory, next to the plain way and the floor
	@$(PY) bench.py $(if $(ONLY),--only $(ONLY))

lint: $(VENV)/ready ## Check format, style and types
	@$(VENV)/bin/ruff format --check . && $(VENV)/bin/ruff check . && \
	$(VENV)/bin/mypy *.py example/client.py chart/render.py chart/test_chart.py

clean: ## Delete the environment and all caches
	@rm -rf $(VENV) .uv .pytest_cache .mypy_cache .ruff_cache .hypothesis

-include chart/deploy.mk
.PHONY: help install demo run start follow status cancel servers test test-fast soak bench lint clean
