#!/usr/bin/env bash
# GPU nodes under Slurm: see usage below.
. "$(dirname -- "${BASH_SOURCE[0]}")/lib.sh"

usage() {
  cat << 'TEXT'
tpu_scripts/slurm.sh VERB [NAME] [OPTIONS] [-- COMMAND...]   train on GPU nodes, as the job NAME

  run     NAME -- COMMAND...   launch and watch, to the end; after a preemption, a time limit or a
                               failure again, resuming. Itself it may be stopped and started again.
  sync                         copy the tracked files of this repository to --host
  setup                        install there what was copied, for all nodes
  launch  NAME -- COMMAND...   queue COMMAND on --nodes=1 with --gpus=8 each and come back. Slurm
                               makes and frees the nodes; jobs of one NAME run one after another.
  status  NAME                 its state in the queue
  tail    NAME                 follow its output
  stop    NAME                 end the running command; it saves first
  fetch   WORKDIR TO           copy a workdir from --host to the new directory TO
  delete  NAME                 take it from the queue, running or not; asks, unless --yes. Files stay.

COMMAND is for example: python -m experiments.pretrain --config=gpt2_124m --workdir=runs/x
It is started once for every GPU, and JAX joins the processes.

  --host=[USER@]LOGIN   the login node, by ssh; without it you are on it, in this repository
  --dir=nanoflax        the repository there; all nodes must see it
  --nodes=1 --gpus=8    nodes, and GPUs of each
  --sbatch-flag=FLAG    one more flag for sbatch, such as --time=24:00:00; may be repeated
  --env=NAME            pass this environment variable too; WANDB_API_KEY and HF_TOKEN go by
                        themselves, through ssh's standard input, never in a command
  --poll=60 --failures=5   of run: seconds between looks, and after how many failures in a row
                        without a new checkpoint to give up
  --dry-run             print every command, run none: for run, those of a run without trouble
run exits with 0 when COMMAND did, 2 when COMMAND did (a bad configuration), 130 after `stop` or
`delete`, and 1 when it gave up.
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
  run | launch | status | tail | stop | delete) takes='one NAME' wanted=1 ;;
  sync | setup) takes='no NAME' wanted=0 ;;
  fetch) takes='WORKDIR TO' wanted=2 ;;
  *) die 2 "$verb is no verb; one of run, sync, setup, launch, status, tail, stop, fetch, delete" ;;
esac

host='' directory=nanoflax nodes=1 gpus=8 flags=() names=() command=()
while [[ $# -gt 0 ]]; do
  case $1 in
    --help | -h) usage && exit 0 ;;
    --host=?*) host=${1#*=} ;;
    --dir=?*) directory=${1#*=} ;;
    --nodes=?*) nodes=${1#*=} ;;
    --gpus=?*) gpus=${1#*=} ;;
    --sbatch-flag=?*) flags+=("${1#*=}") ;;
    --) shift && command=("$@") && break ;;
    -*) shared_option "$1" || bad_option "$1" ;;
    *) names+=("$1") ;;
  esac
  shift
done
[[ ${#names[@]} == "$wanted" ]] || die 2 "$verb takes $takes; a command goes after --"
name=${names[0]:-}
case $verb in
  run | launch) [[ ${#command[@]} -gt 0 ]] || die 2 "$verb needs a command: ${0##*/} $verb NAME -- python -m experiments.pretrain --workdir=..." ;;
  *) [[ ${#command[@]} == 0 ]] || die 2 "$verb takes no command; launch and run do" ;;
esac
[[ $verb == fetch || $name != *[/,%]* ]] || die 2 "a job's name has no / , or %, which $name has"
if [[ $host ]]; then
  need ssh "--host needs it"
elif [[ $verb == sync || $verb == fetch ]]; then
  die 2 "$verb copies from here to --host, which is not given"
else
  need squeue "run this on a login node of the cluster, or give --host="
  cd -- "$repository"
fi

at() { # at COMMAND...: run it in the repository on the login node
  if [[ $host ]]; then
    run ssh "$host" "cd $(quote "$directory") && $(quote "$@")"
  else
    run "$@"
  fi
}

launch() { # prints the id of the job
  # JAX wants a process for each GPU, all of which see all GPUs of their node. SIGTERM before the time
  # limit lets the command save. A node's failure is seen by the others, which leave by themselves.
  local submit=(sbatch --parsable "--job-name=$name" --dependency=singleton --requeue
    "--nodes=$nodes" "--ntasks-per-node=$gpus" "--gpus-per-node=$gpus" --signal=TERM@120
    --output=runs/.launch/%x.log --open-mode=append "${flags[@]}"
    "--wrap=exec srun --kill-on-bad-exit=0 --wait=600 bash tpu_scripts/worker.sh task $(quote "${command[@]}")")
  # shellcheck disable=SC2016
  at bash -c 'mkdir -p runs/.launch && rm -f "runs/.launch/$1.stopped"' - "$name" || return
  if [[ $host ]] && secrets_set; then
    # shellcheck disable=SC2016
    at bash -c '. /dev/stdin && exec "$@"' - "${submit[@]}" < <(print_secrets)
  else
    at "${submit[@]}"
  fi
}

run_to_the_end() {
  local id answer state silent=0 step
  id=$(ask '' at squeue --me --noheader "--name=$name" '--format=%A')
  id=${id%%$'\n'*}
  [[ -z $id ]] || say "$name is queued already as job $id, and is watched"
  while true; do
    if [[ -z $id ]]; then
      id=$(launch) || {
        round_failed "$name could not be queued"
        id=
        sleep "$poll"
        continue
      }
      id=${id%%;*} # JOB;CLUSTER
      [[ -z $dry_run ]] || id=JOB
      say "$name is job $id"
    fi
    [[ $silent -lt 10 ]] || die 1 "sacct has not answered 10 times in a row; the same command goes on"
    answer=$(ask 'COMPLETED|0:0' at sacct -j "$id" -X --noheader --parsable2 --format=State,ExitCode) || {
      silent=$((silent + 1))
      sleep "$poll"
      continue
    }
    silent=0
    answer=${answer##*$'\n'}
    state=${answer%%[ |]*} # CANCELLED has "by UID" after it
    case $state in
      COMPLETED) say "$name: finished" && return ;;
      CANCELLED) die 130 "job $id of $name was cancelled" ;;
      FAILED | TIMEOUT | PREEMPTED | NODE_FAIL | BOOT_FAIL | OUT_OF_MEMORY | DEADLINE | REVOKED)
        [[ $answer != *'|2:'* ]] || die 2 "the command ended with status 2, a bad configuration: ${0##*/} tail $(quote "$name")"
        ! (asking=1 at test -e "runs/.launch/$name.stopped") || die 130 "$name was stopped"
        step=$(ask 'job: none -1' at bash tpu_scripts/worker.sh status "$(workdir_of "${command[@]}")") || step=-1
        saw_step "${step##* }"
        round_failed "job $id of $name is $state"
        id=
        ;;
      *) sleep "$poll" ;; # waiting, running, requeued
    esac
  done
}

case $verb in
  run)
    [[ $(workdir_of "${command[@]}") ]] || die 2 "run needs --workdir= in the command, to see what is saved"
    run_to_the_end
    ;;
  sync)
    need rsync "sync and fetch need it"
    run ssh "$host" "mkdir -p $(quote "$directory")"
    run rsync --archive --secluded-args --from0 --files-from=- "$repository/" "$host:$directory/" < <(list_code)
    ;;
  setup) at bash tpu_scripts/worker.sh setup gpu ;;
  launch) launch ;;
  status) at squeue --me "--name=$name" ;;
  tail) at tail -n 100 -F "runs/.launch/$name.log" ;;
  stop)
    at touch "runs/.launch/$name.stopped" # or `run` would queue it again
    at scancel --me "--name=$name" --state=RUNNING --signal=TERM
    ;;
  fetch)
    need rsync "sync and fetch need it"
    from=${names[0]} to=${names[1]}
    [[ ! -e $to ]] || die 2 "$to exists already; name a new directory"
    [[ $from == /* ]] || from=$directory/$from
    run rsync --archive --secluded-args "$host:$from/" "$to"
    ;;
  delete)
    confirm "take $name from the queue"
    at scancel --me "--name=$name"
    ;;
esac
