# make demo    install, make phantom scans, shard them, pretrain with two processes, show what was learned
# make test    install and run every test; RECORD=1 notes what takes long: such files begin early, such tests are not quick
# make quick   the quick tests: what to run after every change
# make lint    style and types
# make bench   measure: twenty minutes on two free cores; writes bench/results, and table.md there
# make bench-peers   what users would take instead, in an environment of its own (2 GB), beside ours in the same runs
# make gpu-rehearsal   every stage of bench/gpu/day.sh at toy size on the CPU: two minutes on two free cores
# make docs    docs/ as a site that opens from disk: site/index.html
# make soak    200 random faults in real runs, and goodput under faults: an hour and a half
# make soak-slurm   dead nodes, links down and partitions on a real Slurm of two nodes: ten minutes; as root, needs slurmd and iproute2
# make evidence   train and analyse; writes docs/evidence.md: a little more than an hour on two free cores
#                 P2W_REAL_DATA=FOLDER (chest, luna16, dicom, nifti in it) brings real scans in
# make leaderboard  every pretext beside the others; writes docs/leaderboard.md, shares the runs: 40 minutes more
# make methods    what each pretext shows and asks: table and pictures of docs/methods.md, a quarter of an hour
# make transfer   tasks that ask for place, frozen and fine-tuned; fills tables of docs/targets.md: a forecast of six hours on two free cores
# make targets    the paper's Tables 1 and 2 at CPU size; fills docs/targets.md: an hour and a half more
#
# Without an NVIDIA GPU, a CPU build of torch spares gigabytes:
#   PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make demo

PYTHON ?= python3
VENV   ?= .venv
DEMO   ?= demo
SOAK   ?= soak
PEERS  ?= .venv-peers
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt

.PHONY: help install demo quick test lint docs bench bench-peers gpu-rehearsal soak soak-slurm evidence leaderboard methods targets transfer clean
help:
	@sed -n 's/^# \{0,1\}//p; /^$$/q' Makefile

install: $(VENV)/.installed
$(VENV)/.venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is older than 3.11; name a newer one: make $(MAKECMDGOALS) PYTHON=python3.11" >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || \
	  { echo "error: $(PYTHON) cannot make virtual environments; on Debian: apt-get install python3-venv" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	@touch $@
$(VENV)/.installed: $(VENV)/.venv setup.cfg constraints.txt
	$(PIP) --editable '.[fast]'
	@touch $@
$(VENV)/.tools: $(VENV)/.installed
	$(PIP) --editable '.[fast,test,lint]'
	@touch $@

demo: $(VENV)/.installed
	$(BIN)/python -m p2w.phantom --out $(DEMO)/LUNA16 --scans 20 --workers 2
	$(BIN)/python preprocess/shard_luna.py --luna $(DEMO)/LUNA16 --out $(DEMO)/shards --subsets 0-9 --val-fraction 0.2
	OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone --nproc_per_node=2 launch/train.py demo \
	  --shards $(DEMO)/shards --run-dir $(DEMO)/run
	@echo "look            $(DEMO)/run/figures/reconstruction.png (part | reconstruction | whole), loss.png, similarity.png"
	@echo "next            . $(BIN)/activate && tensorboard --logdir $(DEMO)/run/tensorboard"
	@echo "your scans      python preprocess/shard_scans.py --scans FOLDER --out shards"
	@echo "                torchrun launch/train.py paper   on GPUs; here, to try: torchrun launch/train.py demo"

# More workers than cores: a test of processes waits much of its time, which leaves its core to another (bench/NOTES.md).
# Hundreds of processes import the package: its bytecode is kept for them, also where the environment says otherwise.
# One thread each: beside one another, threads of one computation wait for each other many times longer than they compute.
WORKERS ?= 6
PYTEST = OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest --workers $(WORKERS)
quick: $(VENV)/.tools
	$(PYTEST) -m 'not slow and not slurm'

test: $(VENV)/.tools
	$(PYTEST) $(if $(RECORD),--record-durations)

lint: $(VENV)/.tools
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.installed
	$(PIP) --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 PYTHONPATH=. $(BIN)/python -m mkdocs build --quiet
	@echo "look            site/index.html"

# Peers take part where `make bench-peers` has installed them. bench/fuzz.py, soak.py, goodput.py are no questions of speed.
WITH_PEERS = $(if $(wildcard $(PEERS)/.installed),$(PEERS),$(VENV))/bin/python
STREAM = $(BIN)/python bench/stream.py --peers $(WITH_PEERS)
CROP   = PYTHONPATH=. $(WITH_PEERS) bench/crop_resize.py
bench: $(VENV)/.tools
	$(STREAM)
	$(BIN)/python bench/stream_places.py --peers $(WITH_PEERS)
	$(CROP)
	$(BIN)/python bench/kernel.py
	$(BIN)/python bench/step.py --compile
	$(BIN)/python bench/end_to_end.py
	$(BIN)/python bench/scaling.py
	$(BIN)/python bench/shard.py
	$(BIN)/python bench/store_scans.py
	$(BIN)/python bench/resample.py
	$(BIN)/python bench/sliding.py
	$(BIN)/python bench/checkpoint.py
	@$(BIN)/python bench/table.py

bench-peers: $(VENV)/.tools $(PEERS)/.installed
	$(STREAM)
	$(CROP)
	@$(BIN)/python bench/table.py
$(PEERS)/.installed: bench/peers/requirements.txt
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip --disable-pip-version-check install --quiet --requirement $<
	@touch $@

gpu-rehearsal: $(VENV)/.tools
	PYTHON=$(BIN)/python bash bench/gpu/day.sh --rehearse

soak: $(VENV)/.tools
	$(BIN)/python bench/soak.py --folder $(SOAK)
	$(BIN)/python bench/goodput.py --folder $(SOAK)

soak-slurm: $(VENV)/.tools
	$(BIN)/python bench/soak_slurm.py --folder $(SOAK)

evidence: $(VENV)/.installed
	$(BIN)/python bench/evidence/run.py --folder evidence --real "$(P2W_REAL_DATA)"

leaderboard: $(VENV)/.installed
	$(BIN)/python bench/evidence/leaderboard.py --folder evidence --real "$(P2W_REAL_DATA)"

methods: $(VENV)/.installed
	$(BIN)/python bench/evidence/methods.py --folder evidence

transfer: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python bench/evidence/transfer.py --folder evidence --workers 2

targets: $(VENV)/.installed
	$(BIN)/python bench/evidence/targets.py --folder evidence --real "$(P2W_REAL_DATA)"

clean:
	rm -rf site $(VENV) $(PEERS) $(DEMO) $(SOAK) gpu-day .whl .pytest_cache .ruff_cache .mypy_cache *.egg-info
