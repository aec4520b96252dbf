# Every command of the project. `make serve` and `make test` need Python 3.11 or newer and make .venv themselves.

PY := .venv/bin/python
CODE := $(wildcard service model training benchmarks scripts tests)

# Passed on only when given to make: some shells and conda export HOST, some platforms PORT.
given = $(if $(filter command,$(origin $(1))),--$(2) '$($(1))')

.NOTPARALLEL:
.PHONY: help serve test test-ray train lint sanitize bench bench-interop bench-peers prove evidence walkthrough dashboards picture traffic no-python

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' Makefile
	@echo
	@echo "  ARGS='...' is handed to the (first) program behind a command but lint and picture, PYTHON=/path/to/python3.12 makes .venv with that Python,"
	@echo "  TORCH=cpu installs the small PyTorch without CUDA (Linux; heeded when PyTorch is first installed)."

serve: .venv/serve.stamp ## serve the model on http://127.0.0.1:8000 (PORT=9000 HOST=0.0.0.0 CHECKPOINT=DIR)
	@exec $(PY) -m service $(call given,HOST,host) $(call given,PORT,port) $(call given,CHECKPOINT,checkpoint) $(ARGS)

test: .venv/test.stamp ## run the tests, and list what was skipped and why
	@exec $(PY) -m pytest --numprocesses auto --dist loadfile $(ARGS)

test-ray: .venv/ray.stamp ## run the tests of replicas on Ray, which is installed for it, three minutes
	@exec $(PY) -m pytest tests/scale -m ray $(ARGS)

train: .venv/train.stamp ## train a model in a few minutes (ARGS='--preset shakespeare' for the shipped one)
	@exec $(PY) -m training train --preset quick $(ARGS)

lint: .venv/lint.stamp ## ruff, mypy, the import direction, Dockerfile, compose files and dashboards
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy $(CODE)
	@PYTHONPATH=. .venv/bin/lint-imports
	@.venv/bin/hadolint Dockerfile
	@.venv/bin/docker-compose -f docker-compose.yml --profile demo config --quiet
	@.venv/bin/docker-compose -f docker-compose.yml -f docker-compose.gpu.yml --profile demo config --quiet
	@$(PY) -m scripts.dashboards --check

sanitize: .venv/test.stamp ## run the native step under AddressSanitizer, UBSan and ThreadSanitizer, a minute
	@exec $(PY) -m pytest tests/service/engine/test_sanitizers.py -v $(ARGS)

bench: .venv/test.stamp ## measure speed, records dated in benchmarks/results
	@$(PY) -m benchmarks $(ARGS)
	@$(PY) -m benchmarks.training
	@$(PY) -m benchmarks.counting
	@$(PY) -m benchmarks.native

bench-peers: .venv/train.stamp ## race llama.cpp (compiled for it, ten minutes), vLLM and transformers over HTTP (ARGS='--rounds 1')
	@exec $(PY) -m benchmarks.race $(ARGS)

bench-interop: .venv/train.stamp ## compare greedy text with llama.cpp, which is installed for it (ARGS='--peers vllm transformers')
	@exec $(PY) -m benchmarks.interop $(ARGS)

# A run of a part (ARGS='-k kill') renews the lines of its claims alone.
prove: .venv/test.stamp ## every claim at full size, on a scoreboard and in docs/evidence.md
	@exec $(PY) -m pytest -q -o console_output_style=classic -o faulthandler_timeout=1800 --prove --evidence=docs/evidence.md $(ARGS)

evidence: .venv/train.stamp ## write the report of the shipped checkpoint anew: card, pictures, report.json
	@exec $(PY) -m training report $(ARGS)

walkthrough: .venv/test.stamp ## run docs/walkthrough.py and make its notebook, two minutes
	@exec $(PY) scripts/walkthrough.py $(ARGS)

dashboards: .venv/test.stamp ## write Grafana's dashboards anew, after a change in scripts/dashboards
	@exec $(PY) -m scripts.dashboards $(ARGS)

picture: .venv/test.stamp ## take the README's pictures of a running service's page (URL=http://127.0.0.1:8000)
	@PYTHONPATH=. $(PY) scripts/picture.py $(or $(URL),http://127.0.0.1:8000) docs

traffic: .venv/serve.stamp ## keep a running service busy until Ctrl-C (URL=http://127.0.0.1:9000 ARGS='--seconds 60')
	@exec $(PY) scripts/traffic.py $(call given,URL,url) $(ARGS)

.venv/serve.stamp: NEEDS := run
.venv/train.stamp: NEEDS := run train
.venv/test.stamp: NEEDS := run train test
.venv/ray.stamp: NEEDS := run train test ray
.venv/lint.stamp: NEEDS := run train test tools

# A .venv whose Python went away with a system upgrade is made anew, whatever its stamps say.
.venv/%.stamp: pyproject.toml constraints.txt $(if $(realpath $(PY)),,no-python)
	@PYTHON='$(PYTHON)' TORCH='$(TORCH)' bash scripts/install.sh $(NEEDS)
	@touch $@
