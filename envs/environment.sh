# Sourced by quickstart.sh and test.sh: make_environment NAME PACKAGE... leaves a Python in $PYTHON that has the packages of
# all three environment files, and those named. With conda, mamba or micromamba if one is there, else with venv.

make_environment() {
    local folder="$PWD/.envs/$1" python tool=""
    local packages=("${@:2}")
    while read -r package; do packages+=("$package"); done < <(sed -n 's/^      - \([^ ]*\).*/\1/p' envs/environment.*.yaml)
    PYTHON="$folder/bin/python"
    if [ -x "$PYTHON" ] && [ "$(cat "$folder/packages" 2>/dev/null)" = "${packages[*]}" ]; then
        echo "environment: $folder (made before)"
        return
    fi

    for tool in micromamba mamba conda ""; do command -v "${tool:-true}" >/dev/null && break; done
    echo "environment: making $folder with ${tool:-venv}; the first time this downloads several GB"
    if [ ! -x "$PYTHON" ] && [ -n "$tool" ]; then
        "$tool" create --yes --quiet --prefix "$folder" --channel conda-forge "python>=3.10" pip
    elif [ ! -x "$PYTHON" ]; then
        for python in python3 python3.14 python3.13 python3.12 python3.11 python3.10 ""; do
            "${python:-false}" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && break
        done
        if [ -z "$python" ] || ! "$python" -m venv "$folder"; then
            echo "No Python 3.10 or newer that can make a venv: install python3 and python3-venv, or conda." >&2
            exit 2
        fi
    fi
    "$PYTHON" -m pip install --disable-pip-version-check --quiet "${packages[@]}"
    echo "${packages[*]}" >"$folder/packages"
}
