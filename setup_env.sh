# Sourced by the run_*.sh scripts: makes a virtual environment if none is active, and installs what is needed, once.

CDPATH='' cd -- "$(dirname "${BASH_SOURCE[0]}")"

if [ -z "${VIRTUAL_ENV:-}" ] && [ "${CONDA_DEFAULT_ENV:-base}" = base ]; then
  # venv writes the activate script last, with the path of the folder: without either, an earlier attempt was cut off
  # or the folder has moved since.
  grep -qsF "$PWD/.venv" .venv/bin/activate || python3 -m venv --clear .venv
  # shellcheck disable=SC1091
  source .venv/bin/activate
fi

if ! python -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
  echo "tvmerge needs Python 3.10 or newer, and this is $(python --version 2>&1)" >&2
  exit 2
fi

installed="${VIRTUAL_ENV:-$CONDA_PREFIX}/.tvmerge-installed"
if ! cmp -s <(cat requirements.txt pyproject.toml; pwd) "$installed"; then
  echo "Installing what tvmerge needs, once ..." >&2
  # Without it, the pip of Python 3.10 cannot build those of our needs that come as source only.
  export PIP_USE_PEP517=1
  python -m pip --version > /dev/null 2>&1 || python -m ensurepip --upgrade > /dev/null
  python -m pip install --quiet --disable-pip-version-check -r requirements.txt
  python -m pip install --quiet --disable-pip-version-check --no-deps -e .
  cat requirements.txt pyproject.toml <(pwd) > "$installed"
fi
