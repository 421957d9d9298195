# Sourced by quickstart.sh and test.sh: leaves in $PYTHON a Python that has the packages of the three environment files, and
# what the tests need. Made in .envs/ the first time, by conda, mamba or micromamba if one is there, else by venv.

find_python() { # the first Python of 3.10 or newer
    local python
    for python in python3 python3.{14..10}; do
        "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && echo "$python" && return
    done
    echo "Python 3.10 or newer is needed, or conda: install one of them." >&2
    return 2
}

make_environment() { # the folder to make it in
    local python tool
    for tool in micromamba mamba conda venv; do command -v "$tool" >/dev/null && break; done
    if [ "$tool" != venv ]; then
        "$tool" create --yes --quiet --prefix "$1" --channel conda-forge "python=3.11" pip
    else
        python=$(find_python)
        "$python" -m venv "$1" || { echo "Install Python's venv module (Debian: python3-venv), or conda." >&2 && return 2; }
    fi
}

environment="$PWD/.envs/vfm"
PYTHON="$environment/bin/python"
packages=("pytest>=8" "pytest-xdist>=3.8" "ruff==0.17.6" "imageio-ffmpeg>=0.6")
while read -r package; do packages+=("$package"); done < <(sed -n 's/^      - \([^ ]*\).*/\1/p' envs/environment.*.yaml)
if [ "$(cat "$environment/packages" 2>/dev/null)" != "${packages[*]}" ]; then
    echo "Installing the packages into .envs/vfm: 7 GB and 5 to 15 minutes the first time, most of it to download torch."
    [ -x "$PYTHON" ] || make_environment "$environment"
    "$PYTHON" -m pip install --disable-pip-version-check --no-warn-script-location --root-user-action=ignore -qq \
        "${packages[@]}"
    echo "${packages[*]}" >"$environment/packages"
fi
