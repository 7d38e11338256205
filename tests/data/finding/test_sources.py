"""Volumes are found wherever they lie, each once, whatever its name; nothing is lost in silence."""

import os
import random
import re

import pytest

from sparsemae.data.finding import scan
from sparsemae.data.read import SUFFIXES
from sparsemae.data.sources import find_sources
from sparsemae.errors import UserError


def found(*sources, **options):
    """Ids with paths relative to the first source."""
    result = find_sources(sources, **options)
    assert result.problems == ()
    return {s.id: os.path.relpath(s.path, sources[0]) for s in result.sources}


def subjects(*sources, **options):
    return {
        s.id: (s.subject, s.session, s.modality) for s in find_sources(sources, **options).sources
    }


def test_a_folder_of_volumes_and_other_things(tree):
    data = tree(
        "b/x.nii.gz", "a.nii", "b/c/Y.NII", ".git/x.nii", "b/._x.nii.gz", "notes.txt", ".nii"
    )
    assert found(data) == {"a": "a.nii", "b__c__Y": "b/c/Y.NII", "b__x": "b/x.nii.gz"}


def test_every_format_is_found_and_pairs_once(tree):
    data = tree(
        *(f"one{suffix}" for suffix in (".nrrd", ".mha")),
        *("two.mhd", "two.raw", "three.mhd", "three.zraw", "four.hdr", "four.img"),
        *("five.HDR", "five.IMG", "six.hdr.gz", "six.img.gz", "seven.img", "eight.hdr"),
        *("nine.img.gz", "nine.hdr"),
    )
    assert set(found(data).values()) == {
        *("one.nrrd", "one.mha", "two.mhd", "three.mhd", "four.hdr", "five.HDR"),
        *("six.hdr.gz", "seven.img", "eight.hdr", "nine.hdr"),
    }


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_suffixes_are_split_off_whole(suffix):
    assert scan.split_suffix(f"a.b{suffix}") == ("a.b", suffix)
    assert scan.split_suffix(f"a.b{suffix.upper()}") == ("a.b", suffix)
    assert scan.split_suffix(f"a.b{suffix}x") == (f"a.b{suffix}x", "")


def test_equal_names_with_other_suffixes_or_case(tree):
    data = tree("x.nii.gz", "x.nii", "X.nii.gz", "x.mha")
    ids = found(data)
    assert len({name.lower() for name in ids}) == 4
    assert ids["X"] == "X.nii.gz"  # .nii.gz first, then in the order of the bytes
    more = found(tree("w.nii.gz", "y.nii", "x.nrrd"))
    assert ids.items() <= more.items()


def test_ids_do_not_depend_on_the_order_of_the_system(tree, monkeypatch):
    data = tree(
        *(f"{a}/{b}.nii{z}" for a in "xyXY" for b in "pqPQ" for z in ("", ".gz")), "x__p.nii"
    )
    expected = found(data)
    real = os.scandir
    shuffle = random.Random(0)

    class Listing(list):
        __enter__ = lambda self: self  # noqa: E731
        __exit__ = lambda self, *error: None  # noqa: E731

    def scandir(path):
        with real(path) as listing:
            return Listing(shuffle.sample(items := list(listing), len(items)))

    monkeypatch.setattr(os, "scandir", scandir)
    for _ in range(5):
        assert found(data) == expected


def test_other_files_leave_ids_alone(tree):
    before = found(tree("a/t1.nii.gz", "c.nii", "d e/f.nii"))
    after = found(tree("b/t1.nii.gz", "t1.nii.gz", "a/t2.nii", "a__c.nii", "0/c.nii", "d-e/f.nii"))
    assert before.items() <= after.items()


def test_files_of_a_folder_are_not_looked_at_one_by_one(tree, monkeypatch):
    """44 000 questions to a network file system would take minutes."""
    data = tree(*(f"{i % 7}/{i:04}.nii.gz" for i in range(700)))
    calls = []
    for name in ("stat", "lstat"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, real=real, **k: calls.append(a) or real(*a, **k))
    assert len(find_sources([data]).sources) == 700
    assert len(calls) < 50


HOSTILE = (
    *("two words", "new\nline", "-rf", "it's", 'say "hi"', "$(touch pwned)", "a,b", "100%", "{0}"),
    *(
        "übung",
        "é",
        "e\u0301",
        "患者",
        "a\\b",
        "~",
        "*",
        "a;b",
        "tab\tbed",
        "\x1b[31m",
        "`id`",
        "a=b",
    ),
    *("CON", "..a", "x" * 248, b"latin\xe9".decode("utf-8", "surrogateescape")),
)


def test_hostile_names(tree):
    data = tree(*(f"{'_' if name[0] == '.' else ''}{name}.nii.gz" for name in HOSTILE))
    result = find_sources([data])
    assert len(result.sources) == len(HOSTILE)
    assert result.problems == ()
    for source in result.sources:
        assert re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,149}", source.id)
        assert source.path.exists()
        (data / f"{source.id}.b2nd").touch()
    one_by_one = find_sources([data / f"{name}.nii.gz" for name in HOSTILE[:9]])
    assert {s.id for s in one_by_one.sources} <= {s.id for s in result.sources}


def test_overlapping_sources_give_each_file_once(tree, monkeypatch):
    data = tree("a.nii", "b/c.nii")
    monkeypatch.chdir(data)
    assert found(data, data / "b", "b/c.nii", "./b/../a.nii", "*.nii", data / "b/*") == {
        "a": "a.nii",
        "b__c": "b/c.nii",
    }
    assert set(found(data / "b", data)) == {"c", "a"}


def test_a_source_more_changes_no_id(tree):
    first, second = tree("x.nii", "y.nii", root="one"), tree("x.nii", "z.nii", root="two")
    alone, both = find_sources([first]).sources, find_sources([first, second]).sources
    assert set(alone) < set(both)
    assert sorted(s.path.name for s in both) == ["x.nii", "x.nii", "y.nii", "z.nii"]
    assert {s.dataset for s in both} == {"one", "two"}
    assert len({s.group for s in both}) == 4  # x of two data sets are two subjects


def test_links_are_followed_once(tree):
    data = tree("z/real.nii", "z/deep/real2.nii")
    outside = tree("far.nii", root="outside")
    (data / "a").symlink_to("z")  # sorts first, but what is found without links counts
    (data / "z/loop").symlink_to("..")
    (data / "z/self").symlink_to("self")
    (data / "out").symlink_to(outside)
    (data / "out2").symlink_to(outside)
    (data / "file.nii").symlink_to(outside / "far.nii")
    assert set(found(data)) == {"z__real", "z__deep__real2", "out__far", "file"}


def test_a_link_to_above_ends(tree):
    data = tree("in/x.nii", "y.nii")
    (data / "in/up").symlink_to("..")
    assert set(found(data / "in").values()) == {"x.nii", "up/y.nii"}


def test_broken_links_and_pipes_are_left_to_the_reader(tree):
    data = tree()
    (data / "annexed.nii.gz").symlink_to("gone")
    os.mkfifo(data / "pipe.nii")
    (data / "folder.nii").mkdir()
    (data / "folder.nii/x.nii").touch()
    assert set(found(data)) == {"annexed", "pipe", "folder.nii__x"}


def test_an_unreadable_folder_is_a_problem(tree, monkeypatch):
    data = tree("a.nii", "closed/b.nii", "open/c.nii")
    real = os.scandir

    def scandir(path):
        if os.path.basename(path) in closed:
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(scan.os, "scandir", scandir)
    closed = {"closed"}
    for sources in ([data], [f"{data}/**/*.nii"]):
        result = find_sources(sources)
        assert [s.id for s in result.sources] == ["a", "open__c"]
        (problem,) = result.problems
        assert (problem.id, problem.code) == ("closed", "source.unreadable")
        assert problem.path == data / "closed"
        assert problem.message.startswith(f"{data}/closed: ")
    closed = {"data"}
    with pytest.raises(UserError, match="data: cannot read this folder"):
        find_sources([data])


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["images/a.nii", "images/b.nii"], ["a", "b"]),
        (["x/images/a.nii", "x/images/b.nii"], ["a", "b"]),
        (["x/p1/t1.nii", "x/p1/t2.nii", "x/p2/t1.nii"], ["p1", "p1", "p2"]),
        (["x/p1/t1.nii", "x/p2/t1.nii", "y/p1/t1.nii"], ["x", "x", "y"]),
        (["x/p1/t1.nii", "x/q.nii"], ["p1", "q"]),
        (["images/sub-1_T1w.nii", "images/sub-2_T1w.nii"], ["sub-1", "sub-2"]),
        (["images/a.nii"], ["images"]),
    ],
)
def test_folders_around_everything_are_no_subject(tree, names, found):
    """Else a lone `images` would be the only subject, and nothing could be held out."""
    sources = find_sources([tree(*names)], layout="folder").sources
    assert [s.subject for s in sorted(sources, key=lambda s: s.path)] == found


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("p1_t1.nii", ("p1_t1", None, None)),
        ("p1/t1.nii", ("p1", None, None)),
        ("site/p1/T1w.nii", ("site", None, None)),
        ("site/sub-1/x.nii", ("sub-1", None, None)),
        ("sub-1/ses-2/x_T1w.nii", ("sub-1", "ses-2", "T1w")),
        ("sub-1/ses-2/sub-3_ses-4_FLAIR.nii", ("sub-3", "ses-4", "FLAIR")),
        ("a/x_sub-3_T2w.nii", ("sub-3", None, "T2w")),
        ("T1w.nii", ("T1w", None, None)),
        ("xsub-3_mask.nii", ("xsub-3_mask", None, None)),
        ("sub-1/ses-1/sub-2/ses-2/x.nii", ("sub-2", "ses-2", None)),
    ],
)
def test_what_a_place_says(tree, name, expected):
    (facts,) = subjects(tree(name)).values()
    assert facts == expected


def test_a_place_in_a_study_says_as_much_as_the_study(tree):
    data = tree("sub-1/ses-2/x.nii", "sub-1/ses-2/extra/y.nii", "sub-projects/flat/z.nii")
    (whole,) = (s for s in find_sources([data]).sources if s.path.name == "x.nii")
    part = find_sources([data / "sub-1" / "ses-2"], layout="folder").sources
    assert {(s.subject, s.session, s.dataset) for s in part} == {("sub-1", "ses-2", "data")}
    assert {s.group for s in part} == {whole.group}
    (far,) = find_sources([data / "sub-projects" / "flat"]).sources
    assert far.group == "flat/z"  # what is further up is no subject


def test_single_files_are_placed_below_what_they_share(tree):
    data = tree(*(f"p{i}/{name}.nii" for i in (1, 2) for name in ("t1", "t2")))
    files = sorted(data.glob("*/*.nii"))
    sources = find_sources(files).sources
    assert {s.path: s.subject for s in sources} == {f: f.parent.name for f in files}
    assert sorted(s.id[:2] for s in sources) == ["t1", "t1", "t2", "t2"]
    (alone,) = find_sources(files[:1]).sources
    assert (alone.id, alone.subject, alone.dataset) == ("t1", "t1", "p1")


def test_a_file_is_known_by_its_content(tree):
    data = tree("image.nii.gz", "image.dat")
    (data / "image.dat").write_bytes(b"NRRD0004\n")
    assert set(found(data / "image.dat")) == {"image.dat"}
    (data / "image.dat").write_text("text")
    with pytest.raises(UserError, match="not a NIfTI file"):
        find_sources([data / "image.dat"])


def test_patterns(tree):
    data = tree(
        "a/1.nii",
        "a/1.txt",
        "a/b/2.nii",
        "a/.h.nii",
        ".h/5.nii",
        "c/3.nii",
        "c/4.hdr",
        "c/4.img",
        "[x].nii",
    )
    for pattern, expected in (
        ("*/*.nii", {"a/1.nii", "c/3.nii"}),
        ("**/*.nii", {"a/1.nii", "a/b/2.nii", "c/3.nii", "[x].nii"}),
        ("a/**", {"a/1.nii", "a/b/2.nii"}),
        ("[ab]/[!2].n??", {"a/1.nii"}),
        ("c/4.*", {"c/4.hdr"}),
        ("?", {"a/1.nii", "a/b/2.nii", "c/3.nii", "c/4.hdr"}),
        ("*/b/2.nii", {"a/b/2.nii"}),
        ("[x].nii", {"[x].nii"}),  # it exists: no pattern
    ):
        paths = {os.path.relpath(s.path, data) for s in find_sources([data / pattern]).sources}
        assert paths == expected, pattern
    (source,) = find_sources([data / "*/b/2.nii"]).sources
    assert (source.id, source.subject, source.dataset) == ("a__b__2", "a", "data")


def test_a_pattern_with_loops_ends(tree):
    data = tree("a/x.nii")
    (data / "a/loop").symlink_to("..")
    assert len(find_sources([data / "**/**/*.nii"]).sources) == 1


def test_patterns_are_relative_to_where_one_is(tree, monkeypatch):
    monkeypatch.chdir(tree("a/x.nii"))
    (source,) = find_sources(["*/*.nii"]).sources
    assert (source.id, str(source.path), source.dataset) == ("a__x", "a/x.nii", "data")


def test_what_cannot_be_a_source(tree, tmp_path):
    data = tree("readme.txt", "x.nii.gz", "empty/readme.txt")
    for sources, options, message in (
        ([], {}, "no source given"),
        ([data / "nowhere"], {}, "no such file or folder"),
        ([data / "new\nline"], {}, r"new\\nline: no such file"),
        ([data / "empty"], {}, "no volume in this folder; it needs files with .nii.gz"),
        ([data / "empty/*"], {}, "matches no volume"),
        ([data], {"layout": "bid"}, "--layout bid: .*did you mean bids?"),
        ([data], {"layout": "dicom"}, "choose of auto, folder"),
        ([data], {"layout": "bids"}, "as BIDS it needs sub-"),
        ([data], {"layout": "list"}, "needs a .csv or .jsonl file"),
        ([data], {"layout": "nnunet"}, "dataset.json: No such file"),
        ([data], {"layout": "nnssl"}, "pretrain_data.json: No such file"),
        ([data / "x.nii.gz"], {"layout": "bids"}, "needs a folder"),
        ([data / "x.nii.gz"], {"layout": "list"}, "this is no such file"),
        ([data / "*.gz"], {"layout": "bids"}, "needs folders"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            find_sources(sources, **options)
        assert str(caught.value).isprintable()
    assert SUFFIXES[0] == ".nii.gz"  # which leads where names are equal


def test_real_volumes(shared):
    ids = found(shared / "images", shared / "orientations")
    assert {"spm152_t1", "example_ct", "RAS", "PIR"} <= set(ids)
    assert len(find_sources([shared]).sources) == len(list(shared.rglob("*.nii.gz")))
