"""Lists as people and nnssl write them: what is wrong is named by line, or recorded per entry."""

import json
import os

import pytest

from sparsemae.data.sources import find_sources
from sparsemae.errors import UserError


@pytest.fixture
def written(tree):
    """`written(name, text, *files)`: a list with the files beside it."""

    def make(name, text, *files):
        path = tree(*files) / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return make


def only(source, **options):
    found = find_sources([source], **options)
    assert found.problems == ()
    (source,) = found.sources
    return source


def test_csv(written):
    path = written(
        "list.csv",
        "path, subject,session,modality,dataset,excluded,anatomy,id\n"
        "a/x.nii.gz,7,b,T1w,study,m.nii,n.nii,first\n\n"
        "a/sub-2_T2w.nii.gz,,,,,,,\n",
        *("a/x.nii.gz", "a/sub-2_T2w.nii.gz", "m.nii", "n.nii"),
    )
    second, first = find_sources([path]).sources
    folder = path.parent
    assert (first.id, first.path) == ("first", folder / "a/x.nii.gz")
    assert (first.excluded, first.anatomy) == (folder / "m.nii", folder / "n.nii")
    assert (first.subject, first.session, first.modality, first.dataset) == (
        *("7", "b", "T1w", "study"),
    )
    assert (second.id, second.subject, second.modality) == ("a__sub-2_T2w", "sub-2", "T2w")
    assert (second.dataset, second.excluded, second.anatomy) == ("data", None, None)


def test_jsonl_says_the_same(written):
    files = ("a/x.nii.gz", "m.nii")
    rows = written("list.csv", "path,subject,excluded\na/x.nii.gz,7,m.nii\n", *files)
    lines = '\n{"path": "a/x.nii.gz", "subject": 7, "excluded": "m.nii", "session": null}\r\n'
    assert only(rows) == only(written("list.jsonl", lines))


@pytest.mark.parametrize(
    "name",
    [
        "a,b.nii",
        'say "hi".nii',
        "two\nlines.nii",
        "two\r\nlines.nii",
        "a\u2028b.nii",
        " spaced .nii",
        "é.nii",
    ],
)
@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_quoting_marks_and_line_ends(written, name, start, end):
    quoted = '"' + name.replace('"', '""') + '"'
    path = written("list.csv", start + b"path,subject" + end + quoted.encode() + b",s" + end, name)
    assert only(path).path == path.parent / name
    path = written(
        "list.jsonl", start + json.dumps({"path": name}, ensure_ascii=False).encode() + end
    )
    assert only(path).path == path.parent / name


def test_names_that_are_not_utf8(written):
    name = b"caf\xe9.nii"
    path = written("list.csv", b"path\n" + name + b"\n", name.decode("utf-8", "surrogateescape"))
    assert os.fsencode(only(path).path.name) == name


def test_absolute_paths_are_as_the_user_wrote_them(written, tree):
    far = [
        tree(f"p{i}/{name}.nii", root="far") / f"p{i}/{name}.nii" for i in (1, 2) for name in "ab"
    ]
    path = written("list.csv", "path\n" + "".join(f"{f}\n" for f in far) + "near.nii\n", "near.nii")
    sources = {s.path: s for s in find_sources([path]).sources}
    assert [sources[f].subject for f in far] == ["p1", "p1", "p2", "p2"]
    assert all(
        s.id.endswith(f"far__p{p.parent.name[1]}__{p.stem}") for p, s in sources.items() if p in far
    )
    assert sources[path.parent / "near.nii"].id == "near"
    inside = written("list.csv", f"path\n{path.parent}/near.nii\n")
    assert only(inside).id == "near"


def test_ids_of_a_list_are_those_of_its_folder(written):
    files = ("a/x.nii.gz", "sub-1/anat/sub-1_T1w.nii", "y.nii")
    path = written("list.csv", "\n".join(("path", *files)), *files)
    listed = find_sources([path]).sources
    assert listed == find_sources([path.parent], layout="folder").sources
    assert listed == find_sources([path, path.parent], layout="auto").sources


def problems(*sources):
    return {(p.id, p.code, p.message) for p in find_sources(sources).problems}


def test_entries_that_cannot_be_used(written):
    path = written(
        "list.csv",
        "path,excluded,id\ngood.nii,,g\ngone.nii,,\ngood2.nii,gone.nii,\n../out.nii,,\na/../../o.nii,,\n"
        "good3.nii,../m.nii,\ngood4.nii,,a/b\ngood5.nii,,G\nnul\0.nii,,\na/../good6.nii,,\n",
        *("good.nii", *(f"good{i}.nii" for i in range(2, 7)), "a/x"),
    )
    folder = path.parent
    found = find_sources([path])
    assert [s.id for s in found.sources] == ["g", "good6"]
    assert sorted((p.code, p.path.name) for p in found.problems) == [
        ("source.duplicate_id", "good5.nii"),
        ("source.id", "good4.nii"),
        ("source.missing", "gone.nii"),
        ("source.missing", "good2.nii"),
        ("source.missing", "nul\0.nii"),
        ("source.outside", "good3.nii"),
        ("source.outside", "o.nii"),
        ("source.outside", "out.nii"),
    ]
    assert len({p.id.lower() for p in found.problems} | {"g", "good6"}) == 10
    for problem in found.problems:
        assert problem.message.isprintable()
        assert "; " in problem.message
    assert (
        "gone",
        "source.missing",
        f"{folder}/gone.nii: no such file; correct {path}",
    ) in problems(path)
    # what a list says of a file holds, though the folder has the file too
    both = find_sources([folder, path])
    assert {s.path.name for s in both.sources} == {"good.nii", "good6.nii"}


def test_a_file_listed_twice(written):
    path = written(
        "list.csv", "path,subject\nx.nii,1\nx.nii,1\ny.nii,1\n./y.nii,2\n", "x.nii", "y.nii"
    )
    found = find_sources([path, path])
    assert [(s.id, s.subject) for s in found.sources] == [("x", "1"), ("y", "1")]
    assert [p.code for p in found.problems] == ["source.conflict", "source.conflict"]
    assert find_sources([path.parent, path]).sources == found.sources


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no entry"),
        ("path\n", "has no entry"),
        ("subject\nx\n", "csv:1: no column path"),
        ("path,Subjct\n", "csv:1: unknown column 'Subjct'; did you mean subject?"),
        ("path,age\nx,3\n", "unknown column 'age'; columns are path, subject"),
        ("path;subject\n", "separate columns by commas"),
        ("path,path\n", "column path occurs twice"),
        ("path,subject\nx.nii\n", "csv:2: 1 values for 2 columns"),
        ("path\na,b.nii\n", "csv:2: 2 values for 1 columns; quote"),
        ("path,subject\n\n,s\n", "csv:3: no path"),
        ('path\n"x.nii\n', "not valid CSV"),
        (b"\xff\xfep\0a\0", "this text is UTF-16"),
    ],
)
def test_csv_that_is_not_understood(written, text, message):
    with pytest.raises(UserError, match=message) as caught:
        find_sources([written("list.csv", text, "x.nii")])
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("\n", "has no entry"),
        ('{"path": "x.nii"}\n{', "jsonl:2: not valid JSON"),
        ('["x.nii"]', "jsonl:1: a list; write an object per line"),
        ('{"path": 3}', "path: a number; write text"),
        ('{"path": "x.nii", "subject": true}', "subject: true or false; write text"),
        ('{"path": "x.nii", "subject": 1.5}', "subject: a number"),
        ('{"path": "x.nii", "sesion": "1"}', "did you mean session?"),
        ('{"subject": "x"}', "jsonl:1: no path"),
        ('{"path": "x.nii", "id": {}}', "id: an object"),
        ("[" * 100_000, "not valid JSON"),
    ],
)
def test_jsonl_that_is_not_understood(written, text, message):
    with pytest.raises(UserError, match=message):
        find_sources([written("list.jsonl", text, "x.nii")])


def test_a_list_of_another_name(written):
    path = written("list.txt", "path\nx.nii\n", "x.nii")
    assert only(path, layout="list").id == "x"
    with pytest.raises(UserError, match="not a NIfTI file"):
        find_sources([path])


def test_a_pipe_is_no_list(tree):
    path = tree() / "list.csv"
    os.mkfifo(path)
    with pytest.raises(UserError, match="not a regular file"):
        find_sources([path])


def collection(*images):
    """As nnssl's Collection.to_dict writes it."""
    session = {"session_id": "ses-1", "session_info": None, "images": list(images)}
    subject = {"subject_id": "sub-1", "sessions": {"ses-1": session}, "subject_info": {"age": 4}}
    dataset = {
        "dataset_index": "ds1",
        "name": None,
        "dataset_info": {},
        "subjects": {"sub-1": subject},
    }
    return {"collection_index": 1, "collection_name": "Dataset001_X", "datasets": {"ds1": dataset}}


def image(path, anonymization=None, anatomy=None, **more):
    masks = {"anonymization_mask": anonymization, "anatomy_mask": anatomy}
    return {
        **{"name": os.path.basename(path), "image_path": path, "modality": "T1w"},
        **{"image_info": {}, "associated_masks": masks, **more},
    }


def test_nnssl(written, tree, monkeypatch):
    raw = tree("a_T1w.nii.gz", "b_T2w.nii.gz", "anon.nii.gz", "anat.nii.gz", root="raw")
    monkeypatch.setenv("nnssl_raw", f"{raw}/")
    images = (
        image("$nnssl_raw/a_T1w.nii.gz", "$nnssl_raw/anon.nii.gz", "$nnssl_raw/anat.nii.gz"),
        {"name": "b.nii.gz", "image_path": f"{raw}/b_T2w.nii.gz", "modality": "T2w"},
        image("near.nii", associated_masks=None),
    )
    path = written("pretrain_data.json", json.dumps(collection(*images)), "near.nii")
    a, b, near = find_sources([path]).sources
    assert (a.id, a.path) == ("ds1__sub-1__ses-1__a_T1w", raw / "a_T1w.nii.gz")
    assert (a.excluded, a.anatomy) == (raw / "anon.nii.gz", raw / "anat.nii.gz")
    assert (a.subject, a.session, a.modality, a.dataset) == ("sub-1", "ses-1", "T1w", "ds1")
    assert (b.id, b.modality, b.excluded) == ("ds1__sub-1__ses-1__b", "T2w", None)
    assert near.path == path.parent / "near.nii"
    assert find_sources([path.parent]).sources == (a, b, near)
    assert find_sources([path], layout="nnssl").sources == (a, b, near)


def test_nnssl_problems(written, monkeypatch):
    monkeypatch.delenv("nnssl_raw", raising=False)
    images = (image("gone.nii"), image("x.nii", anonymization="gone.nii"), image("../x.nii"))
    path = written("pretrain_data.json", json.dumps(collection(*images)), "x.nii")
    found = find_sources([path])
    assert found.sources == ()
    assert sorted(p.code for p in found.problems) == ["source.missing"] * 2 + ["source.outside"]
    data = collection(image("x.nii"), image("$nnssl_raw/x.nii"))
    place = r"datasets.ds1.subjects.sub-1.sessions.ses-1.images\[1\].image_path"
    with pytest.raises(UserError, match=rf"{place}: \$nnssl_raw is not set; export nnssl_raw="):
        find_sources([written("pretrain_data.json", json.dumps(data))])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "holds a list where an object"),
        ({}, "datasets: missing, where nnssl has an object"),
        ({"datasets": {}}, "lists no image"),
        ({"datasets": {"1": []}}, "datasets.1: a list, where nnssl has an object"),
        (collection({}), r"images\[0\].image_path: missing, where nnssl has text"),
        (collection("x.nii"), r"images\[0\]: text, where nnssl has an object"),
        (collection(image("x.nii", anatomy=3)), "anatomy_mask: a number, where"),
    ],
)
def test_what_is_not_nnssl(written, data, message):
    with pytest.raises(UserError, match=message):
        find_sources([written("pretrain_data.json", json.dumps(data))])
    with pytest.raises(UserError, match="not valid JSON"):
        find_sources([written("pretrain_data.json", "{")])
