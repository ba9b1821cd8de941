# make demo   a trained model finds needles in real text; table and heat map under demo/
# make test   every test that needs no GPU
# make lint   ruff
# make compile   every kernel that "hopper" may launch, for that GPU without one: what it spills and waits for (an hour)
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.PHONY: demo test lint compile clean

demo: $(READY)
	$(BIN)/diffv2-sparse niah --output demo

test: $(READY)
	$(BIN)/pytest -n 2

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

compile: $(READY)
	$(BIN)/python -m tests.compile_hopper all

# One environment for all, built again only when its description changes.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch triton
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[models,dev]'
	touch $@

clean:
	rm -rf $(VENV) demo
