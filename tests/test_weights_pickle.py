"""Crafted pickles in a torch file: they can ask for no more than the file holds."""

import struct
import subprocess
import sys
import zipfile

import pytest
import torch

from sparsemae import weights, weights_pickle
from sparsemae.errors import UserError
from sparsemae.weights import read_weights

MB = 2**20


def problem(path) -> str:
    with pytest.raises(UserError) as error:
        read_weights(path)
    message = str(error.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    assert "; " in message, "no remedy"
    return message


def written(tmp_path, pickled: bytes, storage=bytes(range(16))):
    """A torch file around a pickle, with one entry for tensors."""
    with zipfile.ZipFile(tmp_path / "w.pth", "w") as archive:
        for name, data in {"data.pkl": pickled, "data/0": storage, "version": b"3\n"}.items():
            archive.writestr(f"w/{name}", data)
    return tmp_path / "w.pth"


def number(value: int) -> bytes:
    """The instruction for a whole number."""
    data = value.to_bytes(9, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def numbers(*values: int) -> bytes:
    return b"(" + b"".join(map(number, values)) + b"t"


def called(function: str, *arguments: bytes) -> bytes:
    return b"c" + function.replace(" ", "\n").encode() + b"\n(" + b"".join(arguments) + b"tR"


HOOKS = called("collections OrderedDict")


def storage(numel=4, key="0", kind="FloatStorage"):
    parts = text("storage"), b"ctorch\n" + kind.encode() + b"\n", text(key), text("cpu")
    return b"(" + b"".join(parts) + number(numel) + b"tQ"


def tensor(size=(4,), stride=(1,), start=0, hooks=HOOKS, more=b"", **of):
    parts = storage(**of), number(start), numbers(*size), numbers(*stride), b"\x89", hooks, more
    return called("torch._utils _rebuild_tensor_v2", *parts)


def state(*values: bytes, more=b"") -> bytes:
    """A pickle of a state dict a, b, ... with these values, and instructions before the end."""
    items = b"".join(text("abc"[i]) + value for i, value in enumerate(values))
    return b"\x80\x02}(" + items + b"u" + more + b"."


def beside(value: bytes) -> bytes:
    """A pickle of a checkpoint with this value beside a tensor."""
    return state(tensor(), value)


def test_the_instructions_of_these_tests_are_understood(tmp_path):
    found = read_weights(written(tmp_path, state(tensor(), tensor((2,), start=1)))).tensors
    expected = torch.frombuffer(bytearray(range(16)), dtype=torch.float32)
    assert torch.equal(found["a"], expected)
    assert torch.equal(found["b"], expected[1:3])
    assert read_weights(written(tmp_path, beside(number(7)))).extra == {"b": 7}


@pytest.mark.parametrize(
    "pickled",
    [
        state(tensor((5,))),
        state(tensor((4,), start=1)),
        state(tensor((4,), (2,))),
        state(tensor((2**40,))),
        state(tensor((2**31, 2**31), (1, 1))),
        state(tensor((2, 2), (2, 3))),
        state(tensor((2**62,), (0,))),
        state(tensor((0, 2**62), (1, 1))),
        state(tensor((-1,))),
        state(tensor((2,), (-1,), start=3)),
        state(tensor((2,), start=-1)),
        state(tensor((2, 2), (1,))),
        state(tensor((1,) * 100, (1,) * 100)),
        state(tensor(numel=-4)),
        state(tensor(), tensor((2,), kind="DoubleStorage", numel=2)),
        state(tensor(hooks=b"}")),
        state(tensor(hooks=b"N")),
        state(tensor(hooks=HOOKS + text("x") + number(1) + b"s")),
        state(tensor(more=b"}" + text("conj") + b"\x88s")),
        state(tensor(more=b"}" + text("neg") + b"\x88s")),
        state(tensor(more=b"NN")),
        state(called("torch._utils _rebuild_parameter", tensor(), b"\x88", HOOKS + b"NNs")),
        state(called("torch._utils _rebuild_parameter", number(1), b"\x88", HOOKS)),
        state(called("torch._utils _rebuild_tensor_v2")),
        state(tensor(), b"(" + text("module") + b"t" + b"Q"),
        state(tensor(), text("storage") + b"Q"),
        state(tensor(), b"ctorch\nFloatStorage\n)R"),
    ],
)
def test_a_tensor_that_its_entry_does_not_hold_is_refused(tmp_path, pickled):
    assert "damaged" in problem(written(tmp_path, pickled))


@pytest.mark.parametrize(
    "of",
    [
        {"numel": 5},
        {"numel": 3},
        {"numel": 2**40},
        {"kind": "DoubleStorage"},
        {"key": "1"},
        {"key": "../data.pkl"},
    ],
)
def test_an_entry_that_is_missing_or_of_another_size_is_refused(tmp_path, of):
    message = problem(written(tmp_path, state(tensor((2,), **of))))
    assert f"zip entry 'data/{of.get('key', '0')}' is missing or of another size" in message


def test_an_expanded_tensor_may_not_outgrow_the_file(tmp_path):
    """No memory is needed for it, until somebody copies it."""
    good = tensor((3, 2), (0, 1)), tensor((2, 1), (0, 0))
    found = read_weights(written(tmp_path, state(*good))).tensors
    assert [found[name].shape for name in "ab"] == [(3, 2), (2, 1)]
    for size, stride in [((10**12,), (0,)), ((10**6, 10**6), (0, 0)), ((10**9, 4), (0, 1))]:
        message = problem(written(tmp_path, state(tensor(size, stride))))
        assert f"a tensor of shape {size} repeats values" in message
    many = [tensor((n,), (0,)) for n in range(400, 420)]
    pickled = b"\x80\x02](" + b"".join(many) + b"e."
    assert "repeats values of the file" in problem(written(tmp_path, pickled))


def scalar(data="\0\0\0\0", code="f4", built=b"", align=b"\x89\x88"):
    dtype = called("numpy dtype", text(code), align) + built
    data = called("_codecs encode", text(data), text("latin1"))
    return called("numpy._core.multiarray scalar", dtype, data)


def array(shape=(4,), data="abcd", start=(0,), kind="numpy ndarray", version=1):
    first = called(
        "numpy._core.multiarray _reconstruct",
        b"c" + kind.replace(" ", "\n").encode() + b"\n",
        numbers(*start),
        called("_codecs encode", text("b"), text("latin1")),
    )
    dtype = called("numpy dtype", text("u1"), b"\x89\x88")
    data = called("_codecs encode", text(data), text("latin1"))
    return first + b"(" + number(version) + numbers(*shape) + dtype + b"\x89" + data + b"tb"


def test_numbers_of_numpy_are_understood(tmp_path):
    assert read_weights(written(tmp_path, beside(scalar()))).extra == {"b": 0.0}
    assert read_weights(written(tmp_path, beside(array()))).extra == {"b": [97, 98, 99, 100]}


@pytest.mark.parametrize(
    "value",
    [
        scalar("\0"),
        scalar("\0" * 8),
        scalar("\0" * 8, "O"),
        scalar(code="V4"),
        scalar(code="S1000000000"),
        scalar(align=b"\x89\x89"),
        scalar(built=b"(" + number(3) + text("<") + b"NN" + text("x") + numbers(1, 1, 63) + b"tb"),
        scalar(built=b"(" + number(3) + text("<") + b"NNN" + number(2**40) * 3 + b"tb"),
        array((5,)),
        array((2**31, 2**31)),
        array((-4,)),
        array(start=(10**12,)),
        array(kind="numpy dtype"),
        array(version=3),
        called("_codecs encode", text("abc"), text("idna")),
        called("_codecs encode", text("☃"), text("latin1")),
        called("torch device", number(10**9)),
        called("torch Size", number(3)),
        called("torch Size", b"(" + text("x") + b"t"),
        called("collections OrderedDict", b"](" + b")" * 9 + b"e"),
        HOOKS + b"}" + text("items") + number(3) + b"sb",
        b"}}" + text("_metadata") + number(3) + b"sb",
        number(3) + number(4) + b"b",
        called("collections OrderedDict")[:-1] + number(3) + b"R",
    ],
)
def test_a_function_is_called_as_torch_and_numpy_do_or_not_at_all(tmp_path, value):
    assert "damaged: data.pkl is not what torch writes" in problem(written(tmp_path, beside(value)))


def test_strange_keys_are_refused(tmp_path):
    """A tuple nested a million times, as a key, ends the process: its hash is a recursion."""
    for key in (b")" + b"\x85" * 10**6, b")", tensor(), number(2**61), b"G" + bytes(8), scalar()):
        message = problem(written(tmp_path, beside(b"}" + key + b"Ns")))
        assert "keys are neither names nor numbers" in message


def test_data_that_grows_or_never_ends_is_refused(tmp_path):
    for value in (
        b")" + b"q\1h\1\x86" * 40,
        b"]q\1h\1a",
        b"}q\1" + text("x") + b"h\1s",
        b")" + b"\x85" * 1000,
    ):
        assert "too much or too deeply nested" in problem(written(tmp_path, beside(value)))


@pytest.mark.parametrize(
    "pickled",
    [
        b"",
        b".",
        b"\x80\x02",
        b"\x80\x02}",
        b"\x80\x02u.",
        b"\x80\x02e.",
        b"\x80\x02}a.",
        b"\x80\x02](e",
        b"\x80\x02h\1.",
        b"\x80\x02q\1.",
        b"\x80\x02(.",
        b"\x80\x02R.",
        b"\x80\x02Q.",
        b"\x80\x02\x85.",
        b"\x80\x02}(" + text("a") + b"u.",
        b"\x80\x02X\xff\xff\xff\xff.",
        b"\x80\x02\x8b\xff\xff\xff\x7f.",
        b"\x80\x02cos\nsystem",
        b"\x80\x02\xff.",
        state(tensor())[:-1],
        beside(b"\x88\x93"),
        beside(b"(i__builtin__\neval\n"),
        beside(b"(cos\nsystem\no"),
        beside(b"\x82\1"),
        beside(HOOKS[:-2] + b")\x81"),
        beside(b"\x8f"),
        beside(b"P0\n"),
    ],
)
def test_pickles_that_are_none_or_not_torch_s_are_refused(tmp_path, pickled):
    message = problem(written(tmp_path, pickled))
    assert "damaged" in message or "refused" in message


def test_limits_hold_exactly(tmp_path, monkeypatch):
    path = written(tmp_path, state(tensor(), tensor(), tensor()))
    size = len(state(tensor(), tensor(), tensor()))
    monkeypatch.setattr(weights, "LARGEST_PICKLE", size)
    monkeypatch.setattr(weights_pickle, "MOST_TENSORS", 3)
    assert len(read_weights(path).tensors) == 3
    monkeypatch.setattr(weights_pickle, "MOST_TENSORS", 2)
    assert "more than 2 tensors" in problem(path)
    monkeypatch.setattr(weights, "LARGEST_PICKLE", size - 1)
    assert f"its data.pkl has {size} bytes" in problem(path)
    monkeypatch.undo()
    monkeypatch.setattr(weights_pickle, "MOST_STEPS", 20)
    assert "has more than 20 steps" in problem(path)


@pytest.mark.parametrize(
    "pickled",
    [
        b"\x80\x02" + b"]" * 15 * MB + b".",
        b"\x80\x02" + called("builtins bytearray", number(2**33)) + b".",
        state(called("torch FloatTensor", number(2**33))),
        b"\x80\x02Nr\xff\xff\xff\x7f.",
        state(tensor(), text("☃" + "x" * 15 * MB)),
    ],
    ids=["many lists", "bytearray", "old tensor", "place in the memo", "long string"],
)
def test_a_pickle_that_wants_memory_gets_little(tmp_path, pickled):
    code = (
        "import resource, sys\n"
        "from pathlib import Path\n"
        "from sparsemae.errors import UserError\n"
        "from sparsemae.weights import read_weights\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024\n"
        "before = peak()\n"
        "try:\n    read_weights(Path(sys.argv[1]))\n"
        "except UserError:\n    pass\n"
        "print(peak() - before)\n"
    )
    run = [sys.executable, "-c", code, str(written(tmp_path, pickled))]
    grown = int(subprocess.run(run, capture_output=True, text=True, check=True).stdout)
    print("GROWN", grown >> 20)
    assert grown < 600 * MB
