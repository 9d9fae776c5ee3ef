# `make run` starts volumed, `make test` proves it, `make install` installs it. `make help` tells the rest.
SHELL := /bin/bash
UV := UV_PYTHON=$${UV_PYTHON:-$$(scripts/find-python)} UV_PYTHON_DOWNLOADS=never .cache/uv/bin/uv
BIN := .venv/bin
PREFIX ?= /opt/volumed
DESTDIR ?=

.PHONY: help run test check bench install uninstall clean
.DEFAULT_GOAL := help

help: ## This list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

run: .venv/runtime ## Start the daemon in the foreground, as root; Ctrl-C ends it
	@if [ "$$(id -u)" != 0 ]; then \
	    echo "volumed mounts file systems, so it must run as root: sudo make run"; \
	    echo "To look at it without root (no Docker, nothing is mounted): $(BIN)/volumed --root ./try"; exit 1; fi
	@VOLUMED_GREET=1 PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/volumed

test: .venv/development ## Install what the tests need (as root) and run them all
	@scripts/install-packages
	@scripts/run-tests $(BIN)/python

check: .venv/development ## Style, types, layers and unit tests, in under a minute
	@$(BIN)/ruff check --quiet . && $(BIN)/ruff format --quiet --check . && $(BIN)/mypy && $(BIN)/lint-imports --no-cache >/dev/null
	@$(BIN)/python -m pytest -q tests/unit

bench: .venv/development ## Measure, ours beside the peers', in one run
	@scripts/install-packages
	@$(BIN)/python -m tests.bench

install: .cache/uv/bin/uv ## Install below PREFIX (/opt/volumed), with systemd units; as root
	$(UV) venv --quiet --relocatable --allow-existing $(DESTDIR)$(PREFIX)
	UV_PROJECT_ENVIRONMENT=$(DESTDIR)$(PREFIX) $(UV) sync --quiet --frozen --no-dev --all-extras --no-editable --reinstall-package volumed
	install -d $(DESTDIR)/usr/local/bin $(DESTDIR)/etc/volumed $(DESTDIR)/etc/systemd/system
	ln -sfn $(PREFIX)/bin/volumed $(DESTDIR)/usr/local/bin/volumed
	ln -sfn $(PREFIX)/bin/volumectl $(DESTDIR)/usr/local/bin/volumectl
	install -m 644 systemd/*.service systemd/*.socket $(DESTDIR)/etc/systemd/system/
	sed -i 's|/opt/volumed/|$(PREFIX)/|' $(DESTDIR)/etc/systemd/system/volumed.service $(DESTDIR)/etc/systemd/system/volumed-unmount.service
	install -D -m 644 systemd/volumed.sysusers $(DESTDIR)/usr/lib/sysusers.d/volumed.conf
	install -D -m 644 systemd/volumed.tmpfiles $(DESTDIR)/usr/lib/tmpfiles.d/volumed.conf
	[ -e $(DESTDIR)/etc/volumed/volumed.toml ] || install -m 600 systemd/volumed.toml $(DESTDIR)/etc/volumed/volumed.toml
	[ -n "$(DESTDIR)" ] || { systemd-sysusers volumed.conf; systemd-tmpfiles --create volumed.conf; \
	    [ ! -d /run/systemd/system ] || systemctl daemon-reload; }
	@echo "Installed. Start it: systemctl enable --now volumed"

uninstall: ## Take away what install made; volumes, ledger and settings stay
	[ -n "$(DESTDIR)" ] || [ ! -d /run/systemd/system ] || \
	    systemctl disable --now volumed.service volumed-docker.socket volumed-admin.socket
	rm -rf $(DESTDIR)$(PREFIX) $(DESTDIR)/usr/local/bin/volumed $(DESTDIR)/usr/local/bin/volumectl
	rm -f $(DESTDIR)/etc/systemd/system/volumed{,-unmount}.service $(DESTDIR)/etc/systemd/system/volumed-{docker,admin}.socket
	rm -f $(DESTDIR)/usr/lib/sysusers.d/volumed.conf $(DESTDIR)/usr/lib/tmpfiles.d/volumed.conf

clean: ## Remove the environments and caches
	rm -rf .venv .cache .mypy_cache .pytest_cache .ruff_cache .hypothesis

.cache/uv/bin/uv:
	@scripts/make-environment .cache/uv
	@.cache/uv/bin/python -m pip install --quiet 'uv>=0.8'

.venv/runtime: pyproject.toml uv.lock | .cache/uv/bin/uv
	@$(UV) sync --quiet --frozen --no-dev --inexact && touch $@

.venv/development: pyproject.toml uv.lock | .cache/uv/bin/uv
	@$(UV) sync --quiet --frozen --all-extras && touch $@ .venv/runtime
