#!/usr/bin/env bash
# Installs Rowen and everything it runs on into .venv, from the hash-pinned lock files.
# Usage: tools/setup.sh [runtime|test]     (called by the Makefile; safe to run again)
set -euo pipefail
cd "$(dirname "$0")/.."
kind=${1:-runtime}
lock=requirements/$kind.lock
venv=.venv
# The CPU build of torch is not on the default index; used only when the configured ones lack it.
torch_index=https://download.pytorch.org/whl/cpu

say() { printf 'setup: %s\n' "$*"; }
fail() { printf 'setup: %s\n' "$*" >&2; exit 2; }

find_python() {
  local candidate
  for candidate in "${PYTHON:-}" python3.11 python3; do
    if [ -n "$candidate" ] && command -v "$candidate" >/dev/null &&
      "$candidate" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))'; then
      command -v "$candidate"
      return
    fi
  done
  fail "no Python 3.11 found (the lock files are for 3.11): install it, or name it with PYTHON=/path/to/python3.11"
}

# Debian packages are installed only when something is missing and we may.
debian() {
  local what=$1 package=$2
  if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    fail "$what is missing: install the Debian package $package (as root: apt-get install $package) and run again"
  fi
  say "installing the Debian package $package ($what is missing)"
  { apt-get install -y -q "$package" || { apt-get update -q && apt-get install -y -q "$package"; }; } \
    >"$venv.apt.log" 2>&1 || { tail -n 5 "$venv.apt.log" >&2; fail "apt-get could not install $package: install it by hand and run again"; }
  rm -f "$venv.apt.log"
}

[ "$(uname -s)-$(uname -m)" = Linux-x86_64 ] || fail "the lock files are for Linux on x86_64, this is $(uname -s) on $(uname -m)"
[ -r "$lock" ] || fail "$lock is missing: use 'runtime' or 'test', not '$kind'"

stamp=$venv/.rowen-$kind-$(cat requirements/torch.lock "$lock" pyproject.toml tools/setup.sh cli/rowen/cli/model.py | sha256sum | cut -c1-16)
if [ -e "$stamp" ]; then
  exit 0
fi

if ! $venv/bin/python -m pip --version >/dev/null 2>&1; then
  rm -rf $venv  # missing, or left half made by an interrupted run
  python=$(find_python)
  "$python" -c 'import ensurepip' 2>/dev/null || debian "the Python module ensurepip" python3-venv
  say "creating $venv with $("$python" --version)"
  "$python" -m venv $venv
fi
ldconfig -p 2>/dev/null | grep -q 'libnuma\.so\.1' || [ -e /usr/lib/x86_64-linux-gnu/libnuma.so.1 ] ||
  debian "the library libnuma.so.1 (vLLM's CPU build loads it)" libnuma1

log=$venv/setup.log  # pip's warnings; shown when something fails
pip() { $venv/bin/python -m pip "$@" --no-input --disable-pip-version-check --progress-bar off --quiet; }
say "torch (CPU build)"
pip install --no-deps --require-hashes -r requirements/torch.lock 2>"$log" ||
  pip install --no-deps --require-hashes -r requirements/torch.lock --index-url $torch_index 2>>"$log" ||
  { tail -n 20 "$log" >&2; fail "torch could not be installed from the configured index nor from $torch_index"; }
say "$(grep -c '==' "$lock") packages of $lock (about 3 GB, one to three minutes)"
{ pip install --no-deps --require-hashes -r "$lock" && pip install --no-deps --no-build-isolation -e .; } 2>"$log" ||
  { tail -n 20 "$log" >&2; fail "pip could not install $lock; see above, and $log"; }
say "the demo's model"
$venv/bin/python -m rowen.cli.model
touch "$stamp"
say "done"
