# make run          set up, then let the real model answer a few prompts from paged memory
# make test         set up, then run all tests
# make serve        set up, then serve the model over HTTP, with a page at http://127.0.0.1:8000
# make lab          set up, then open the chapters in JupyterLab
# make chapters     run all chapters anew and write their notebooks
# make bench        this engine beside others on the same weights (long: half an hour on two cores)
# make gpu          tests, kernels, engine and a profile on a machine with a GPU: 8 minutes, installs nothing
# make experiments  the paper's evaluation, redone (a quarter of an hour on two cores)
# make gallery      draw the gallery's pages and pictures again, of the runs that are in them
# make lint         style and types

PYTHON ?= python3
VENV   ?= .venv
OUT    ?= results/gpu
READY  := $(VENV)/.ready
RUN    := $(VENV)/bin/python -m

.PHONY: run test serve lab chapters bench gpu experiments gallery lint clean

run: $(READY)
	$(RUN) minipaged.generate --n 2 --temperature 0.3 --seed 1 --max-tokens 48 --num-blocks 24 --stats \
	  "What is the capital of France?" "Write one sentence about the sea." "Why is the sky blue?"

test: $(READY)
	$(RUN) pytest -n auto --dist loadgroup

serve: $(READY)
	$(RUN) minipaged.serve --num-blocks 512

lab: $(READY)
	$(VENV)/bin/jupyter lab chapters

chapters: $(READY)
	$(VENV)/bin/python chapters/source/build.py

bench: $(READY)
	$(RUN) minipaged.bench

gpu:
	$(PYTHON) -m minipaged.bench.gpu --out $(OUT)

experiments: $(READY)
	$(RUN) minipaged.experiments

gallery: $(READY)
	$(RUN) minipaged.experiments gallery --out chapters/gallery --redraw --pictures

lint: $(READY)
	$(RUN) ruff check .
	$(RUN) mypy

$(READY): requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -r requirements.txt
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $(READY)

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
