#!/usr/bin/env bash
# Makes .venv and installs dependency groups of pyproject.toml into it: scripts/install.sh run train test
# A second run repairs what an interrupted one left. Everything that goes wrong is one line that says what to do.
set -euo pipefail
unset CDPATH
cd "$(dirname "$0")/.."

venv=.venv
log=$venv/install.log
lock=.venv.lock # a link to nowhere, named after the process that holds it: made in one step, or not at all

say() { printf '%s\n' "$*"; }
fail() {
  printf '%s\n' "$*" >&2
  exit 1
}

version_of() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null; }
is_new_enough() { [[ $1 =~ ^3\.(1[1-9]|[2-9][0-9])$ ]]; }
can_make_venvs() { "$1" -c 'import ensurepip, venv' 2>/dev/null; }
runs_pip() { is_new_enough "$(version_of "$1")" && "$1" -m pip --version >/dev/null 2>&1; }

# Prints the interpreter to use; a shim that does not run, or one without venv, is passed over for the next.
find_python() {
  local candidates=(python3.13 python3.12 python3.11 python3) candidate version old='' bare=''
  if [[ -n ${PYTHON:-} ]]; then candidates=("$PYTHON"); fi
  for candidate in "${candidates[@]}"; do
    version=$(version_of "$candidate") || continue
    if ! is_new_enough "$version"; then
      old="$candidate is $version"
    elif ! can_make_venvs "$candidate"; then
      bare=$candidate
    else
      say "$candidate"
      return
    fi
  done
  [[ -z $bare ]] || fail "$bare has no venv module: install it (Debian, Ubuntu: apt install python3-venv)," \
    "or name another Python: make serve PYTHON=/path/to/python3.12"
  fail "Moescope needs Python 3.11 or newer, and ${old:-${PYTHON:-python3} does not run}: install one (python.org," \
    "apt, brew), or name it: make serve PYTHON=/path/to/python3.12"
}

# Two at once would clear the environment under each other's pip.
wait_for_our_turn() {
  local holder said=''
  until ln -s $$ $lock 2>/dev/null; do
    holder=$(readlink $lock) || fail "$PWD cannot be written: give yourself the right to, or clone to another folder"
    if kill -0 "$holder" 2>/dev/null; then
      [[ -n $said ]] || say "Another installation is at work here (process $holder): waiting for its end."
      said=yes
      sleep 1
    else
      rm -f $lock
    fi
  done
  trap 'rm -f $lock' EXIT
}

make_venv() {
  local python words
  python=$(find_python)
  say "Making $venv with $python ($(version_of "$python"))."
  words=$("$python" -m venv --clear $venv 2>&1) || fail "$python could not make $venv: ${words##*$'\n'}"
}

# pip writes a package's files before its record: a kill in between leaves one that looks installed and is not.
was_interrupted() {
  [[ -e $log ]] && grep -q '^Installing collected packages' $log && ! grep -q '^Finished' $log
}

announce() {
  if has_package torch; then
    say "Bringing $venv up to date ($*): downloads 0.2 GB at most, takes a minute at most."
    return
  fi
  local size
  if [[ $(uname -s) != Linux || ${TORCH:-} == cpu ]]; then
    size="0.2 GB of PyTorch"
  elif command -v nvidia-smi >/dev/null; then
    size="about 3 GB of PyTorch with CUDA"
  else
    size="up to 3 GB of PyTorch, which brings CUDA on Linux (TORCH=cpu takes the one without: 0.2 GB)"
  fi
  say "Installing into $venv, this once ($*): downloads $size and 0.2 GB at most of other packages."
  say "One to five minutes on a fast line; the details go to $log"
}
has_package() { $venv/bin/python -c "import importlib.metadata as m; m.version('$1')" 2>/dev/null; }

# Shows the large downloads as they begin; everything is in the log.
install_groups() {
  local groups=() index=() group
  for group in "$@"; do groups+=(--group "$group"); done
  if [[ ${TORCH:-} == cpu ]]; then index=(--extra-index-url https://download.pytorch.org/whl/cpu); fi
  {
    $venv/bin/python -m pip install --constraint constraints.txt pip &&
      $venv/bin/python -m pip install --constraint constraints.txt ${index[@]+"${index[@]}"} "${groups[@]}" && echo Finished
  } 2>&1 | tee $log | awk '/^ *Downloading .*\([0-9][0-9]+(\.[0-9]+)? MB\)|GB\)/ { print "  " $2, $3, $4; fflush() }'
}

explain() {
  if grep -qE 'Retrying|[Cc]onnection|ConnectTimeout|ReadTimeout|[Nn]ame resolution' $log; then
    fail "The package index cannot be reached: check the network (or proxy) and run it again; pip's words are in $log"
  elif grep -q 'No space left' $log; then
    fail "The disk is full: free some space (PyTorch with CUDA takes 7 GB, TORCH=cpu 1 GB) and run it again; see $log"
  fi
  fail "pip could not install $*: $(grep -m 1 '^ERROR' $log || tail -n 1 $log) (all of it in $log)"
}

export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 PIP_PROGRESS_BAR=off PIP_USER=0 PIP_RETRIES="${PIP_RETRIES:-3}"
trap 'fail "Interrupted: the same command goes on from here."' INT TERM
wait_for_our_turn
if was_interrupted; then
  say "The last installation was interrupted: starting afresh."
  make_venv
elif ! runs_pip $venv/bin/python; then
  make_venv
fi
announce "$@"
install_groups "$@" || explain "$@"
