#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Makes `.venv` in the clone hold the package with all extras at the pinned versions. Does nothing if it already does.
# PYTHON chooses the interpreter (default: python3). TRANSFORMERS chooses another version of transformers than the pinned
# one, in an environment of its own, `.venv-VERSION`.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="$root/.venv${TRANSFORMERS:+-$TRANSFORMERS}"
stamp="$venv/installed-for"

# The path is part of it because an editable install points at its clone, and a clone can be moved.
wanted="$(cd "$root" && { pwd; cat pyproject.toml constraints.txt scripts/setup_venv.sh; } | cksum)"
if [[ -x "$venv/bin/python" && -f "$stamp" && "$(cat "$stamp")" == "$wanted" ]]; then
    exit 0
fi

python="${PYTHON:-python3}"
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "setup_venv.sh: needs Python 3.11 or newer, and \`$python\` is not. Set PYTHON to one that is." >&2
    exit 2
fi

echo "Setting up $venv (the first time takes a few minutes)" >&2
"$venv/bin/python" -m pip --version >/dev/null 2>&1 || "$python" -m venv "$venv"

# torch first: see constraints.txt.
constraints="$root/constraints.txt"
if [[ -n "${TRANSFORMERS:-}" ]]; then  # which says itself what it needs of those two
    constraints="$venv/constraints.txt"
    grep -vE '^(transformers|huggingface_hub|tokenizers)==' "$root/constraints.txt" >"$constraints"
    echo "transformers==$TRANSFORMERS" >>"$constraints"
fi
pip_install=("$venv/bin/python" -m pip install --quiet --disable-pip-version-check --constraint "$constraints")
"${pip_install[@]}" torch
"${pip_install[@]}" --editable "$root[dev]"
printf '%s\n' "$wanted" >"$stamp"
