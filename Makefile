# make demo    the whole job on this machine, in about four minutes; installs what is missing
# make test    lint, format, types, tests; installs what is missing
# make test-cluster    tests that start clusters of their own: ray up, faults, a TPU slice; as root
# make test-long   tests that take most of a minute each, which CI runs behind `make test`
# make test-attack     thousands of hostile files, and a second user of the machine (as root), in five minutes; see SECURITY.md
# make test-compile    tests that compile networks with Inductor and every kernel for every GPU, in minutes
# make test-torch211   the tests of what touches torch, under the oldest torch that we take, in an environment of its own
# make docs    the pages as a site, build/docs/site; checks every link
# make notebook    runs docs/photos.ipynb again and keeps its outputs
# make lock    renew requirements.lock and its kin after a change of pyproject.toml

.PHONY: setup tools demo test test-cluster test-long test-attack test-compile test-torch211 docs notebook lock
.SILENT:

setup:
	./cluster/bootstrap.sh

demo: setup
	.venv/bin/simclr demo

test: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/pytest --timeout 600 --numprocesses 2 --dist loadgroup --no-loadscope-reorder

test-cluster: setup
	.venv/bin/pytest --timeout 900 -m cluster -rs

test-long: setup
	.venv/bin/pytest --timeout 600 --numprocesses 2 --dist loadgroup -m long

test-attack: setup
	.venv/bin/pytest --numprocesses 2 -m attack -rsP tests/attack

test-compile: setup
	.venv/bin/pytest -m compile tests/simclr/test_compile.py tests/simclr/networks/test_timm.py tests/simclr/kernels

test-torch211: setup
	./tests/support/torch211.sh

# The tools lie in an environment of their own. The site is read from the sources; the notebook finds the command and its libraries in .venv.
tools: setup
	[ "$$(cat .venv-docs/installed 2>/dev/null)" = "$$(sha256sum docs/site/docs.lock)" ] || { \
		.venv/bin/python -m venv --clear --without-pip .venv-docs && \
		.venv/bin/uv pip install --quiet --python .venv-docs/bin/python --require-hashes --only-binary :all: -r docs/site/docs.lock && \
		sha256sum docs/site/docs.lock >.venv-docs/installed; }

docs: tools
	.venv-docs/bin/python docs/site/build.py site

notebook: tools
	PATH="$(CURDIR)/.venv/bin:$$PATH" PYTHONPATH="$$(echo $(CURDIR)/.venv/lib/python3*/site-packages):$(CURDIR)" \
		.venv-docs/bin/python docs/site/build.py notebook

# Names versions and hashes for Python 3.11 and 3.12, and no address of an index. requirements.lock is what nodes install,
# requirements-dev.lock the same and the tools of a checkout; cluster/*.lock: what FFCV is built with, what only a head or a TPU's host needs.
lock = .venv/bin/uv pip compile --universal --python-version 3.11 --generate-hashes \
	--no-emit-index-url --no-emit-find-links --no-header --quiet
lock: setup
	$(lock) pyproject.toml --extra train --group node --output-file requirements.lock
	$(lock) pyproject.toml --extra train --group node --extra dev --constraints requirements.lock --output-file requirements-dev.lock
	for group in build head tpu; do \
		$(lock) --group $$group --constraints requirements-dev.lock --output-file cluster/$$group.lock || exit 1; \
	done
	$(lock) --group docs --constraints requirements-dev.lock --output-file docs/site/docs.lock
