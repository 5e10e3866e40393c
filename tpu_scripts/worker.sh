#!/usr/bin/env bash
# What runs on the machines themselves; tpu.sh and slurm.sh call it there.
#
#   worker.sh setup EXTRA         install this repository with its extra (tpu, gpu) into .venv
#   worker.sh start COMMAND...    start the command and leave it running; output in runs/.launch/log
#   worker.sh status WORKDIR      one line: "job: STATE STEP"; the step is the workdir's last checkpoint
#   worker.sh stop                SIGTERM, on which the programs save; SIGKILL after two minutes
#   worker.sh results             the workdirs on this machine's own disk
#   worker.sh task COMMAND...     run the command here, in .venv
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
job=runs/.launch # beside the runs, where git ignores it
mkdir -p "$job"
PATH=$HOME/.local/bin:$PATH

# The kernel drops the lock when the last process of the job is dead.
running() { ! flock --shared --nonblock "$job/lock" true; }

# gs://BUCKET/PATH is /mnt/gcs/BUCKET/PATH, where `mount_bucket` puts the bucket.
local_path() { case $1 in gs://*) printf '/mnt/gcs/%s' "${1#gs://}" ;; *) printf '%s' "$1" ;; esac; }

mount_bucket() { # mount_bucket gs://BUCKET/PATH
  local bucket=${1#gs://}
  bucket=${bucket%%/*}
  local point=/mnt/gcs/$bucket
  ! mountpoint --quiet "$point" || return 0
  if ! command -v gcsfuse > /dev/null; then
    local key=/usr/share/keyrings/cloud.google.asc site=https://packages.cloud.google.com/apt
    curl -fsS "$site/doc/apt-key.gpg" | sudo tee "$key" > /dev/null
    echo "deb [signed-by=$key] $site gcsfuse-$(lsb_release -cs) main" |
      sudo tee /etc/apt/sources.list.d/gcsfuse.list > /dev/null
    sudo apt-get -qq update
    sudo apt-get -qq install -y gcsfuse
  fi
  sudo mkdir -p "$point"
  sudo chown "$(id -u)" "$point"
  # A checkpoint is committed by renaming its directory; hosts must see each other's files at once.
  gcsfuse --implicit-dirs --rename-dir-limit=1000000 --metadata-cache-ttl-secs=0 \
    "$bucket" "$point" 9>&- # it stays, and must not hold the job's lock
}

case ${1:-} in
  setup)
    command -v uv > /dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh
    [[ -x .venv/bin/python ]] || uv venv --quiet --python '>=3.11' .venv
    uv pip install --quiet --python .venv/bin/python -c constraints.txt -e ".[$2]"
    ;;
  start)
    shift
    exec 9>> "$job/lock"
    if ! flock --wait 1 9; then
      rm -f ~/nanoflax-env
      [[ $(printf '%q ' "$@") == "$(< "$job/command")" ]] || {
        echo "another command is running here: $(< "$job/command"); stop it first" >&2
        exit 2
      }
      echo "already running" >&2
      exit 0
    fi
    arguments=() previous=
    for argument; do
      path=
      case $previous=$argument in --workdir=/* | -workdir=/*) echo "$argument" >> "$job/workdirs" ;; esac
      previous=$argument
      case $argument in
        gs://?*) path=$argument ;;
        -*=gs://?*) path=${argument#*=} ;;
        --workdir=/* | -workdir=/*) echo "${argument#*=}" >> "$job/workdirs" ;;
      esac
      if [[ $path ]]; then
        mount_bucket "$path"
        argument=${argument%"$path"}$(local_path "$path")
      fi
      arguments+=("$argument")
    done
    rm -f "$job/status" "$job/stopped"
    printf '%q ' "$@" > "$job/command"
    setsid bash "$PWD/tpu_scripts/worker.sh" supervise "${arguments[@]}" < /dev/null >> "$job/log" 2>&1 &
    echo $! > "$job/group"
    ;;
  supervise) # of start: the command, and then its exit status in a file
    shift
    trap : TERM # wait for the command to save and leave
    code=0
    bash "$PWD/tpu_scripts/worker.sh" task "$@" || code=$?
    echo "$code" > "$job/status"
    ;;
  task)
    shift
    if [[ -e ~/nanoflax-env ]]; then # secrets, sent by tpu.sh: read once
      # shellcheck disable=SC1090
      . ~/nanoflax-env
      rm -f ~/nanoflax-env
    fi
    PATH=$PWD/.venv/bin:$PATH exec "$@"
    ;;
  status)
    if running; then
      state=running
    elif [[ -e $job/stopped ]]; then
      state=stopped
    elif [[ -e $job/status ]]; then
      state=exited:$(< "$job/status")
    elif [[ -e $job/command ]]; then
      state=exited:lost # the machine went down under it
    else
      state=none
    fi
    checkpoints=$(local_path "$2")/checkpoints
    step=$(find "$checkpoints" -maxdepth 1 -regex '.*/[0-9]+' -printf '%f\n' 2> /dev/null |
      sort -n | tail -n 1) || step=
    echo "job: $state ${step:--1}"
    ;;
  stop)
    running || exit 0
    touch "$job/stopped"
    group=$(< "$job/group")
    kill -TERM -- "-$group" || true
    flock --shared --wait 120 "$job/lock" true || kill -KILL -- "-$group"
    ;;
  results)
    # Buckets and network disks are other file systems, and outlive the machine.
    find ~ -xdev -name '.?*' -prune -o -type d -name checkpoints -printf '%h\n'
    [[ -e $job/workdirs ]] || exit 0
    while IFS= read -r workdir; do
      [[ ! -d $workdir || $(stat -c %d "$workdir") != "$(stat -c %d ~)" ]] || printf '%s\n' "$workdir"
    done < "$job/workdirs"
    ;;
  *)
    echo "worker.sh is called by tpu.sh and slurm.sh; its first lines say how" >&2
    exit 2
    ;;
esac
