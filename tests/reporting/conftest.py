"""A run folder as training leaves it, without training, and a browser to look at its page."""

import json
import shutil

import numpy as np
import pytest

from sparsemae.reporting.preview import Preview, save_preview
from sparsemae.reporting.segmentation import SegmentationPreview

SHAPE, CELL = (24, 16, 8), 4
BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)


@pytest.fixture
def make_run(tmp_path):
    return lambda name="run", **options: _make(tmp_path / name, **options)


@pytest.fixture
def make_preview():
    return _preview


def _preview(cases=("case a", "case b"), shape=SHAPE, cell=CELL, step=40):
    """Values differ along each axis, so that a swapped or flipped one shows."""
    rng = np.random.default_rng(0)
    grid = tuple(n // cell for n in shape)
    i, j, k = np.meshgrid(*map(np.arange, shape), indexing="ij")
    volume = (i + 30 * j + 500 * k).astype(np.float32)
    original = np.stack([volume + n for n in range(len(cases))])
    visible = rng.random((len(cases), *grid)) < 0.4
    spacing = np.array([[1.0, 1.5, 3.0]] * len(cases))
    restored = 0.8 * original[:, ::-1]
    return Preview(step, tuple(cases), original, restored, visible, (cell,) * 3, spacing)


@pytest.fixture
def make_segmentation():
    return _segmentation


def _segmentation(cases=("case a", "case b"), names=("background", "shell", "core"), ignore=False):
    """A bar of each class along an axis of its own, and other bars predicted."""
    shape = (len(cases), *SHAPE)
    image = np.indices(shape).transpose(1, 2, 3, 4, 0) @ np.array([1.0, 1, 30, 500])
    reference, prediction = np.zeros((2, *shape), int)
    reference[:, 3:20, 2:5, 1:3] = 1
    reference[0, 10:13, 5:15, 2:6] = 2
    prediction[:, 5:22, 3:5, 2:7] = 2
    prediction[-1, 1:3, 4:14, :] = 1
    if ignore:
        reference[0, 20:, 8:, :5] = len(names) - 1
    spacing = np.array([[1.0, 1.5, 3.0]] * len(cases))
    volumes = image.astype(np.float32), reference, prediction
    return SegmentationPreview(40, cases, *volumes, names, ignore, spacing)


def _make(run, steps=40, preview=None, odd=(), nan=(), state="finished", **status):
    run.mkdir(parents=True)
    (run / "config.toml").write_text('seed = 0\n[model]\npreset = "tiny"\n[train]\nlr = 0.002\n')
    metrics, timing = [], []
    for step in range(1, steps + 1):
        loss = None if step in nan else 3.0 / step + 0.2
        line = {"step": step, "loss": loss, "lr": 1e-3 * (1 - step / steps), "grad_norm": 2.0}
        if step in odd:
            line |= {"spike": True, "cases": [f"case {step}"]}
        if step in nan:
            line |= {"skipped": True, "cases": [f"case {step}"]}
        metrics.append(line)
        times = {"seconds": 0.5, "wait_seconds": 0.05, "samples": 2, "memory_bytes": None}
        timing.append({"step": step, **times, "time": 1.7e9 + step})
        if step % (steps // 4) == 0:
            metrics.append({"step": step, "val_loss": 2.0 / step + 0.3})
            timing.append({"step": step, "save_seconds": 0.25, "time": 1.7e9 + step})
    for name, lines in (("metrics", metrics), ("timing", timing)):
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (run / f"{name}.jsonl").write_text(text)
    event = {"time": 1.7e9, "step": 0, "event": "started", "message": ""}
    (run / "history.jsonl").write_text(json.dumps(event) + "\n")
    values = {"state": state, "step": steps, "steps": steps, "checkpoint": steps, "message": ""}
    values |= {"best": {"step": steps, "val_loss": 0.35}, "exit_code": 0, "device": "cpu"}
    values |= {"host": "node", "store": "/data/store", "world_size": 1, **status}
    (run / "status.json").write_text(json.dumps(values))
    (run / ".lock").touch()
    if preview is not None:
        save_preview(run, preview)
    return run


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api")
    if not BROWSER:
        pytest.skip("no chromium on PATH")
    with api.sync_playwright() as driver:
        # a container's root has no sandbox
        options = {"executable_path": BROWSER, "args": ["--no-sandbox"]}
        with driver.chromium.launch(**options) as started:
            yield started


@pytest.fixture
def page(browser):
    """A page that fails its test for any error, and for any request beyond its file."""
    trouble = []
    page = browser.new_page(viewport={"width": 1300, "height": 900})
    page.on("console", lambda m: trouble.append(m.text) if m.type == "error" else None)
    page.on("pageerror", lambda error: trouble.append(str(error)))
    page.on("request", lambda request: trouble.append(request.url) if asked(request) else None)
    yield page
    page.close()
    assert trouble == []


def asked(request):
    return not request.url.startswith(("file:", "data:", "blob:"))
