# Every command of the project. `./run NAME …` is `just NAME …`, with just and uv provided.

set positional-arguments

# Interpreters come from the machine: only the package index is asked for anything.
export UV_PYTHON_DOWNLOADS := "never"

python := ".venv/bin/python"

# This list
default:
    @just --list --unsorted

# Install what is missing and start everything: --detach, --scale fallback_model=2
[no-exit-message]
up *arguments: _runtime
    @exec {{ python }} -m infra.embedded up "$@"

# Stop everything
[no-exit-message]
down: _runtime
    @exec {{ python }} -m infra.embedded down

# What runs, and how it is
[no-exit-message]
status: _runtime
    @exec {{ python }} -m infra.embedded status

# The last lines of all logs or of one service's: logs limiter -f -n 100
[no-exit-message]
logs *arguments: _runtime
    @exec {{ python }} -m infra.embedded logs "$@"

# Start one service alone, with only its own dependencies, on the running stack (or on PORTCULLIS_NATS_URL …)
[no-exit-message]
service name:
    @{{ just_executable() }} _service "{{ name }}" "{{ replace(name, '_', '-') }}"

[no-exit-message]
_service name package:
    @UV_PROJECT_ENVIRONMENT="${PORTCULLIS_HOME:-.portcullis}/venvs/{{ name }}" \
        exec uv run --quiet --frozen --package portcullis-{{ package }} --no-dev \
        python infra/embedded/child.py --optional \
        --environment "${PORTCULLIS_HOME:-.portcullis}/environments/{{ name }}.json" -- python -m services.{{ name }}

# The whole test suite, or parts of it: test tests/unit -k limiter
[no-exit-message]
test *arguments: _development
    @exec {{ python }} -m pytest "$@"

# Everything that is checked without running the product
check: _development
    {{ python }} -m ruff format --check .
    {{ python }} -m ruff check .
    {{ python }} -m mypy
    .venv/bin/lint-imports
    uv lock --check --quiet

# Mend what can be mended by itself
fix: _development
    {{ python }} -m ruff check --fix .
    {{ python }} -m ruff format .

# What the stack needs to run, beside what a developer has already installed.
_runtime:
    @uv sync --frozen --quiet --inexact --all-packages --no-dev

_development:
    @uv sync --frozen --quiet --all-packages
