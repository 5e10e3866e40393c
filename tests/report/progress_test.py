"""What a person sees of a run: metrics that are exact, bars that leave the terminal as it was."""

import glob
import importlib.util
import io
import json
import math
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import time

import numpy as np
import pytest

from nanoflax import report
from nanoflax.errors import UserError


def write_log(workdir, steps, resume_step=0):
    with report.MetricsLog(workdir, tensorboard=False, resume_step=resume_step) as log:
        for step in steps:
            log.log(step, loss=10.0 - step)


def steps_of(workdir):
    return [r["step"] for r in report.read_metrics(workdir / "metrics.jsonl")]


# ---------------------------------------------------------------------------------- metrics files


def test_resume_keeps_each_step_once(tmp_path):
    write_log(tmp_path, range(1, 8))
    before = (tmp_path / "metrics.jsonl").read_bytes().splitlines()[:4]
    write_log(tmp_path, range(5, 9), resume_step=4)
    assert steps_of(tmp_path) == list(range(1, 9))
    assert (tmp_path / "metrics.jsonl").read_bytes().splitlines()[:4] == before
    write_log(tmp_path, [1], resume_step=0)
    assert steps_of(tmp_path) == [1]
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


def test_a_line_cut_anywhere_by_a_kill_is_repaired(tmp_path):
    write_log(tmp_path, [1, 2, 3])
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        last = report.read_metrics(path)[-1]["step"] if report.read_metrics(path) else 0
        assert last >= whole[:size].count(b"\n")
        write_log(tmp_path, range(last + 1, 4), resume_step=last)
        assert path.read_bytes() == whole


def test_a_damaged_line_in_the_middle_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(UserError, match="metrics.jsonl, line 2"):
        report.read_metrics(path)


def test_floats_are_exact_whatever_their_type(tmp_path):
    import jax.numpy as jnp

    generator = np.random.default_rng(0)
    bits = generator.integers(1, 0x7F000000, 300, dtype=np.uint32).view(np.float32)
    with report.MetricsLog(tmp_path, tensorboard=False) as log:
        for step, value in enumerate(bits):
            log.log(step, loss=value, double=float(value) / 3, array=jnp.float32(value), half=jnp.bfloat16(value))
    for value, record in zip(bits, report.read_metrics(log.path), strict=True):
        assert np.float32(record["loss"]).tobytes() == value.tobytes()
        assert record["double"] == float(value) / 3
        assert record["array"] == jnp.float32(value).item()
        assert record["half"] == float(jnp.bfloat16(value))


def test_non_finite_values_are_strict_json(tmp_path):
    def refuse(constant):
        raise AssertionError(constant)

    with report.MetricsLog(tmp_path, tensorboard=False) as log:
        log.log(1, loss=math.nan, grad_norm=np.float32(np.inf), low=-math.inf)
    record = json.loads(log.path.read_text(), parse_constant=refuse)
    assert record == {"step": 1, "loss": "nan", "grad_norm": "inf", "low": "-inf"}
    (record,) = report.read_metrics(log.path)
    assert math.isnan(record["loss"]) and record["grad_norm"] == math.inf == -record["low"]


def test_lines_are_on_disk_at_once(tmp_path):
    log = report.MetricsLog(tmp_path, tensorboard=False)
    log.log(1, loss=2.5)
    assert report.read_metrics(log.path) == [{"step": 1, "loss": 2.5}]
    log.close()


def test_no_room_and_no_directory_are_one_line(tmp_path):
    with pytest.raises(UserError, match="cannot write .*metrics.jsonl: No such file"):
        report.MetricsLog(tmp_path / "absent", tensorboard=False)
    log = report.MetricsLog(tmp_path, tensorboard=False)
    file, log._file = log._file, open("/dev/full", "wb", buffering=0)
    for step in (1, 2):
        log.log(step, loss=2.5)
    full, log._file = log._file, file
    log.log(3, loss=2.5)  # now there is room
    assert [record["step"] for record in report.read_metrics(log.path)] == [1, 2, 3]
    log._file = full
    log.log(4, loss=2.5)
    with pytest.raises(UserError, match="metrics.jsonl: No space left"):
        log.close()
    assert full.closed


def read_events(workdir):
    """Of each event file, in order: its steps of purge and its (tag, step, value)."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted(glob.glob(str(workdir / "tensorboard" / "*"))):
        data, events = open(path, "rb").read(), []
        while data:
            (size,) = struct.unpack("<Q", data[:8])
            events.append(Event.FromString(data[12 : 12 + size]))
            data = data[16 + size :]
        found.append(
            (
                [e.step for e in events if e.HasField("session_log")],
                [(v.tag, e.step, v.simple_value) for e in events for v in e.summary.value],
            )
        )
    return found


def test_tensorboard_reads_back_and_hides_what_a_kill_left(tmp_path):
    for resume_step, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        with report.MetricsLog(tmp_path, resume_step=resume_step) as log:
            for step in steps:
                log.log(step, loss=step + 0.5, note="text", bad=math.nan)
    first, second = read_events(tmp_path)
    assert first == ([1], [("loss", s, s + 0.5) for s in (1, 2, 3)])
    assert second == ([3], [("loss", s, s + 0.5) for s in (3, 4)])


def test_a_failing_tensorboard_does_not_stop_the_run(tmp_path, capsys):
    (tmp_path / "tensorboard").write_text("in the way")
    with report.MetricsLog(tmp_path) as log:
        for step in range(3):
            log.log(step, loss=1.0)
    assert steps_of(tmp_path) == [0, 1, 2]
    assert capsys.readouterr().err.count("no more TensorBoard events are written") == 1


def test_the_first_line_waits_for_no_library(tmp_path):
    code = (
        "import sys; from nanoflax import report; log = report.MetricsLog(sys.argv[1]);"
        "report.TrainingProgress(3, stream=sys.stdout).update(1, 2.0);"
        "print(sorted({'jax', 'tensorboardX', 'matplotlib', 'wandb'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code, tmp_path], text=True, capture_output=True)
    assert run.stdout.splitlines()[-1] == "[]", run.stderr


def test_wandb_missing_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"pip install nanoflax\[wandb\]"):
        report.MetricsLog(tmp_path, tensorboard=False, wandb="project")


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="needs nanoflax[wandb]")
def test_wandb_offline_goes_on_with_the_same_run(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    for resume_step in (0, 2):
        with report.MetricsLog(
            tmp_path, tensorboard=False, wandb="project", config={"dim": 8}, resume_step=resume_step
        ) as log:
            log.log(resume_step + 1, loss=2.5)
            assert log._wandb.settings.mode == "offline"
    run_id = (tmp_path / "wandb" / "run_id").read_text()
    files = glob.glob(str(tmp_path / "wandb" / "offline-run-*" / "*.wandb"))
    assert files and all(run_id in file for file in files)
    assert any(b"loss" in open(file, "rb").read() for file in files)


# --------------------------------------------------------------------------------------- progress


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def make_progress(**kwargs):
    clock = Clock()
    defaults = dict(
        total_steps=100, tokens_per_step=1000, flops_per_token=10, peak_flops=20_000, stream=io.StringIO(), clock=clock
    )
    return report.TrainingProgress(**defaults | kwargs), clock


def test_rates_leave_out_compilation_and_pauses():
    progress, clock = make_progress(start_step=40)
    clock.now += 30  # compiling
    progress.update(41, 5.0)
    assert progress.tokens_per_second is progress.mfu is progress.seconds_left() is None
    for step in range(42, 51):
        clock.now += 1
        progress.update(step, 5.0)
    assert progress.tokens_per_second == pytest.approx(1000)
    assert progress.mfu == pytest.approx(0.5)
    assert progress.seconds_left() == pytest.approx(50)
    with progress.pause():
        clock.now += 9  # as long again as the training so far
    for step in range(51, 60):
        clock.now += 1
        progress.update(step, 5.0)
    assert progress.tokens_per_second == pytest.approx(1000)
    assert progress.seconds_left() == pytest.approx(41 * 27 / 18)


def test_rates_and_the_time_left_leave_out_what_compiles():
    compiled = [0.0]
    progress, clock = make_progress(ignored=lambda: compiled[0])

    def compile_for(seconds):
        clock.now += seconds
        compiled[0] += seconds

    for step in range(1, 31):
        if step in (1, 4, 5, 20):  # a batch of another shape
            compile_for(7)
        clock.now += 1
        progress.update(step, 5.0)
        if step % 10 == 0:
            with progress.pause():
                if step == 10:
                    compile_for(60)
                clock.now += 2
    assert progress.tokens_per_second == pytest.approx(1000)
    assert progress.seconds_left() == pytest.approx(70 * (29 + 6) / 29)


def test_an_mfu_above_100_percent_is_never_shown():
    progress, clock = make_progress(peak_flops=20_000)
    shown = []
    with progress:
        for step in range(1, 99):
            clock.now += 0.4 if 20 <= step < 90 else 1  # 50%, then up to 125%
            progress.update(step, 5.0)
            shown.append(progress.mfu)
            assert "MFU" in progress.status() if progress.mfu else "MFU" not in progress.status()
    assert shown[1] == pytest.approx(0.5) and max(x or 0 for x in shown) <= 1
    assert shown[-1] is None, "the peak has proved wrong"


def test_a_step_with_a_reward_shows_it_beside_the_loss():
    progress, _ = make_progress()
    progress.update(1, loss=5.0, rollout_reward=0.25, grad_norm=1.0)
    assert progress.status().startswith("loss 5.0000  reward 0.250")
    progress.update(2, 5.0)
    assert "reward" not in progress.status()


def test_rates_slide():
    progress, clock = make_progress(total_steps=1000)
    for step in range(1, 101):
        clock.now += 1.0 if step < 50 else 0.5
        progress.update(step, 5.0)
    assert progress.tokens_per_second == pytest.approx(2000)
    assert len(progress._marks) < 60


def test_rates_of_slow_steps_and_an_idle_clock():
    progress, clock = make_progress()
    progress.update(1, 5.0)
    progress.update(2, 5.0)  # no time has passed: no division by zero
    assert progress.tokens_per_second is None
    progress, clock = make_progress()
    for step in (1, 2, 3):
        clock.now += 60  # longer than the window
        progress.update(step, 5.0)
    assert progress.tokens_per_second == pytest.approx(1000 / 60)


def test_plain_lines_are_few_and_hold_first_and_last():
    progress, clock = make_progress(total_steps=50)
    with progress:
        for step in range(1, 51):
            clock.now += 1
            progress.update(step, 3.0 + 1 / step)
            if step == 5:
                progress.write("a sample")
    lines = progress._stream.getvalue().splitlines()
    assert lines[:3] == [
        "step 1/50  loss 4.0000",
        "a sample",
        "step 11/50  loss 3.0909  1k tokens/s  MFU 50%  0:39 left",
    ]
    assert lines[-1] == "step 50/50  loss 3.0200  1k tokens/s  MFU 50%  in 0:50"
    assert [int(line.split()[1].split("/")[0]) for line in lines if "step" in line] == [1, 11, 21, 31, 41, 50]


def test_the_last_line_comes_when_a_run_stops_early():
    progress, clock = make_progress(flops_per_token=None)
    with pytest.raises(KeyboardInterrupt), progress:
        for step in range(1, 5):
            clock.now += 1
            progress.update(step, math.nan)
        raise KeyboardInterrupt
    assert progress._stream.getvalue().splitlines()[-1] == ("step 4/100  loss nan  1k tokens/s  1:36 left")


def test_a_stream_that_goes_away_does_not_end_the_run():
    class Gone(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    progress, _ = make_progress(stream=Gone())
    with progress:
        progress.update(1, 5.0)
        progress.write("text")


BAR = """
import signal, sys, time
from nanoflax import report
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job inherits it ignored
progress = report.TrainingProgress(20, tokens_per_step=1000, flops_per_token=10, peak_flops=1e6)
progress.draw_every = 0
with progress:
    print("READY", file=sys.stderr)
    for step in range(1, 21):
        time.sleep(0.01)
        progress.update(step, 2.0)
        if step == 10:
            progress.write("sample [bold]:smile: \\x1b[31mred")
            print("to stdout")
            %s
"""


def run_in_terminal(program, kill=None):
    """Runs it under a pty; returns what stderr's terminal got, what stdout got, and the status."""
    master, slave = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "100"}
    process = subprocess.Popen(
        [sys.executable, "-c", program], stderr=slave, env=environment, stdin=slave, stdout=subprocess.PIPE
    )
    os.close(slave)
    output, deadline = b"", time.monotonic() + 30
    while time.monotonic() < deadline:
        if select.select([master], [], [], 0.1)[0]:
            try:
                output += os.read(master, 65536)
            except OSError:  # the other end is closed
                break
        if kill and b"step 10/20" in output:
            process.send_signal(kill)
            kill = None
    os.close(master)
    stdout = process.communicate(timeout=10)[0].decode()
    return output.decode(), stdout, process.returncode


def assert_terminal_as_it_was(output):
    assert output.rfind("\x1b[?25l") <= output.rfind("\x1b[?25h")  # the cursor shows
    assert "\x1b[?1049h" not in output  # no other screen was opened


def test_bar_on_a_terminal():
    output, stdout, status = run_in_terminal(BAR % "pass")
    assert status == 0
    assert "compiling" in output and "━" in output
    assert "step 20/20" in output and "loss 2.0000" in output and "MFU" in output
    assert r"sample [bold]:smile: \x1b[31mred" in output
    assert "to stdout" not in output and stdout == "to stdout\n"  # `> file` gets its lines
    assert_terminal_as_it_was(output)


@pytest.mark.parametrize(
    "action, kill, status",
    [
        ("raise ValueError('broken')", None, 1),
        ("time.sleep(30)", signal.SIGINT, -signal.SIGINT),
        ("time.sleep(30)", signal.SIGTERM, -signal.SIGTERM),
        ("time.sleep(30)", signal.SIGKILL, -signal.SIGKILL),
    ],
)
def test_the_terminal_survives(action, kill, status):
    output, _, returned = run_in_terminal(BAR % action, kill)
    assert returned == status
    assert "step 10/20" in output
    assert_terminal_as_it_was(output)


# ----------------------------------------------------------------------------------- text helpers


@pytest.mark.parametrize(
    "number, text",
    [
        (0, "0"),
        (7, "7"),
        (999, "999"),
        (999.6, "1k"),
        (4500, "4.5k"),
        (999_999, "1M"),
        (1_234_567, "1.23M"),
        (124e6, "124M"),
        (1.1e9, "1.1B"),
        (45.1e12, "45.1T"),
        (2e16, "2e+04T"),
        (-4500, "-4.5k"),
        (math.nan, "nan"),
        (math.inf, "inf"),
    ],
)
def test_count(number, text):
    assert report.format_count(number) == text


@pytest.mark.parametrize(
    "seconds, text",
    [(0, "0:00"), (6.6, "0:07"), (59.7, "1:00"), (201, "3:21"), (3723, "1:02:03"), (90061, "25:01:01"), (-3, "0:00")],
)
def test_duration(seconds, text):
    assert report.format_duration(seconds) == text


def test_printable_escapes_what_drives_a_terminal_and_nothing_else():
    kept = "a\n\tb é 漢字 🙂 שלום \u200d \\x1b"
    assert report.printable(kept) == kept
    assert report.printable("\x1b]0;t\x07\r\x00\x7f\x9b\u202e\u2066\ud800") == (
        r"\x1b]0;t\x07\r\x00\x7f\x9b\u202e\u2066\ud800"
    )
    every = "".join(map(chr, range(0x110000)))
    shown = report.printable(every)
    assert not any(ord(c) < 32 and c not in "\n\t" or 127 <= ord(c) < 160 for c in shown)
    shown.encode()
