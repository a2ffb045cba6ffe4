# `make run` and `make test` are all a new machine needs: python3, python3-venv and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
unexport PYTHONDONTWRITEBYTECODE    # each process of a test would compile all modules anew

.PHONY: run install test test-long test-windows packages lint map bench soak clean
.NOTPARALLEL:   # packages come before what uses them

# As a module: a script keeps what compiling it took, 25 MB, for as long as it runs.
run: $(VENV)/run.stamp
	$(BIN)/python -m healthchecker

# For a service: all that its account has to read, whatever the umask, and nothing is started.
install: $(VENV)/run.stamp
	chmod -R go+rX $(VENV)

# What Debian has of programs that the tests use; what cannot be installed is skipped, and named at the end.
packages:
	@sh tests/packages.sh $(VENV)/packages.stamp

# A test that hangs fails at LIMIT, with the stacks of all threads; one that no signal reaches ends its process a minute
# later (.pytest.ini). That test has failed then; xdist begins it again, once, for the sake of the rest of its file.
LIMIT := --timeout 300
DIST := --dist loadfile --no-loadscope-reorder    # tests/conftest.py puts long files first
# `make test` is every test but those that take longest, in under five minutes: something of each section. Those that are
# marked long are in `make test-long`; .ci/run has both. All of one file: make test ARGS="tests/test_x.py -m ''"
test: MARKED := not long
test-long: MARKED := long
# Six at once on two processors: they wait three times as long as they compute. All of it: what they import is compiled
# once before, and not by each.
test test-long: packages $(VENV)/test.stamp
	$(if $(ARGS),,@ls tests/test_*.py | xargs -n 34 -P 2 $(BIN)/python -m pytest --collect-only >/dev/null || true)
	$(BIN)/python -m pytest -n 6 $(DIST) --max-worker-restart 1 $(LIMIT) -m "$(MARKED)" $(ARGS)

# What runs on Windows, too, under Windows Python in wine; exit status 77 says that it cannot be had here. Left out
# are tests of moments (of a kill, of a first poll, of megabytes before a deadline) that wine is too slow to keep, and long
# ones in which nothing is Windows': they run on Linux. Those in which something is are marked windows, too.
SLOW := test_kill_during or first_polls_are_paced or every_poll_ends_in_time
# These start services and commands, or wait, for seconds each in wine, only to see what is alike on all systems.
ALIKE := seal_rotate_and_replace or notify_test or who_is_cut_off or told_before_a_cut or on_its_way_when or \
	apprise_is_missing or follow_a_reload or tags_while_serving or maintenance_opens or check_prints or earlier_start_is_gone or \
	another_database_begins or reads_the_database_through or removals_are_accepted or default_that_is_stated or \
	resource_that_is_down or not_carried_along or failed_start or log_is_lost_by_a_kill or start_and_stop_are_events or \
	key_from_another_service or inventory_has_no_more or passwords_in_the_service or password_after_the_poll or \
	database_that_is_away_is_told or test_slack or receiver_that_is_corrected or wants_to_be_left_alone or \
	setting_of_the_service or a_flask_application or knows_the_routes or renamed_resource_goes_on or \
	faulty_inventory_changes or (test_incidents and test_served) or taken_for_an_empty or added_in_the_console_and
# Three at once: in wine they wait more than they compute.
WINDOWS := inventory groups endpoints vault storage aggregate evaluate gate hostile_clients proxy poll transport powershell \
	probes protocols windows_kept windows_local windows_probes wsman_server windows_service workers reload readme middleware push dependencies \
	maintenance notify incidents charts

test-windows: packages $(VENV)/run.stamp
	$(BIN)/python tests/windows_python.py --timeout 1800 -- -m pytest -n 3 $(DIST) $(LIMIT) -rfE -o cache_dir=.wine-python/cache \
		-k "not ($(SLOW) or $(ALIKE))" -m "not long or windows" \
		$(WINDOWS:%=tests/test_%.py) $(ARGS) || test $$? = 77

lint: $(VENV)/test.stamp
	$(BIN)/ruff check .
	@$(BIN)/mypy --platform win32 --cache-dir .mypy_cache/win32 & windows=$$!; \
		$(BIN)/mypy; code=$$?; wait $$windows && exit $$code

# The sections of healthchecker.py: their sizes, and who uses what of whom.
map:
	@$(PYTHON) tests/sections.py

bench: packages $(VENV)/test.stamp
	$(BIN)/python tests/bench.py $(ARGS)

# All of it takes hours; make soak ARGS="--only fuzz restarts" is a part (tests/soak.py lists them).
soak: $(VENV)/test.stamp
	$(BIN)/python tests/soak.py $(ARGS)

clean:
	rm -rf $(VENV) .wine-python .pytest_cache .mypy_cache .ruff_cache .hypothesis __pycache__ tests/__pycache__

# The stamp is what was installed and for which Python, and no date: tar, cp -p and rsync keep those of files, and a system's
# Python is upgraded in its place.
$(VENV)/run.stamp: FORCE
	@version=$$($(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])') && \
	wanted=$$(echo $$version; cat requirements.txt) && \
	if [ "$$wanted" != "$$(cat $@ 2>/dev/null)" ]; then \
		[ -d $(VENV)/lib/python$$version ] || clear=--clear; set -x; \
		$(PYTHON) -m venv $$clear $(VENV) && \
		$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt && \
		{ set +x; } 2>/dev/null && echo "$$wanted" > $@; fi

FORCE:

$(VENV)/test.stamp: $(VENV)/run.stamp tests/requirements.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -r tests/requirements.txt
	touch $@
