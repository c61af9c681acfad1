# shellcheck shell=bash
# Sourced by the other scripts:   source scripts/environment.sh [EXTRA ...]
#
# Finds or makes the virtual environment, installs this repository and what it requires with the named extras of
# pyproject.toml unless they are there already, and puts the environment's `python` first on PATH. Sets `repository`.
#
# The environment is, in this order,
#   the folder that TRANSFER_FRAMEWORK_VENV names (made if it is missing),
#   the active one (VIRTUAL_ENV, or CONDA_PREFIX except for conda's "base", which is nobody's project),
#   .venv in the repository (made if it is missing).
# PYTHON may name the interpreter that makes it; it is otherwise the first of python3, python, python3.14, … >= 3.10.
# An installation that was cut off is finished by running again.

repository=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)

environment_fail() {
    printf '%s\n' "$1" >&2
    exit 1
}

# Whether the interpreter starts and is new enough. A command may exist and not run: pyenv's shims, broken links.
python_works() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1
}

# Sets `interpreter`: a Python that can make an environment.
find_interpreter() {
    local candidate old='' incomplete=''
    for candidate in ${PYTHON:+"$PYTHON"} ${PYTHON:-python3 python python3.14 python3.13 python3.12 python3.11 python3.10}; do
        command -v -- "$candidate" >/dev/null 2>&1 || continue
        if ! python_works "$candidate"; then
            old=${old:-$candidate}
        elif ! "$candidate" -c 'import ensurepip, venv' >/dev/null 2>&1; then
            incomplete=${incomplete:-$candidate}
        else
            interpreter=$candidate
            return
        fi
    done
    if [ -n "$incomplete" ]; then
        environment_fail "Expected $incomplete to make virtual environments, but its module venv or ensurepip is missing: install it (Debian, Ubuntu: apt install python3-venv) or name another Python in PYTHON."
    elif [ -n "$old" ]; then
        environment_fail "Expected Python 3.10 or newer, but $old is older or does not run: install a newer python3 or name one in PYTHON."
    elif [ -n "${PYTHON:-}" ]; then
        environment_fail "Expected PYTHON to name a Python interpreter, but found none under '$PYTHON'."
    fi
    environment_fail "Expected python3 (3.10 or newer) on PATH, but found none: install it or name it in PYTHON."
}

# Make the environment, or mend one that was half made.
make_environment() {
    find_interpreter
    # Only what we or venv began may be completed: the folder could be anything.
    if [ -e "$environment" ] && [ ! -e "$environment/pyvenv.cfg" ] && [ ! -e "$environment/.transfer-framework.lock" ] &&
        [ -n "$(ls -A -- "$environment" 2>/dev/null || echo unreadable)" ]; then
        environment_fail "Expected '$environment' to be a virtual environment or to be absent, but it holds something else: name another folder in TRANSFER_FRAMEWORK_VENV."
    fi
    echo "Making the virtual environment $environment with $interpreter"
    mkdir -p -- "$environment" 2>/dev/null || environment_fail "Cannot write the folder '$environment': name another one in TRANSFER_FRAMEWORK_VENV."
    : >"$environment/.transfer-framework.lock"
    # venv keeps links that lead nowhere, for instance to a Python that was removed.
    rm -f -- "$environment"/bin/python "$environment"/bin/python3*
    "$interpreter" -m venv "$environment" >"$environment_log" 2>&1 ||
        environment_fail "Making the virtual environment '$environment' with $interpreter failed: $(tail -n 1 -- "$environment_log")"
}

# What is missing, one name a line; everything if the environment cannot tell.
missing_requirements() {
    "$environment_python" "$repository/scripts/missing_requirements.py" "$@" 2>>"$environment_log" || echo everything
}

pip_install() {
    # Without a network, pip's five retries for each package would take a minute to say so.
    PIP_RETRIES=${PIP_RETRIES:-3} "$environment_python" -m pip install --quiet --disable-pip-version-check --no-input "$@" >>"$environment_log" 2>&1 </dev/null
}

# Install what is missing. $1: the extras, separated by commas; $2: the names, separated by commas.
install_missing() {
    local names=$2 remark='' target=$repository ticker status=0
    if ! "$environment_python" -m pip --version >/dev/null 2>&1; then
        "$environment_python" -m ensurepip >>"$environment_log" 2>&1 ||
            environment_fail "Expected pip in '$environment', but it is missing and ensurepip cannot install it (Debian, Ubuntu: apt install python3-venv)."
    fi
    [ -z "$1" ] || target="${repository}[$1]"
    case ", $names," in
    *", torch,"* | *", everything,"*) remark=' (about 6 GB on Linux, some minutes)' ;;
    esac
    echo "Installing ${names/#everything/all that pyproject.toml requires}$remark"

    # A sign of life, as pip is quiet. The sleep holds none of our files, so that it keeps no pipe and no lock open.
    local began=$SECONDS
    (
        exec 9>&-
        while sleep 30 >/dev/null 2>&1 && kill -0 "$$" 2>/dev/null; do
            echo "… still installing ($((SECONDS - began)) s)"
        done
    ) &
    ticker=$!
    : >"$environment/.transfer-framework.installing"
    # If all but this repository is there, no network is needed: the build can use the environment's own setuptools.
    if [ "$names" != transfer-framework ] || ! pip_install --no-deps --no-build-isolation --editable "$repository"; then
        pip_install --editable "$target" || status=$?
    fi
    kill "$ticker" 2>/dev/null || true
    wait "$ticker" 2>/dev/null || true
    if [ "$status" -ne 0 ]; then
        # Addresses are left out: which package index a machine uses is nobody's business.
        { grep 'ERROR' -- "$environment_log" || tail -n 4 -- "$environment_log"; } | tail -n 4 | sed -E 's#https?://[^ ]*#(address)#g; s#host=[^,)]*#host=…#g; s#^ *#  pip: #' || true
        environment_fail "Installing failed: check the network (or the room on the disk) and run again to go on. pip's messages: $environment_log"
    fi
    rm -f -- "$environment/.transfer-framework.installing"
    echo "Installed in $((SECONDS - began)) s"
}

prepare_environment() {
    local why made=no extras missing repair=''
    extras=$(IFS=,; echo "$*")
    if [ -n "${TRANSFER_FRAMEWORK_VENV:-}" ]; then
        environment=$TRANSFER_FRAMEWORK_VENV why='named by TRANSFER_FRAMEWORK_VENV'
        case $environment in /*) ;; *) environment=$PWD/$environment ;; esac
    elif [ -n "${VIRTUAL_ENV:-}" ]; then
        environment=$VIRTUAL_ENV why='the active one'
    elif [ -n "${CONDA_PREFIX:-}" ] && [ "${CONDA_DEFAULT_ENV:-}" != base ]; then
        environment=$CONDA_PREFIX why='the active one, of conda'
    else
        environment=$repository/.venv why="the repository's own"
    fi
    environment_python=$environment/bin/python
    environment_log=$environment/transfer-framework-install.log

    if ! python_works "$environment_python"; then
        case $why in
        'the active'*) environment_fail "Expected the active environment '$environment' to hold a Python 3.10 or newer, but it does not: deactivate it, or name another one in TRANSFER_FRAMEWORK_VENV." ;;
        esac
        if [ -x "$environment_python" ] && "$environment_python" -c '' >/dev/null 2>&1; then
            environment_fail "Expected Python 3.10 or newer in '$environment', but it holds $("$environment_python" --version 2>&1): remove that folder, or name another one in TRANSFER_FRAMEWORK_VENV."
        fi
        make_environment
        made=yes
    fi
    [ "$made" = yes ] || echo "Using the virtual environment $environment ($why)"

    # Environments that we may not write to are fine as long as nothing is missing.
    [ -w "$environment" ] || environment_log=/dev/null
    missing=$(missing_requirements "$@")
    if [ -n "$missing" ] || [ -e "$environment/.transfer-framework.installing" ]; then
        [ -w "$environment" ] || environment_fail "Expected to install ${missing//$'\n'/, } into '$environment', but that folder is not writable: name another one in TRANSFER_FRAMEWORK_VENV."
        # Two installations into one environment at once would spoil it. Not every system has flock; then, one at a time.
        (
            if command -v flock >/dev/null 2>&1 && ! flock --nonblock 9; then
                echo "Waiting for another installation into $environment"
                flock 9
            fi
            : >"$environment_log"
            [ ! -e "$environment/.transfer-framework.installing" ] || repair=--repair
            missing=$(missing_requirements $repair "$@")
            if [ -n "$missing$repair" ]; then
                missing=${missing:-'what is missing'}
                install_missing "$extras" "${missing//$'\n'/, }"
            fi
        ) 9>"$environment/.transfer-framework.lock" || exit 1
    fi

    [ ! -e "$environment/pyvenv.cfg" ] || export VIRTUAL_ENV=$environment
    export PATH="$environment/bin:$PATH"
    unset PYTHONHOME
}

prepare_environment "$@"
