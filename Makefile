# Everything a developer or a curious stranger needs. `make help` lists it.

.DEFAULT_GOAL := help
.PHONY: help setup tools run test check bench faults powerloss soak bank sim mutants model fuzz fuzz-api netns clean clients money
PY := .venv/bin/python
ARGS ?=

help:  ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

setup:  ## everything that run and test need, in .venv
	@config/deploy/setup.sh

run: setup  ## a swarm of three nodes answers a question (rios demo; ARGS="--once --json")
	@.venv/bin/rios demo $(ARGS)

tools:
	@config/deploy/test_tools.sh

# the churn's twelve daemons take the machine for themselves
CHURN := tests/soak/test_churn.py

test: setup tools  ## all tests, shared by WORKERS=3 processes, then the churn; with ARGS (pytest's) what they say, by one
ifdef ARGS
	@$(PY) -m pytest $(ARGS)
else
	@$(PY) -m pytest -n $(or $(WORKERS),3) --ignore $(CHURN); shared=$$?; $(PY) -m pytest $(CHURN) && exit $$shared
endif

check: setup  ## format, lint, types, import contracts
	@$(PY) -m ruff format --check .
	@$(PY) -m ruff check .
	@$(PY) -m mypy
	@.venv/bin/lint-imports

# bench_faults runs these three as well
OF_FAULTS := $(patsubst %,tests/bench/bench_%.py,trust sandbox flood)
BENCHES = $(if $(NAME),tests/bench/bench_$(NAME).py,$(filter-out $(OF_FAULTS),$(wildcard tests/bench/bench_*.py)))

bench: setup  ## benchmarks; NAME=gateway|faults|rpc|generate|ledger|... runs one (ARGS="--parts kill,trust")
	@for file in $(BENCHES); do echo "# $$file" >&2; $(PY) $$file $(ARGS) || exit 1; done

clients: setup  ## LiteLLM and lm-eval, each in an environment of its own, and the tests of every client (1.5 GB)
	@config/deploy/clients.sh
	@$(PY) -m pytest -q tests/interop/test_litellm.py tests/interop/test_lm_eval.py tests/interop/test_openai_node.py \
	    tests/e2e/test_openai_client.py $(ARGS)

netns: setup tools  ## the tests in network namespaces, with what they measured (NAT, partition, loss, delay)
	@$(PY) -m pytest -q -s tests/netns $(ARGS)

faults: setup tools  ## the fault suite, longer than in make test, with what was injected, seen and lost
	@FAULT_ROUNDS=$(or $(ROUNDS),30) FLOOD_SECONDS=6 $(PY) -m pytest -q -s --timeout 1800 tests/faults $(ARGS)

powerloss: setup  ## power cuts on a loop device: nothing acknowledged is lost (ROUNDS=50; needs root)
	@POWER_ROUNDS=$(or $(ROUNDS),50) $(PY) -m pytest -q -s tests/powerloss $(ARGS)

soak: setup  ## churn in a swarm of twelve daemons (MINUTES=60; ARGS="--seed 7 --keep FOLDER")
	@$(PY) -m tests.soak.churn --minutes $(or $(MINUTES),60) $(ARGS)

sim: setup  ## the ledger under 10,000 seeds of faults and lies (SEEDS=100 FIRST_SEED=0; ARGS="--replay 7")
	@$(PY) -m tests.sim.sim --seeds $(or $(SEEDS),10000) --first-seed $(or $(FIRST_SEED),0) $(ARGS)

mutants: setup  ## ways to break the ledger's protocol: what seeds catch, and which need a test of their own (SEEDS=60)
	@$(PY) -m tests.sim.mutants --seeds $(or $(SEEDS),60) $(ARGS)

money: setup  ## the money under kill -9 of gateway and PostgreSQL, then reconciled (REQUESTS=10000; ARGS="--kills 20 --seed 0")
	@$(PY) -m tests.soak.money --requests $(or $(REQUESTS),10000) $(ARGS)

bank: setup  ## the ledger's bank test: 4 witnesses, 3 clients, a thief, kill -9, partitions (MINUTES=5; ARGS="--seed 7")
	@$(PY) -m tests.soak.bank --minutes $(or $(MINUTES),5) $(ARGS)

model: setup  ## every interleaving of certificates, freezes and a committee change, n = 4, f = 1 (ARGS="--scope slot")
	@$(PY) -m tests.model.explorer $(ARGS)

fuzz: setup  ## a million hostile inputs of each kind (ARGS="frames --count 1000 --seed 7")
	@$(PY) -m tests.fuzz.fuzz $(ARGS)

fuzz-api: setup  ## generated requests over the OpenAPI document, with every role (EXAMPLES=100 per route)
	@EXAMPLES=$(or $(EXAMPLES),100) $(PY) -m pytest -q --timeout 3600 tests/e2e/test_openapi.py $(ARGS)

lock:  ## renew requirements.lock from pyproject.toml (needs uv)
	uv pip compile -q --universal --python-version 3.11 --extra dev --generate-hashes --no-annotate --no-header \
	    pyproject.toml -o requirements.lock

clean:  ## remove what setup, tests and benchmarks made here
	rm -rf .venv .bench .cache build dist ./*.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
