"""The page and the contact sheet: what they show, that nothing runs in them, and their bounds."""

import base64
import io
import re
from dataclasses import replace
from html.parser import HTMLParser

import matplotlib.image
import numpy as np
import pytest

from sparsemae.data.codes import CODES
from sparsemae.data.making.case import Record
from sparsemae.data.making.ledger import FAILURES, WARNINGS, write_records
from sparsemae.data.report import write_report
from sparsemae.data.reporting.charts import bars, lines
from sparsemae.data.reporting.contact import AXES, View, card, contact_sheet, views
from sparsemae.data.reporting.survey import EXAMPLES, Intensities, survey
from sparsemae.data.store import Store, write_index

EVIL = "<script>alert('1')</script>\"&"
VOID = {"meta", "img", "br"}


def head(shape=(30, 40, 20), seed=0):
    array = np.full(shape, -1.5, np.float32)
    inner = tuple(slice(n // 4, -n // 4) for n in shape)
    noise = np.random.default_rng(seed).standard_normal(array[inner].shape)
    array[inner] = noise.astype(np.float16)
    return array


def record(code, i=0, stage="read", message=None):
    path = f"/data/{i}.nii"
    return Record(
        **{"id": f"x{i}", "path": path, "size": 1, "mtime": 0.0, "stamp": "1-2", "stage": stage},
        **{"code": code, "message": message or f"{path}: wrong", "seconds": 0.1},
    )


class Page(HTMLParser):
    """Tags with their attributes, the text, and that all is closed in order."""

    def __init__(self, path):
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.tags, self.open, self.words = [], [], []
        self.feed(self.source)
        self.close()
        assert self.open == []
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.words.append(data)

    def attributes(self, name):
        return [value for _, attributes in self.tags if (value := attributes.get(name))]


def picture(data):
    return matplotlib.image.imread(io.BytesIO(data), format="png")


@pytest.fixture
def store(make_store, tmp_path):
    masks = {"b": np.arange(30)[:, None, None] * np.ones((30, 40, 20)) > 20}
    arrays = {name: head(seed=i) for i, name in enumerate("abc")}
    return make_store(tmp_path / "st", arrays, masks, modality="T1w", dataset="heads")


def test_the_page_tells_what_is_in_the_store(store):
    failures = [record("container.truncated", i) for i in range(7)]
    failures += [record("unexpected.OSError", 8), record("quality.slices", 9, "filter")]
    write_records(store.path, FAILURES, failures)
    notes = [record("duplicate.content", i) for i in range(3)] + [record("geometry.units", 1)]
    write_records(store.path, WARNINGS, notes)
    write_report(store.path)
    page = Page(store.path / "dataset.html")
    for words in (
        *("3 volumes stored", "3 of them with a warning", "8 rejected", "3 copies of another"),
        *("1 left out by the filter", "3 for training", "0 for validation", "3 subjects"),
        *("1 with excluded voxels", "72 k voxels", "heads T1w 3 3 0", "normalization zscore"),
        *("container.truncated 7", "unexpected.OSError 1", "geometry.units 1", "the first 5"),
        *(CODES["container.truncated"].summary, CODES["container.truncated"].remedy),
        *("/data/4.nii: wrong", "All volumes: axial", "docs/bad-input.md"),
    ):
        assert words in page.text, words
    assert "/data/5.nii: wrong" not in page.text
    assert page.text.index("Rejected") < page.text.index("Left out") < page.text.index("Used with")
    assert set(page.attributes("href")) == {f"#{i}" for i in page.attributes("id")}


def test_the_page_stands_alone(store):
    write_report(store.path)
    page = Page(store.path / "dataset.html")
    assert {"script", "link", "iframe", "object", "base"}.isdisjoint(tag for tag, _ in page.tags)
    assert not re.search(r"https?:|//|@import|url\(", re.sub(r'src="[^"]+"', "", page.source))
    assert "default-src 'none'" in page.source
    (source,) = page.attributes("src")
    kind, _, data = source.partition("base64,")
    assert kind == "data:image/png;"
    sheet = (store.path / "contact.png").read_bytes()
    assert base64.b64decode(data) == sheet
    assert picture(sheet).shape[1] == 3 * (290 + 16) + 14
    names = {path.name for path in store.path.iterdir()}
    assert names == {"index.json", "cases", "excluded", "dataset.html", "contact.png"}


def test_names_are_text_and_nothing_else(make_store, tmp_path):
    """Of files, folders, data sets and messages; also where they are no UTF-8 or turn the line."""
    folder = tmp_path / "<b onload=x>"
    store = make_store(folder, {"a": head()}, dataset=EVIL, modality="<svg onload=alert(1)>")
    case = replace(store.cases[0], id=EVIL, source=f"/data/{EVIL}")
    write_index(folder, [case], store.config)
    message = f"/data/{EVIL}\udcff\u202e/x: </li></table>"
    write_records(folder, FAILURES, [record(EVIL, message=message)])
    write_records(folder, WARNINGS, [record("x.<i>", message=message)])
    write_report(folder)
    page = Page(folder / "dataset.html")
    assert {"script", "i"}.isdisjoint(tag for tag, _ in page.tags)
    assert not any(name.startswith("on") for _, names in page.tags for name in names)
    assert page.text.count(EVIL) >= 4
    assert "<b onload=x>" in page.text
    assert r"\udcff\u202e" in page.text


@pytest.mark.parametrize("odd", ["$x^{2}$ and $", r"$\frac$ $^$", "患者", "a" * 200, "%s{0}"])
def test_any_id_can_be_drawn(make_store, tmp_path, odd, recwarn):
    store = make_store(tmp_path / "st", {"a": head()})
    case = replace(store.cases[0], id=odd)
    write_index(store.path, [case], store.config)
    contact_sheet(Store.open(store.path), tmp_path / "c.png")
    assert not [w for w in recwarn if "Glyph" in str(w.message)]
    (view,) = views(Store.open(store.path))
    assert len(card(view).title) <= 48


def test_thousands_of_cases_make_no_larger_page(make_store, tmp_path):
    noise = np.random.default_rng(0).standard_normal((96, 96, 96)).astype(np.float16)
    store = make_store(tmp_path / "st", {"a": noise.astype(np.float32)})
    first = store.cases[0]
    cases = [
        replace(first, id=f"case-{i:05d}", subject=str(i // 2), dataset=f"set {i % 50:02d}")
        for i in range(5000)
    ]
    write_index(store.path, cases, store.config)
    records = [record("container.empty", i, message="x" * 3000) for i in range(3000)]
    write_records(store.path, FAILURES, records)
    write_report(store.path)
    assert (store.path / "dataset.html").stat().st_size < 5_000_000  # of noise: the worst case
    page = Page(store.path / "dataset.html")
    assert "60 of 5000 volumes, evenly chosen" in page.text
    assert "30 others 3000 3000 0" in page.text
    assert "container.empty 3000" in page.text
    facts = survey(Store.open(store.path))
    assert len(facts.rejected["container.empty"].examples) == EXAMPLES
    assert facts.subjects == 5000  # a subject's name counts within its data set only


def test_cases_are_chosen_evenly(store):
    cases = [replace(store.cases[0], id=f"{i:03d}") for i in range(101)]
    write_index(store.path, cases, store.config)
    opened = Store.open(store.path)
    assert [view.case.id for view in views(opened, 5)] == ["000", "025", "050", "075", "100"]
    assert [view.case.id for view in views(opened, 1)] == ["000"]
    assert len(list(views(opened, 200))) == 101


def test_planes_are_the_middle_ones(store):
    case = store.cases[1]
    array = store.read(case)[0]
    view = list(views(store))[1]
    for axis, plane, mask in zip(AXES, view.planes, view.excluded, strict=True):
        np.testing.assert_array_equal(plane, array.take(array.shape[axis] // 2, axis))
        assert mask.shape == plane.shape
    assert [mask.mean().round(2) for mask in view.excluded] == [0.3, 0.3, 0.0]


def test_a_card_has_proportions_direction_and_excluded_voxels(make_store, tmp_path):
    """Bright at the right, the front and the top; 2 mm slices; the left is excluded."""
    array = np.full((48, 96, 24), -1.5, np.float32)
    array[36:, 60:, 12:] = 2
    mask = np.zeros(array.shape, bool)
    mask[:12] = mask[42:] = True
    store = make_store(tmp_path / "st", {"a": array}, {"a": mask}, spacing=(1.0, 1.0, 2.0))
    (view,) = views(store)
    image = card(view).picture.astype(int)
    assert image.shape == (96, 3 * 96 + 4, 3)
    axial, coronal, sagittal = (image[:, k * 98 :][:, :96] for k in range(3))
    assert np.all(axial[:, :24] == 20)  # half as wide as high, on an empty ground
    assert np.all(axial[:, 72:] == 20)
    assert np.all(axial[:30, 62:66] == 255)  # front and right
    assert np.all(axial[:30, 67:72] == (255, 150, 126))  # excluded there too
    assert np.all(axial[40:, 40:66] == 0)
    left = axial[:, 24:36].reshape(-1, 3)
    assert np.all(left[:, 0] > left[:, 1] + 50)
    assert np.ptp(coronal[24:72, 40:58], axis=None) == 0  # dark: the middle plane is behind
    assert np.all(sagittal[24:72] == 0)  # and left of what is bright
    assert np.all(sagittal[:24] == 20)


def test_intensities_leave_out_air_and_gather_what_lies_beyond(store):
    case = store.cases[0]
    plane = np.float16([[case.background] * 7 + [0.01, 0.01, 900]])
    counted = Intensities(store.config)
    counted.add(View(case, [plane], [plane > 9]))
    counted.add(View(case, (), (), "damaged"))
    counted.add(View(case, [np.full((2, 2), case.background, np.float16)], []))
    (row,) = counted.rows
    assert row.sum() == pytest.approx(1)
    assert row[-1] == pytest.approx(1 / 3)
    assert row[np.searchsorted(counted.edges, 0.01) - 1] == pytest.approx(2 / 3)


def test_damaged_cases_are_named_and_the_rest_is_drawn(store):
    path = store.path / store.cases[1].file
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    (store.path / store.cases[2].file).unlink()
    write_report(store.path)
    page = Page(store.path / "dataset.html")
    assert "Damaged files" in page.text
    assert str(path) in page.text
    assert str(store.path / store.cases[2].file) in page.text
    assert "Stored intensities, 1 drawn;" in page.text


def numbers(svg, tag, name):
    return [float(v) for v in re.findall(rf'<{tag} [^>]*\b{name}="([-\d.]+)"', svg)]


def test_bars_count_every_value():
    values = [1.0] * 30 + [1.2] * 10 + [3.0] * 2
    svg = bars(values, "mm")
    counts = [int(n) for n in re.findall(r"<title>(\d+) from", svg)]
    assert counts == [30, 10, 2]
    heights = numbers(svg, "rect", "height")
    assert heights[0] == pytest.approx(3 * heights[1], abs=0.2)
    tailed = bars([1.0] * 300 + [2.0] * 20 + [5000.0], "mm")
    assert "1 larger, up to 5000" in tailed
    assert sum(int(n) for n in re.findall(r"<title>(\d+) from", tailed)) == 321


@pytest.mark.parametrize("values", [[1.0], [0.0, 0.0], [5.0] * 9, [1.0, 1.0 + 1e-12], [0.0, 1e9]])
def test_bars_of_hardly_any_values(values):
    svg = bars(values, "mm")
    assert sum(int(n) for n in re.findall(r"<title>(\d+) from", svg)) == len(values)
    assert "nan" not in svg
    assert all(0 <= x <= 340 for x in numbers(svg, "rect", "x"))


def test_lines_stay_inside():
    edges = np.linspace(-1, 1, 11)
    rows = [np.full(10, 0.1), np.eye(10)[0], np.zeros(10)]
    svg = lines(edges, rows, "intensities")
    assert svg.count("<polyline") == 4
    points = [p.split(",") for line in re.findall('points="([^"]+)"', svg) for p in line.split()]
    assert all(0 <= float(x) <= 340 and 0 <= float(y) <= 150 for x, y in points)
