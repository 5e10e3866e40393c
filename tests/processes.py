"""Programs in processes of their own that start quickly: forks of one that has imported JAX.

A fresh interpreter spends three seconds of a processor on imports, and the tests start some 200.
`start` and `run` instead ask a server process, begun at first use, which has imported the libraries
(and nothing of experiments, and no backend of JAX), to fork. The fork takes over the arguments,
environment, directory and files, runs the module as `python -m` does, and ends as any interpreter.
"""

import atexit
import gc
import importlib.metadata
import json
import os
import pathlib
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
LIBRARIES = [
    "absl.app",
    "flax.linen",
    "grain",
    "matplotlib.pyplot",
    "nanoflax.runs",
    "optax",
    "orbax.checkpoint",
    "rich.live",
    "tensorboardX",
    "tensorflow_datasets",
]
# With this setting a program does not start itself again to get it (experiments/flags.py).
HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
# Compiles in a fifth of the time what then runs slower: for code that runs a few times.
QUICK_XLA = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
if importlib.metadata.version("jaxlib").startswith("0.10."):  # newer ones end at a flag that they do not know
    QUICK_XLA += " --xla_cpu_use_fusion_emitters=false"
AS_USERS = {"XLA_FLAGS": ""}
_server = None


class Child:
    """A forked program: as much of subprocess.Popen as the tests use. Its output goes to files."""

    def __init__(self, arguments, env, cwd, out, err):
        global _server
        if _server is None:
            _server = _Server()
        self.args, self.out, self.err, self.returncode = arguments, pathlib.Path(out), pathlib.Path(err), None
        self.pid, self._status = _server.fork(arguments, env, str(cwd), str(out), str(err))

    def poll(self):
        if self.returncode is None and self._status.exists():
            self.returncode = os.waitstatus_to_exitcode(int(self._status.read_text()))
        return self.returncode

    def wait(self, timeout=None):
        end = time.monotonic() + (timeout or float("inf"))
        while self.poll() is None:
            if time.monotonic() > end:
                self.kill()
                raise subprocess.TimeoutExpired(self.args, timeout, self.out.read_text(), self.err.read_text())
            time.sleep(0.01)
        return self.returncode

    def communicate(self, timeout=None):
        self.wait(timeout)
        return self.out.read_text(), self.err.read_text()

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)


def start(arguments, *, env=None, cwd=ROOT, out=None, err=None):
    """Start `python ARGUMENTS`, which begin with "-m", module or "-c", code; returns a Child at once. Without XLA_FLAGS
    in env it compiles quickly; AS_USERS compiles as a user's program does."""
    env = dict(os.environ if env is None else env)
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        env.setdefault("XLA_FLAGS", QUICK_XLA)
    for name in (os.environ.keys() | env.keys()) - {"JAX_COORDINATOR_PORT"}:
        if name.startswith("JAX_") and env.get(name) != os.environ.get(name):
            raise ValueError(f"{name} would come too late: the server has imported JAX already")
    files = [path or tempfile.mkstemp(dir=_directory())[1] for path in (out, err)]
    return Child([*map(str, arguments)], env, cwd, *files)


def run(arguments, *, env=None, cwd=ROOT, timeout=300):
    """Run `python ARGUMENTS` to its end: subprocess.run with text=True, capture_output=True."""
    child = start(arguments, env=env, cwd=cwd)
    out, err = child.communicate(timeout)
    child.out.unlink()
    child.err.unlink()
    return subprocess.CompletedProcess(child.args, child.returncode, out, err)


def quick(devices=1):
    """The environment of a process that compiles quickly, with so many devices; with XLA_FLAGS set, these hold."""
    flags = os.environ.get("XLA_FLAGS", QUICK_XLA)
    return os.environ | {"XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count={devices}"}


def free_port():
    """A port of this machine that no program uses now."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def _directory():
    global _files
    if _files is None:
        _files = tempfile.TemporaryDirectory(prefix="nanoflax-tests-")
    return _files.name


_files = None


class _Server:
    """This side of the process that forks."""

    def __init__(self):
        env = os.environ | {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"} | HUGE_PAGES
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.processes"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=env,
        )
        self._directory = pathlib.Path(_directory())
        atexit.register(self._process.stdin.close)

    def fork(self, arguments, env, cwd, out, err):
        """The process id of the new program, and the path of the file that will hold its wait status."""
        status = pathlib.Path(tempfile.mktemp(dir=self._directory))
        request = dict(arguments=arguments, env=HUGE_PAGES | env, cwd=cwd, out=out, err=err, status=str(status))
        print(json.dumps(request), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        assert line, f"the server of forks ended with status {self._process.wait()}"
        return int(line), status


def _serve():
    """Fork a process for each request on stdin. Returns the request in the forks; the server never returns."""
    pipe, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    running, open_ = {}, True
    while open_ or running:
        ready, _, _ = select.select([pipe] + [0] * open_, [], [])
        if pipe in ready:
            os.read(pipe, 4096)
            while running:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if not pid:
                    break
                path = running.pop(pid)
                if open_:  # else nobody waits for it
                    pathlib.Path(f"{path}.part").write_text(str(status))
                    os.rename(f"{path}.part", path)
        if 0 in ready:
            line = sys.stdin.buffer.raw.readline()  # unbuffered: select sees all that is not read
            if not line:
                open_ = False
                for pid in running:
                    os.kill(pid, signal.SIGKILL)
                continue
            request = json.loads(line)
            pid = os.fork()
            if not pid:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                os.close(pipe)
                os.close(wake)
                return request
            running[pid] = request["status"]
            print(pid, flush=True)
    os._exit(0)


def _become(request):
    """Take over what a new process would have been given."""
    for number, (name, flags) in enumerate(
        [
            (os.devnull, os.O_RDONLY),
            (request["out"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
            (request["err"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
        ]
    ):
        file = os.open(name, flags, 0o666)
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    sys.path[0] = request["cwd"]


if __name__ == "__main__":
    import importlib

    for library in LIBRARIES:
        importlib.import_module(library)
    gc.freeze()  # the forks share these objects and need not visit them at their end
    request = _serve()
    _become(request)
    option, what, *rest = request["arguments"]
    del library, request
    sys.argv = [what if option == "-m" else "-c", *rest]
    if option == "-m":
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})
