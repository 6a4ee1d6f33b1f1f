#!/bin/sh
# Builds the wheel, installs it without its dependencies beside those of the given interpreter, and uses it from
# another folder; then does the same with the editable install. Both must find every package, command and config.
set -eu
python=$1
repository=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$python" -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir "$work/dist" "$repository"
"$python" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps "$work"/dist/*.whl
# The dependencies of the development environment, without its editable copy of this project.
site=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
"$work/venv/bin/python" - "$site" <<'PY'
import pathlib, sys, sysconfig
target = pathlib.Path(sysconfig.get_path("purelib")) / "dependencies.pth"
target.write_text(sys.argv[1] + "\n")
PY
cat >"$work/try.py" <<'PY'
import sys
import rdt2_data, rdt2_hardware, rdt2_jax, rdt2_sim, rdt2_train
from rdt2_jax.config import find_config
packages = (rdt2_jax, rdt2_data, rdt2_train, rdt2_hardware, rdt2_sim)
inside = [module.__file__.startswith(sys.argv[1]) for module in packages]
assert all(inside), [module.__file__ for module in packages]
print("found", find_config("train/tokenizer.yaml").name, "and", len(packages), "packages")
PY
cd "$work"
# Packages of the wheel come before the borrowed dependencies on sys.path, because they sit in the venv itself.
"$work/venv/bin/python" "$work/try.py" "$work/venv"
"$python" "$work/try.py" "$repository"
for interpreter in "$work/venv/bin/python" "$python"; do
    for command in "" "data synthesize" "doctor" "tokenizer encode" "tokenizer train"; do
        "$interpreter" -m rdt2_jax $command --help >/dev/null
    done
done
echo "the wheel and the editable install both have every package, command and configuration"
