#!/usr/bin/env bash
# Cloud TPU VMs: see usage below.
. "$(dirname -- "${BASH_SOURCE[0]}")/lib.sh"

usage() {
  cat << 'TEXT'
tpu_scripts/tpu.sh VERB NAME [OPTIONS] [-- COMMAND...]   train on the Cloud TPU called NAME

  run     NAME -- COMMAND...   all of it, to the end: create, sync, setup, launch, watch; after a
                               preemption or a failure again, resuming. Itself it may be stopped and
                               started again. The machine stays until `delete`.
  create  NAME                 rent it: --type=v5litepod-16 [--spot] [--version=RUNTIME]
  sync    NAME                 copy the tracked files of this repository to every worker
  setup   NAME                 install there what was copied
  launch  NAME -- COMMAND...   start COMMAND on every worker and come back
  status  NAME                 the state of the machine, and of the command on every worker
  tail    NAME                 follow the command's output on one worker: [--worker=0]
  stop    NAME                 end the command; it saves first
  fetch   NAME WORKDIR TO      copy a workdir (of worker 0, or gs://...) to the new directory TO
  delete  NAME                 give the machine back; refused while its disk holds workdirs, unless
                               --discard-results; buckets are never touched; asks, unless --yes

COMMAND is for example: python -m experiments.pretrain --config=gpt2_124m --workdir=gs://BUCKET/x
An argument gs://BUCKET/... or --flag=gs://BUCKET/... becomes /mnt/gcs/BUCKET/..., where gcsfuse
mounts the bucket (best one with hierarchical namespace). `run` wants such a workdir, or an absolute
path that outlives the machine, for it deletes machines that are PREEMPTED, TERMINATED or SUSPENDED.

  --zone=ZONE --project=PROJECT   else gcloud's own defaults
  --queued              the machine is a queued resource, which waits until there is room (create,
                        status, delete, run)
  --create-flag=FLAG    one more flag for gcloud's create; may be repeated
  --env=NAME            pass this environment variable too; WANDB_API_KEY and HF_TOKEN go by
                        themselves. Values travel in a file that is deleted, never in a command.
  --poll=60 --failures=5   of run: seconds between looks, and after how many failures in a row
                        without a new checkpoint to give up
  --dry-run             print every command, run none: for run, those of a run without trouble
run exits with 0 when COMMAND did, 2 when COMMAND did (a bad configuration), 130 after `stop`, and 1
when it gave up.
TEXT
}

[[ $# -gt 0 && $1 != --help && $1 != -h ]] || {
  usage
  [[ $# -gt 0 ]] || exit 2
  exit 0
}
verb=$1
shift
case $verb in
  run | create | sync | setup | launch | status | tail | stop | fetch | delete) ;;
  *) die 2 "$verb is no verb; one of run, create, sync, setup, launch, status, tail, stop, fetch, delete" ;;
esac

type='' version='' queued='' worker=0 discard='' where=() create_flags=() names=() command=()
while [[ $# -gt 0 ]]; do
  case $1 in
    --help | -h) usage && exit 0 ;;
    --type=?*) type=${1#*=} ;;
    --version=?*) version=${1#*=} ;;
    --zone=?* | --project=?*) where+=("$1") ;;
    --spot) create_flags+=(--spot) ;;
    --queued) queued=1 ;;
    --create-flag=?*) create_flags+=("${1#*=}") ;;
    --worker=?*) worker=${1#*=} ;;
    --discard-results) discard=1 ;;
    --) shift && command=("$@") && break ;;
    -*) shared_option "$1" || bad_option "$1" ;;
    *) names+=("$1") ;;
  esac
  shift
done
[[ ${#names[@]} -gt 0 && ${names[0]} ]] || die 2 "which machine? ${0##*/} $verb NAME"
name=${names[0]}
[[ $name != *[/:]* ]] || die 2 "a machine's name has no / and no :, which $name has"
[[ $verb == fetch && ${#names[@]} == 3 || $verb != fetch && ${#names[@]} == 1 ]] ||
  die 2 "$verb takes $([[ $verb == fetch ]] && echo NAME WORKDIR TO || echo one NAME), not ${names[*]}; a command goes after --"
case $verb in
  run | launch) [[ ${#command[@]} -gt 0 ]] || die 2 "$verb needs a command: ${0##*/} $verb NAME -- python -m experiments.pretrain --workdir=..." ;;
  *) [[ ${#command[@]} == 0 ]] || die 2 "$verb takes no command; launch and run do" ;;
esac
case $verb in
  run | create) [[ $type ]] || die 2 "$verb needs --type=, such as --type=v5litepod-16" ;;
esac
if [[ $type && -z $version ]]; then
  case $type in
    v[234]-*) version=tpu-ubuntu2204-base ;;
    v5litepod-*) version=v2-alpha-tpuv5-lite ;;
    v5p-*) version=v2-alpha-tpuv5 ;;
    v6e-*) version=v2-alpha-tpuv6e ;;
    *) die 2 "--type=$type needs --version=, its runtime: gcloud compute tpus tpu-vm versions list" ;;
  esac
fi
need gcloud "it is in the Google Cloud CLI: https://cloud.google.com/sdk/docs/install"

tpus() { # tpus ARGUMENTS...: gcloud in this zone and project, without questions
  run gcloud compute tpus "$@" "${where[@]}" --quiet
}

on_workers() { # on_workers WORKERS COMMAND...
  local workers=$1
  shift
  tpus tpu-vm ssh "$name" "--worker=$workers" "--command=$(quote "$@")"
}

# The machine's state as gcloud has it; ABSENT without one, UNKNOWN if gcloud cannot say.
machine_state() { # machine_state ANSWER-OF-A-DRY-RUN
  local group=(tpu-vm) field=state state errors
  [[ -z $queued ]] || group=(queued-resources) field=state.state
  errors=$(mktemp)
  if state=$(ask "$1" tpus "${group[@]}" describe "$name" "--format=value($field)" 2> "$errors"); then
    printf '%s' "$state"
  elif grep -qiE 'not[ _]found' "$errors"; then
    printf ABSENT
  else
    cat -- "$errors" >&2
    printf UNKNOWN
  fi
  rm -f -- "$errors"
}

create() {
  if [[ $queued ]]; then
    tpus queued-resources create "$name" "--node-id=$name" "--accelerator-type=$type" \
      "--runtime-version=$version" "${create_flags[@]}"
  else
    tpus tpu-vm create "$name" "--accelerator-type=$type" "--version=$version" "${create_flags[@]}"
  fi
}

remove() {
  if [[ $queued ]]; then
    tpus queued-resources delete "$name" --force
  else
    tpus tpu-vm delete "$name"
  fi
}

sync() {
  local archive=$cache/$name/code.tar.gz
  if [[ -z $dry_run ]]; then
    mkdir -p -- "${archive%/*}"
    list_code | tar --null --verbatim-files-from -C "$repository" -T - -czf "$archive" || return
  fi
  tpus tpu-vm scp "$archive" "$name:nanoflax-code.tar.gz" --worker=all || return
  # Files of the last copy go first, so that none stays which is no longer in the repository.
  # shellcheck disable=SC2016
  on_workers all bash -c 'mkdir -p ~/nanoflax && cd ~/nanoflax &&
    { [ ! -e .code ] || xargs -d "\n" rm -f -- < .code; } && tar -xzf ~/nanoflax-code.tar.gz &&
    tar --quoting-style=literal -tzf ~/nanoflax-code.tar.gz > .code'
}

setup() { on_workers all bash nanoflax/tpu_scripts/worker.sh setup tpu; }

launch() {
  if secrets_set; then
    local file=$cache/$name/env
    if [[ -z $dry_run ]]; then
      mkdir -p -- "${file%/*}"
      trap 'rm -f -- "$cache/$name/env"' EXIT
      rm -f -- "$file"
      (umask 077 && print_secrets > "$file") || return
    fi
    tpus tpu-vm scp "$file" "$name:nanoflax-env" --worker=all || return
    [[ $dry_run ]] || rm -f -- "$file"
  fi
  on_workers all bash nanoflax/tpu_scripts/worker.sh start "${command[@]}"
}

stop() { on_workers all bash nanoflax/tpu_scripts/worker.sh stop; }

job_lines() { # what every worker says of its job
  # shellcheck disable=SC2016
  on_workers all bash -c 'worker=nanoflax/tpu_scripts/worker.sh
    if [ -e $worker ]; then bash $worker status "$1"; else echo "job: none -1"; fi' - "${1:-}"
}

# Of all workers' lines: sets job to none, running, done, bad, stopped or failed, and notes the step.
judge_job() { # judge_job LINES
  local word state step states=' '
  job=failed
  while read -r word state step; do
    [[ $word == job: ]] || continue
    states+="$state "
    saw_step "$step"
  done <<< "$1"
  case $states in
    *' exited:2 '*) job=bad ;;
    *' stopped '*) job=stopped ;;
    *' exited:'[!0]*) job=failed ;;
    *' none '*) [[ ${states//none/} == *[!\ ]* ]] || job=none ;;
    *' running '*) job=running ;;
    *' exited:0 '*) job=finished ;;
  esac
}

run_to_the_end() {
  local workdir state lines job launched='' silent=0 turn=0
  local rehearsal=( # the answers of a dry run
    ABSENT READY 'job: none -1' READY 'job: exited:0 -1'
  )
  workdir=$(workdir_of "${command[@]}")
  case $workdir in
    gs://?* | /*) ;;
    *) die 2 "--workdir=$workdir is lost with the machine; run needs gs://BUCKET/PATH, or an absolute path on a disk that stays" ;;
  esac
  while true; do
    [[ $silent -lt 10 ]] || die 1 "$name has not answered 10 times in a row; see what it is; the same command goes on"
    state=$(machine_state "${rehearsal[turn]:-}")
    turn=$((turn + 1))
    case $state in
      READY | ACTIVE) ;;
      ABSENT)
        create || {
          round_failed "$name could not be created"
          sleep "$poll"
        }
        continue
        ;;
      PREEMPTED | TERMINATED | SUSPENDED | FAILED)
        round_failed "$name is $state and is made again"
        remove || silent=$((silent + 1))
        launched=
        continue
        ;;
      STOPPED) die 1 "$name is STOPPED, by a person: start it or delete it; the same command goes on" ;;
      UNKNOWN)
        silent=$((silent + 1))
        sleep "$poll"
        continue
        ;;
      *)
        say "$name is $state"
        sleep "$poll"
        continue
        ;;
    esac
    if ! lines=$(ask "${rehearsal[turn]:-}" job_lines "$workdir"); then
      silent=$((silent + 1))
      sleep "$poll"
      continue
    fi
    turn=$((turn + 1))
    silent=0
    judge_job "$lines"
    # How a command ended that someone launched before does not count; one that runs is taken over.
    [[ $launched || $job == running ]] || job=none
    case $job in
      finished) say "$name: finished" && return ;;
      bad) die 2 "the command ended with status 2, a bad configuration: ${0##*/} tail $(quote "$name")" ;;
      stopped) die 130 "the command on $name was stopped" ;;
      failed)
        round_failed "the command on $name ended"
        stop || true
        ;;
    esac
    if [[ $job == running && $launched ]]; then
      sleep "$poll"
    elif [[ $job == running ]]; then
      launch # says so if it is another command
      launched=1
    elif sync && setup && launch; then
      launched=1
    else
      round_failed "$name could not be set up"
      launched=
    fi
  done
}

case $verb in
  run) run_to_the_end ;;
  create) create ;;
  sync) sync ;;
  setup) setup ;;
  launch) launch ;;
  stop) stop ;;
  tail) on_workers "$worker" tail -n 100 -F nanoflax/runs/.launch/log ;;
  status)
    state=$(machine_state READY)
    say "$name is $state"
    [[ ! $state =~ ^(READY|ACTIVE)$ ]] || job_lines
    ;;
  fetch)
    from=${names[1]} to=${names[2]}
    [[ ! -e $to ]] || die 2 "$to exists already; name a new directory"
    case $from in
      gs://*) run mkdir -p "$to" && run gcloud storage rsync --recursive "$from" "$to" ;;
      /*) tpus tpu-vm scp --recurse "$name:$from" "$to" --worker=0 ;;
      *) tpus tpu-vm scp --recurse "$name:nanoflax/$from" "$to" --worker=0 ;;
    esac
    ;;
  delete)
    state=$(machine_state READY)
    case $state in
      ABSENT) die 2 "there is no $name here; --zone, --project and --queued say where to look" ;;
      UNKNOWN) die 1 "the state of $name cannot be had; nothing is deleted" ;;
    esac
    case $discard$state in
      READY | ACTIVE)
        # shellcheck disable=SC2016
        found=$(ask '' on_workers all bash -c 'worker=nanoflax/tpu_scripts/worker.sh
          [ ! -e $worker ] || bash $worker results') ||
          die 1 "what $name's disk holds cannot be seen; --discard-results deletes it all the same"
        [[ -z $found ]] || die 2 "the disk of $name holds $(sort -u <<< "$found" | paste -sd ' '); fetch it, or say --discard-results"
        ;;
      STOP* | START* | RESTART* | REPAIR* | REIMAG*)
        die 1 "what $name's disk holds cannot be seen while it is $state; --discard-results deletes it all the same"
        ;;
    esac
    confirm "delete $name and its disk"
    remove
    ;;
esac
