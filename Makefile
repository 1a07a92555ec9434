# make demo   the whole pipeline on handwritten digits (makes .venv first)
# make test   the tests (makes .venv first)
# make report what RPG and p-diff make of handwritten digits, each as a page with pictures
# make torture  kills, failing disks, damage, hostile files, races and signals by the hundred (long)
# make bench  speed and memory of every stage as ratios to the obvious alternative (25 minutes, two cores, 25 GB of disk)
# make coverage  the tests, and the share of the package's lines that they run
# make lowest  the tests with the oldest versions of other packages that are allowed
# make check  formatting, lint, types
# One target for each stage, idempotent: make collect RUN=runs/mine RECIPE=digits-tasks, make tokenize RUN=runs/mine, ...

PYTHON ?= python3
VENV   ?= .venv
# A user with a GPU or another index overrides this line.
TORCH  ?= torch==2.13.0 torchvision==0.28.0
RUN    ?= runs/default
RECIPE ?=
ARGS   ?=
SEEDS  ?= 0 1 2
# make cores: the width of every core, and where its runs lie.
D_MODEL   ?= 256
CORES_RUN ?= runs/cores

RPG := $(VENV)/bin/rpg
export OMP_WAIT_POLICY = PASSIVE

STAGES := collect tokenize train-rpg generate evaluate
PDIFF_STAGES := train-ae train-diffusion generate evaluate
PDIFF  := pdiff-fashion-resnet18 pdiff-digits-convnet3 pdiff-digits-mlp3 pdiff-digits-accuracy \
          pdiff-digits-vit-tiny pdiff-digits-convnext-atto
# The same on the zoo of another recipe: zoo/recipe.
PDIFF_SHARED := pdiff-fashion-resnet18-paper cond-pdiff-digits-tasks
CORES  := mamba2 lstm transformer none
.PHONY: setup demo report test coverage lowest test-slow torture check format cores $(STAGES) train-ae train-diffusion
.PHONY: digits-tasks fashion-tasks digits-resnet18 $(PDIFF) $(PDIFF_SHARED)
.PHONY: shards ablations novelty bench
.DEFAULT_GOAL := demo

setup: $(VENV)/.base

$(VENV)/.base: pyproject.toml
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --editable .
	@touch $@

$(VENV)/.dev: $(VENV)/.base
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

$(VENV)/.report: $(VENV)/.base
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[report]'
	@touch $@

demo: setup
	@for stage in $(STAGES); do $(RPG) $$stage --run $(RUN) --resume || exit $$?; done

# The run of `make demo` and one of p-diff; a report that was made without the extra [report] is made again.
REPORTED := pdiff-digits-mlp3
report: $(VENV)/.report
	@for stage in collect tokenize train-rpg generate; do $(RPG) $$stage --run $(RUN) --resume || exit $$?; done
	@$(RPG) collect $(REPORTED) --run runs/$(REPORTED) --resume
	@for stage in tokenize train-ae train-diffusion generate; do \
	  $(RPG) $$stage --run runs/$(REPORTED) --resume || exit $$?; \
	done
	@for run in $(RUN) runs/$(REPORTED); do \
	  if test -f $$run/report/report.html; then force=; else force=--force; fi; \
	  $(RPG) evaluate --run $$run --resume $$force || exit $$?; \
	done
	@for run in $(RUN) runs/$(REPORTED); do echo "the page is $$run/report/report.html"; done

# collect takes the recipe; later stages find it in the run.
collect: setup
	@$(RPG) collect $(RECIPE) --run $(RUN) --resume $(ARGS)

tokenize train-rpg train-ae train-diffusion generate evaluate: setup
	@$(RPG) $@ --run $(RUN) --resume $(ARGS)

# make -j4 shards STAGE=collect SHARDS=8: collect, generate or evaluate in parts, then put together.
STAGE  ?= collect
SHARDS ?= 4
shard-%: setup
	@$(RPG) $(STAGE) $(RECIPE) --run $(RUN) --shard $*/$(SHARDS) $(ARGS)
shards: $(addprefix shard-,$(shell seq 0 $$(($(SHARDS) - 1))))
	@$(RPG) $(STAGE) $(RECIPE) --run $(RUN) --resume $(ARGS)

# One zoo, one generator for each of SEEDS; figures of the README.
digits-tasks fashion-tasks: setup
	@$(RPG) collect $@ --run runs/$@ --resume
	@for seed in $(SEEDS); do \
	  for stage in tokenize "train-rpg --seed $$seed" generate evaluate; do \
	    case $$stage in tokenize|evaluate) zoo="--zoo runs/$@/zoo";; *) zoo="";; esac; \
	    case $$stage in tokenize) recipe="$@";; *) recipe="";; esac; \
	    $(RPG) $$stage $$recipe --run runs/$@/seed-$$seed $$zoo --resume || exit $$?; \
	  done; \
	done
	@$(VENV)/bin/python -m tests.bench.seeds $(SEEDS:%=runs/$@/seed-%/report/report.json)

digits-resnet18: setup
	@$(RPG) collect $@ --run runs/$@ --resume
	@for stage in tokenize train-rpg generate evaluate; do $(RPG) $$stage --run runs/$@ --resume || exit $$?; done

# p-diff, all stages.
$(PDIFF): setup
	@$(RPG) collect $@ --run runs/$@ --resume
	@for stage in tokenize $(PDIFF_STAGES); do $(RPG) $$stage --run runs/$@ --resume || exit $$?; done

pdiff-fashion-resnet18-paper: ZOO := pdiff-fashion-resnet18
# Its diffusion does not learn; the report says so.
pdiff-fashion-resnet18-paper: ALLOW := --allow-bad
cond-pdiff-digits-tasks: ZOO := digits-tasks
$(PDIFF_SHARED): setup
	@$(RPG) collect $(ZOO) --run runs/$(ZOO) --resume
	@$(RPG) tokenize $@ --run runs/$@ --zoo runs/$(ZOO)/zoo --resume
	@for stage in $(PDIFF_STAGES); do \
	  case $$stage in evaluate) with="--zoo runs/$(ZOO)/zoo";; train-diffusion) with="$(ALLOW)";; *) with="";; esac; \
	  $(RPG) $$stage --run runs/$@ $$with --resume || exit $$?; \
	done

# One generator with each core on the zoo of RUN; then, for each, the mean on unseen tasks and its standard error.
cores: collect
	@for core in $(CORES); do \
	  run="--run $(CORES_RUN)/$$core --resume"; zoo="--zoo $(RUN)/zoo"; \
	  $(RPG) tokenize $(RUN)/recipe.json $$run $$zoo && \
	  $(RPG) train-rpg $$run --set rpg.core.kind=$$core --set rpg.core.d_model=$(D_MODEL) && \
	  $(RPG) generate $$run && \
	  $(RPG) evaluate $$run $$zoo --set 'evaluate.mlp=[]' || exit $$?; \
	done
	@$(VENV)/bin/python -c "$$UNSEEN" $(CORES:%=$(CORES_RUN)/%/report/report.json)

# p-diff's ablations on Fashion-MNIST, 2 repeats side by side; FULL=1: the paper's composition, 3 repeats.
ablations: setup
	@$(VENV)/bin/python -m tests.bench.ablations --out runs/ablations$(if $(FULL),-full --full)

# Novel and performant networks from independent starts: variations of p-diff, each beside the best trivial generator.
novelty: setup
	@$(VENV)/bin/python -m tests.bench.novelty --out runs/novelty

# ARGS="--only full-size": the networks of the paper at full size. ARGS="--reference DIR": also the released code.
bench: $(VENV)/.dev
	$(VENV)/bin/python -m tests.bench.bench --out runs/bench $(ARGS)

define UNSEEN
import json, sys
for path in sys.argv[1:]:
    for g in json.load(open(path))["groups"]:
        if (g["kind"], g["split"]) == ("generated", "unseen"):
            print(f"{path.split('/')[-3]:12}", "{mean:.4f} ± {se:.4f} on unseen tasks".format(**g["accuracy"]))
endef
export UNSEEN

test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2 -m "not slow and not gpu and not torture" $(ARGS)

# Lines of the package that `make test` runs, sub-processes included; fails under 90 %.
coverage: $(VENV)/.dev
	$(VENV)/bin/python -m coverage erase
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m coverage run -m pytest -n 2 -m "not slow and not gpu and not torture" $(ARGS)
	$(VENV)/bin/python -m coverage combine --quiet
	$(VENV)/bin/python -m coverage report

# The tests with the oldest versions that pyproject.toml allows, which may use what others have deprecated since;
# torch is TORCH, as in make lowest TORCH="torch==2.7.0 torchvision==0.22.0" (gigabytes).
lowest: VENV := .venv-lowest
lowest:
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(PYTHON) -c "$$LOWEST" > $(VENV)/lowest.txt
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c $(VENV)/lowest.txt --editable '.[dev]'
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2 -m "not slow and not gpu and not torture" \
	  -W default::DeprecationWarning -W default::PendingDeprecationWarning $(ARGS)

define LOWEST
import tomllib
project = tomllib.load(open("pyproject.toml", "rb"))["project"]
for requirement in project["dependencies"] + project["optional-dependencies"]["report"]:
    if not requirement.startswith("torch"):
        print(requirement.replace(">=", "=="))
endef
export LOWEST

test-slow: $(VENV)/.dev
	$(VENV)/bin/python -m pytest -m "slow" $(ARGS)

# Fuzzing is guided by coverage where there is a wheel of atheris.
torture: $(VENV)/.dev
	-$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --only-binary :all: --editable '.[fuzz]'
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2 --dist worksteal tests/torture $(ARGS)

check: $(VENV)/.dev
	$(VENV)/bin/ruff format --check rpgcli tests
	$(VENV)/bin/ruff check rpgcli tests
	$(VENV)/bin/mypy

format: $(VENV)/.dev
	$(VENV)/bin/ruff format rpgcli tests
	$(VENV)/bin/ruff check --fix rpgcli tests
