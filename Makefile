# The commands that people and CI run. `make` alone lists the targets. ARGS="..." is passed to the program.

VENV := .venv
ORACLE := .venv-oracle
CLIENTS := .venv-clients
NPM_CLIENTS := tests/clients/node_modules/.package-lock.json
AIDER := .venv-aider
NPM_AGENTS := tests/agents/node_modules/.package-lock.json
PYTHON_BIN := $(VENV)/bin/python
REQUIREMENTS := pyproject.toml constraints.txt scripts/setup.sh
PARALLEL := -n auto --maxprocesses 4 --dist worksteal
CHROMIUM := $(shell command -v chromium || command -v chromium-browser || command -v google-chrome || \
	ls -d "/Applications/Google Chrome.app" 2>/dev/null)
TORCH := $(shell sed -n 's/.*"\(torch==[^"]*\)".*/\1/p' pyproject.toml)

.PHONY: help man reference setup demo demo-model demo-vision test test-kernels test-vocabulary test-clients clients test-page screenshots docs-commands installs formula vocabulary soak lint type oracle bench capture wheel clean
.NOTPARALLEL:

help:
	@sed -n 's/^\([a-z-]*\):.*## /\1	/p' Makefile | while IFS="$$(printf '\t')" read -r target text; do \
		printf '  make %-15s %s\n' "$$target" "$$text"; done

setup: $(VENV)/.installed ## install the program into .venv

demo: $(VENV)/.installed ## ask the built-in model four questions, one of them about a picture
	@for prompt in "Sort 7 3 5" "What is 27 + 45?" "Make a JSON object: Simon is 59 years old and lives in Rome."; do \
		echo; echo "\$$ dgemma-mlx generate -m demo --seed 1 \"$$prompt\""; \
		$(VENV)/bin/dgemma-mlx generate -m demo --seed 1 "$$prompt" || exit 1; done
	@echo; echo "\$$ dgemma-mlx generate -m demo --seed 1 --image docs/pictures/shape.png \"What colour is it?\""
	@$(VENV)/bin/dgemma-mlx generate -m demo --seed 1 --image docs/pictures/shape.png "What colour is it?"
	@printf '%s\n' "" "The program is $(CURDIR)/$(VENV)/bin/dgemma-mlx. To call it by its name:" \
		"  source $(VENV)/bin/activate     in this terminal (fish: $(VENV)/bin/activate.fish)" \
		"  pipx install '.[serve]'       in every terminal (docs/install.md has other ways)" \
		"Then: dgemma-mlx chat -m demo"

demo-model: $(VENV)/.installed ## train the built-in model from nothing in runs/demo (resumes), and score it
	@sh scripts/demo_model.sh $(PYTHON_BIN)

demo-vision: $(VENV)/.installed ## train the built-in model's vision tower in runs/demo-vision (resumes), and score it
	@library=$$(sh scripts/openblas.sh "training the vision tower") || exit 1; export LD_PRELOAD=$$library; \
		$(PYTHON_BIN) -m dgemma_mlx.train.demo_vision $(ARGS) && \
		$(PYTHON_BIN) -m dgemma_mlx.train.demo_vision --score runs/demo-vision/model
	@echo "To release it: cp runs/demo-vision/model/* dgemma_mlx/demo/" >&2

test: $(VENV)/.installed-test ## run the tests, without torch
	@$(PYTHON_BIN) -m pytest $(PARALLEL) $(ARGS)

test-kernels: $(VENV)/.installed-kernels ## run the Metal kernels, in a simulator where there is no Metal
	@$(PYTHON_BIN) -m pytest -m kernels tests/kernels tests/metalsim $(PARALLEL) $(ARGS)

vocabulary: runs/gemma4/tokenizer.json ## fetch Gemma's vocabulary for tests and benchmarks, into runs/gemma4; needs npm

test-vocabulary: $(VENV)/.installed-test runs/gemma4/tokenizer.json ## run the tests that need Gemma's vocabulary
	@$(PYTHON_BIN) -m pytest -m vocabulary $(ARGS)

test-clients: $(CLIENTS)/.installed ## run real clients against the server, in an environment of their own
	@if command -v npm >/dev/null; then $(MAKE) --no-print-directory $(NPM_CLIENTS); \
		else echo "npm is not here: the clients that it installs are left out"; fi
	@$(CLIENTS)/bin/python -m pytest -m clients -W ignore tests/clients $(ARGS)

clients: $(VENV)/.installed-test $(NPM_AGENTS) $(AIDER)/.installed ## run agents against the server; needs npm, and 2 GB for them
	@$(PYTHON_BIN) -m pytest -m agents -W default tests/agents $(ARGS)

test-page: ## test the page in a real browser, where Chromium or Chrome is installed
	@if [ -n "$(CHROMIUM)" ]; then $(MAKE) --no-print-directory $(VENV)/.installed-page && \
		$(PYTHON_BIN) -m pytest -m page tests/page $(ARGS); \
		else echo "there is no Chromium here: the tests of the page are left out"; fi

soak: $(VENV)/.installed-test ## run the tests that take minutes
	@$(PYTHON_BIN) -m pytest -m slow $(ARGS)

lint: $(VENV)/.installed-test ## run ruff, and check the import contracts
	@$(PYTHON_BIN) -m ruff check .
	@$(VENV)/bin/lint-imports --no-cache --no-logo

type: $(VENV)/.installed-test ## run mypy in strict mode
	@$(PYTHON_BIN) -m mypy

oracle: $(ORACLE)/.installed ## compare with torch, transformers and mlx-vlm, in an environment of their own
	@$(ORACLE)/bin/python -m pytest -m oracle -W default $(PARALLEL) $(ARGS)

bench: $(VENV)/.installed-test ## run the benchmarks; BENCH=long_prompt ARGS="--tokens 32768" runs one
	@library=$$(sh scripts/openblas.sh "make bench" "docs/benchmarks.md compares figures that were measured with it") || \
		exit 1; \
		for script in benchmarks/$(or $(BENCH),*).py; do echo "== $$script"; \
		LD_PRELOAD=$$library $(PYTHON_BIN) "$$script" $(ARGS) || exit 1; done

capture: $(VENV)/.installed ## draw docs/canvas.svg with the program's own renderer
	@$(PYTHON_BIN) scripts/capture.py docs/canvas.svg $(ARGS)

screenshots: $(VENV)/.installed-page ## photograph the page into docs/, with Chromium or Chrome
	@$(PYTHON_BIN) scripts/screenshots.py docs $(ARGS)

docs-commands: $(VENV)/.installed ## run the commands of README and docs/ as a new reader would
	@$(PYTHON_BIN) scripts/docs_commands.py $(ARGS)

installs: $(VENV)/.installed ## install with pipx, uv and pip, from the checkout and from a wheel, and try each
	@PYTHON=$(PYTHON_BIN) sh scripts/installs.sh

formula: $(VENV)/.installed ## write packaging/homebrew/dgemma-mlx.rb from constraints.txt; ARGS="--url URL --sha256 SUM" of a release
	@$(PYTHON_BIN) scripts/homebrew.py $(ARGS)

reference: $(VENV)/.installed man ## write docs/cli.md and the manual page from the help of the program
	@$(PYTHON_BIN) scripts/cli_reference.py $(ARGS)

man: $(VENV)/.installed ## write the manual page, packaging/dgemma-mlx.1, from the help of the program
	@$(PYTHON_BIN) scripts/man_page.py $(ARGS)

wheel: $(VENV)/.installed-test ## build the wheel and the source archive in dist/
	@rm -rf dist
	@$(PYTHON_BIN) -m build --quiet
	@ls -1 dist/*

clean: ## remove environments, caches and builds
	rm -rf $(VENV) $(ORACLE) $(CLIENTS) $(AIDER) tests/clients/node_modules tests/agents/node_modules build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache

runs/gemma4/tokenizer.json: scripts/gemma_vocabulary.py | $(VENV)/.installed
	@$(PYTHON_BIN) scripts/gemma_vocabulary.py runs/gemma4

$(VENV)/.installed: $(REQUIREMENTS)
	@sh scripts/setup.sh $(VENV) 3.10 serve,vision
	@touch $@

$(VENV)/.installed-test: $(REQUIREMENTS)
	@sh scripts/setup.sh $(VENV) 3.10 test
	@touch $(VENV)/.installed $@

$(VENV)/.installed-kernels: $(REQUIREMENTS)
	@sh scripts/setup.sh $(VENV) 3.10 test,kernels
	@touch $(VENV)/.installed $(VENV)/.installed-test $@

$(VENV)/.installed-page: $(REQUIREMENTS)
	@sh scripts/setup.sh $(VENV) 3.10 page
	@touch $(VENV)/.installed $(VENV)/.installed-test $@

$(ORACLE)/.installed: $(REQUIREMENTS)
	@sh scripts/setup.sh $(ORACLE) 3.11 test,oracle $(TORCH)
	@touch $@

$(CLIENTS)/.installed: $(REQUIREMENTS)
	@sh scripts/setup.sh $(CLIENTS) 3.10 clients
	@touch $@

$(NPM_AGENTS): tests/agents/package.json
	@npm install --prefix tests/agents --no-package-lock --silent --no-audit --no-fund
	@touch $@

$(AIDER)/.installed: tests/agents/requirements.txt
	@$(PYTHON_BIN) -m venv $(AIDER)
	@$(AIDER)/bin/pip install -qq --disable-pip-version-check -r tests/agents/requirements.txt
	@touch $@

$(NPM_CLIENTS): tests/clients/package-lock.json
	@npm ci --prefix tests/clients --silent --no-audit --no-fund --ignore-scripts
	@touch $@
