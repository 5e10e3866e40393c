# shellcheck shell=bash
# What tpu.sh and slurm.sh share: options, quoting, showing and running commands, secrets.
set -euo pipefail

here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
repository=$(dirname -- "$here")
# shellcheck disable=SC2034  # used by the scripts that read this one
cache=${XDG_CACHE_HOME:-$HOME/.cache}/nanoflax/tpu_scripts
secrets=(WANDB_API_KEY HF_TOKEN) # names alone: no value ever stands in a command
dry_run='' poll=60 failures=5 yes=''
exec 3>&1 4>&2 # where commands are shown, also from inside $(...)

die() { # die STATUS MESSAGE
  printf '%s: %s\n' "${0##*/}" "$2" >&2
  exit "$1"
}

say() { printf '%s\n' "$*" >&2; }

need() { # need PROGRAM WHERE-FROM
  [[ $dry_run ]] || command -v "$1" > /dev/null || die 127 "$1 is not on PATH; $2"
}

# The arguments as one line that any POSIX shell reads back byte for byte.
quote() {
  local LC_ALL=C argument words=() escaped="'\\''"
  for argument; do
    case $argument in
      '' | *[!A-Za-z0-9_./:=@%+,-]*) words+=("'${argument//"'"/"$escaped"}'") ;;
      *) words+=("$argument") ;;
    esac
  done
  printf '%s' "${words[*]}"
}

# Show a command, and run it unless this is a dry run. What only asks is not shown in a real one.
run() {
  if [[ $dry_run ]]; then
    printf '%s\n' "$(quote "$@")" >&3
  else
    [[ ${asking:-} ]] || printf '+ %s\n' "$(quote "$@")" >&4
    "$@"
  fi
}

# ask ANSWER FUNCTION...: what the function's `run` prints; in a dry run ANSWER.
ask() {
  local answer=$1 asking=1
  shift
  "$@" || return
  [[ -z $dry_run ]] || printf '%s\n' "$answer"
}

# Options that both scripts know; returns 1 for any other.
shared_option() {
  case $1 in
    --dry-run) dry_run=1 ;;
    --yes) yes=1 ;;
    --poll=?*) poll=${1#*=} ;;
    --failures=?*) failures=${1#*=} ;;
    --env=*=*) die 2 "--env takes a name; its value is read from your environment, so that no log has it" ;;
    --env=?*)
      [[ ${1#*=} =~ ^[A-Za-z_][A-Za-z0-9_]*$ && ${!BASH_REMATCH+set} ]] || die 2 "$1 is not set in your environment"
      secrets+=("${1#*=}")
      ;;
    *) return 1 ;;
  esac
  [[ $poll$failures =~ ^[0-9]+$ ]] || die 2 "--poll and --failures take whole numbers"
}

# bad_option OPTION: says what is right.
bad_option() {
  die 2 "$1 is not understood; options are written --name=value, before --, and \`${0##*/} --help\` lists them"
}

confirm() { # confirm WHAT: unless --yes
  [[ -z $yes && -z $dry_run ]] || return 0
  [[ -t 0 ]] || die 2 "$1: say --yes"
  local answer
  read -r -p "$1? [y/N] " answer
  [[ $answer == [yY]* ]] || die 1 "nothing is deleted"
}

# Whether a secret is set. `declare -p NAME` writes it: under `set -x` only its name is shown.
secrets_set() {
  local name
  for name in "${secrets[@]}"; do [[ -z ${!name+set} ]] || return 0; done
  return 1
}
print_secrets() {
  local name
  for name in "${secrets[@]}"; do [[ -z ${!name+set} ]] || declare -p "$name"; done
}

# Tracked files that exist, as they are now, ended by NUL.
list_code() {
  local file
  git -C "$repository" ls-files -z | while IFS= read -r -d '' file; do
    [[ ! -e $repository/$file ]] || printf '%s\0' "$file"
  done
}

# workdir_of COMMAND...: the value of its --workdir.
workdir_of() {
  local previous=
  for argument; do
    case $argument in --workdir=* | -workdir=*) printf '%s' "${argument#*=}" ;; esac
    case $previous in --workdir | -workdir) printf '%s' "$argument" ;; esac
    previous=$argument
  done
}

# A round of a restart loop has failed: give up after --failures of them that saved nothing new.
failed_rounds=0 best_step=-1
round_failed() { # round_failed WHY
  failed_rounds=$((failed_rounds + 1))
  say "$1 (failure $failed_rounds of $failures without a new checkpoint; last one at step $best_step)"
  [[ $failed_rounds -lt $failures ]] ||
    die 1 "giving up after $failures failures in a row without a new checkpoint; the output says why: ${0##*/} tail"
}
saw_step() { # saw_step STEP
  [[ $1 -le $best_step ]] || { best_step=$1 failed_rounds=0; }
}
