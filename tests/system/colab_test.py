"""The notebooks of experiments/colab, run from top to bottom in a kernel with a few steps."""

import base64
import configparser
import io
import json
import pathlib
import re
import subprocess
import sys
import types

import matplotlib.image
import nbformat
import numpy as np
import pytest
from IPython.core.inputtransformer2 import TransformerManager
from nbclient import NotebookClient

from tests import processes

ROOT = pathlib.Path(__file__).resolve().parents[2]
NOTEBOOKS = {path.stem: path for path in (ROOT / "experiments" / "colab").glob("*.ipynb")}
PROMPT = "The function returns"


def execute(name, **parameters):
    """A notebook after it ran, its cell of parameters followed by one with these."""
    book = nbformat.read(NOTEBOOKS[name], 4)
    (at,) = (i for i, cell in enumerate(book.cells) if "parameters" in cell.metadata.get("tags", ()))
    values = "\n".join(f"{key} = {value!r}" for key, value in parameters.items())
    book.cells.insert(at + 1, nbformat.v4.new_code_cell(values))
    client = NotebookClient(book, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}})
    return client.execute(env=processes.quick())


def outputs(book):
    return [output for cell in book.cells for output in cell.get("outputs", ())]


def printed(book):
    return "".join(o.text for o in outputs(book) if o.output_type == "stream")


def pictures(book):
    """The pixels of every picture in the outputs."""
    return [
        matplotlib.image.imread(io.BytesIO(base64.b64decode(o.data["image/png"])))
        for o in outputs(book)
        if "image/png" in o.get("data", ())
    ]


def losses(workdir):
    records = map(json.loads, (workdir / "metrics.jsonl").open())
    return [record["loss"] for record in records if "loss" in record]


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("pretrained") / "run"
    return workdir, execute("pretrain", STEPS=12, BATCH=4, WORKDIR=str(workdir))


def test_pretrain_learns_draws_and_writes(pretrained):
    workdir, book = pretrained
    found = losses(workdir)
    assert len(found) == 12 and found[-1] < found[0] - 0.5
    text = printed(book)
    first, log_v = re.search(r"loss (\S+) nats per token; log V is (\S+)", text).groups()
    assert float(first) == pytest.approx(float(log_v), abs=0.3)
    assert "step 12/12" in text and "finished at step 12; best at step 12" in text
    by_hand = [float(loss) for loss in re.findall(r"^loss ([\d.]+)  gradient norm", text, re.M)]
    assert len(by_hand) == 3 and by_hand[2] < by_hand[0]
    (picture,) = pictures(book)
    assert picture.std() > 0.05
    sample = printed(nbformat.v4.new_notebook(cells=book.cells[-2:]))
    assert sample.startswith(PROMPT) and len(sample) > len(PROMPT) + 20


def test_sample_shows_every_way_to_choose(pretrained):
    book = execute("sample", MODEL=str(pretrained[0]), PROMPT=PROMPT, NEW_TOKENS=8)
    (picture,) = pictures(book)
    assert picture.std() > 0.05
    (table,) = (o.data["text/html"] for o in outputs(book) if "text/html" in o.get("data", ()))
    continued = re.findall(r"<b>(.*?)</b><pre[^>]*>(.*?)</pre>", table, re.S)
    assert [name for name, _ in continued] == ["greedy", "temperature 1", "temperature 0.7", "top-p 0.9"]
    assert all(text.startswith(PROMPT) for _, text in continued)
    assert len({text for _, text in continued}) > 1
    text = printed(book)
    assert re.findall(r"^(True|False) \|", text, re.M) == ["True"] * 3
    scores = [float(x) for x in re.findall(r"^(?:greedy|\d beams) +(\S+) \|", text, re.M)]
    assert len(scores) == 3 and max(scores[1:]) >= scores[0] - 1e-3 and max(scores) < 0
    assert len(re.findall(r"B=\d+: [\d,]+ tokens a second", text)) == 2


def test_finetune_trains_all_and_an_adapter(pretrained, tmp_path):
    words = ("cat", "dog", "cow", "hen")
    (tmp_path / "data.jsonl").write_text(
        "".join(
            json.dumps({"text": " ".join([word] * n), "label": word}) + "\n" for n in range(1, 21) for word in words
        )
    )
    book = execute(
        "finetune",
        STEPS=24,
        BATCH=8,
        DATA=f"jsonl:{tmp_path / 'data.jsonl'}",
        SOURCE=str(pretrained[0]),
        WORKDIR=str(tmp_path),
    )
    for name in ("all", "lora"):
        found = losses(tmp_path / name)
        assert len(found) == 24 and np.mean(found[-5:]) < 0.8 * np.mean(found[:5])
    text = printed(book)
    rows = {
        name: (float(accuracy), int(size.replace(",", "")))
        for name, accuracy, size in re.findall(r"^(all|lora) +([\d.]+)% +([\d,]+) ", text, re.M)
    }
    assert rows["lora"][1] < rows["all"][1] / 4
    for name, (accuracy, size) in rows.items():
        result = json.loads((tmp_path / name / "result.json").read_text())
        assert (accuracy, size) == (pytest.approx(100 * result["accuracy"], abs=0.06), result["trained_parameters"])
    assert [picture.std() > 0.05 for picture in pictures(book)] == [True, True]
    assert text.count("macro average") == 2
    assert len(re.findall(r"-> (\w+ \d+%, ){2}\w+ \d+%", text)) == 3


def test_the_notebooks_install_from_the_address_of_setup_cfg():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    for path in NOTEBOOKS.values():
        (address,) = re.findall(r"REPOSITORY = (\S+)  #", nbformat.read(path, 4).cells[1].source)
        assert address == f'"{setup["metadata"]["url"]}"'


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebooks_use_the_library_alone(name):
    code = "\n".join(cell.source for cell in nbformat.read(NOTEBOOKS[name], 4).cells if cell.cell_type == "code")
    assert not re.search(r"^\s*(from|import) experiments", code, re.M) and "import nanoflax" in code


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebooks_hold_no_results(name):
    book = nbformat.read(NOTEBOOKS[name], 4)
    nbformat.validate(book)
    for cell in book.cells:
        if cell.cell_type == "code":
            assert not cell.outputs and cell.execution_count is None, cell.source
        assert len(cell.source) < 1800 and max(map(len, cell.source.splitlines())) <= 110


@pytest.mark.parametrize("name", NOTEBOOKS)
@pytest.mark.parametrize(
    "devices, extra", [([], ""), (["/dev/nvidia0"], "[gpu]"), (["/dev/accel0"], "[tpu]"), (["/dev/vfio/0"], "[tpu]")]
)
def test_on_colab_the_first_cell_installs_for_its_runtime(name, devices, extra, monkeypatch):
    cell = next(c for c in nbformat.read(NOTEBOOKS[name], 4).cells if c.cell_type == "code")
    code, ran, status = TransformerManager().transform_cell(cell.source), [], 0
    monkeypatch.setattr(
        "glob.glob", lambda pattern: [d for d in devices if re.fullmatch(pattern.replace("*", ".*"), d)]
    )
    monkeypatch.setattr("os.path.exists", lambda path: path in devices)

    def run(command, **options):
        ran.append(command)
        return subprocess.CompletedProcess(command, status, "", "ERROR: no such repository")

    monkeypatch.setattr("subprocess.run", run)
    exec(code, {})
    assert not ran  # here is no Colab
    monkeypatch.setitem(sys.modules, "google.colab", types.ModuleType("google.colab"))
    exec(code, {})
    assert ran[0][:-1] == [sys.executable, "-m", "pip", "install", "-q"]
    assert re.fullmatch(rf"nanoflax{re.escape(extra)} @ git\+https://\S+", ran[0][-1])
    status = 1  # the notebook stops, and says why
    with pytest.raises(RuntimeError, match="is REPOSITORY right.\nERROR: no such repository"):
        exec(code, {})
    assert "!pip" not in cell.source and "%pip" not in cell.source
