"""The loss curve and the table of parameters: what is there is drawn, whatever a run holds."""

import math
import sys
import types

import numpy as np
import pytest

from nanoflax import report


def test_plot(tmp_path):
    from PIL import Image

    assert report.plot_losses(tmp_path) is None
    loaded = "matplotlib.pyplot" in sys.modules
    with report.MetricsLog(tmp_path, tensorboard=False) as log:
        for step in range(1, 60):
            log.log(step, loss=math.nan if step == 30 else 2 + 3 / step)
            if step % 20 == 0:
                log.log(step, validation_loss=2.1 + 3 / step, bits_per_byte=3.0)
    path = report.plot_losses(tmp_path, tokens_per_step=512)
    assert path == tmp_path / "loss.png" and not list(tmp_path.glob(".*"))
    with Image.open(path) as image:
        image.load()
        assert image.size == (1200, 750) and image.format == "PNG"
        pixels = np.asarray(image.convert("RGB")).astype(int).reshape(-1, 3)
    for red, green, blue in ((31, 119, 180), (255, 127, 14), (44, 160, 44), (214, 39, 40)):
        assert (abs(pixels - (red, green, blue)).sum(1) < 10).sum() > 20  # each mark is there
    assert ("matplotlib.pyplot" in sys.modules) == loaded  # its global state stays alone


@pytest.mark.parametrize(
    "records",
    [
        [{"loss": 2.0}],
        [{"validation_loss": 2.0}],
        [{"loss": 2.0}, {"loss": math.inf}],
        [{"loss": 2.0, "skipped": True}, {"loss": 1.0}],
    ],
)
def test_plot_of_little_data(tmp_path, records):
    with report.MetricsLog(tmp_path, tensorboard=False) as log:
        for step, record in enumerate(records, start=1):
            log.log(step, **record)
    assert report.plot_losses(tmp_path).stat().st_size > 5000


def test_parameter_table_folds_equal_blocks():
    array = lambda *shape, dtype=np.float32: types.SimpleNamespace(  # noqa: E731
        shape=shape, dtype=np.dtype(dtype)
    )
    block = {"mlp": {"kernel": array(10, 300)}, "scale": array(10)}
    params = {"embedding": {"table": array(7, 10, dtype=np.float16)}, "scale": array()}
    params["decoder"] = {f"block_{i}": block for i in range(12)}
    params["decoder"]["block_12"] = {"kernel": array(1)}
    assert report.parameter_table(params).splitlines() == [
        "module                                           parameters  bytes",
        "decoder/block_0 .. decoder/block_11  12 x 3,010      36,120  144kB",
        "decoder/block_12                                          1     4B",
        "embedding                                                70   140B",
        "scale                                                     1     4B",
        "total                                                36,192  145kB",
    ]


def test_an_alignment_is_drawn_where_it_is(tmp_path):
    from PIL import Image

    weights = np.zeros((3, 5), np.float32)
    weights[1, 4] = 1  # one dark cell, in the middle row, on the right
    path = report.plot_alignment(tmp_path / "a.png", weights, ["a", " ", "$x", "年", "\ufffd"], ["b", "\n", "é"])
    with Image.open(path) as image:
        dark = np.asarray(image.convert("RGB")).astype(int) @ (1, 1, 1) < 200
        blue = dark & (np.asarray(image.convert("RGB"))[..., 2] > 90)
    rows, columns = np.nonzero(blue[:, : int(blue.shape[1] * 0.75)])
    assert len(rows) > 50 and abs(rows.mean() / len(blue) - 0.4) < 0.2
    assert columns.mean() / blue.shape[1] > 0.4
