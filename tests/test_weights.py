"""Weights from anywhere: what is read from good files, and what is said about the others."""

import json
import os
import pickle
import tarfile
import zipfile

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from sparsemae.errors import UserError
from sparsemae.weights import NAMES, TOP_LEVEL, read_weights

PLAN = {"architecture_plans": {"arch_class_name": "ResEncL", "arch_kwargs": {"strides": (1, 2)}}}


def network():
    return nn.Sequential(nn.Conv3d(1, 2, 3), nn.InstanceNorm3d(2, affine=True))


def nnunet_checkpoint():
    """What nnU-Net 2.8.1 saves: `nnUNetTrainer.save_checkpoint`."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.99, nesterov=True)
    model(torch.randn(1, 1, 5, 5, 5)).sum().backward()
    optimizer.step()
    return {
        "network_weights": model.state_dict(),
        "optimizer_state": optimizer.state_dict(),
        "grad_scaler_state": {"scale": 65536.0, "growth_factor": 2.0, "_growth_tracker": 3},
        "logging": {
            "mean_fg_dice": [np.float64(0.5), np.nanmean(np.float32([0.25]))],
            "dice_per_class_or_region": [[np.float64(0.5), np.float64(np.nan)]],
            "val_losses": [np.mean([np.float32(-0.5)])],
            "lrs": [0.01],
            "epoch_start_timestamps": [1.7e9],
            "fold_counts": np.arange(3),
        },
        "_best_ema": np.float64(0.75),
        "current_epoch": 2,
        "init_args": {
            "plans": {"plans_name": "nnUNetPlans", "transpose_forward": [0, 1, 2]},
            "configuration": "3d_fullres",
            "fold": 0,
            "dataset_json": {"labels": {"background": 0}, "numTraining": 2},
            "device": torch.device("cuda"),
        },
        "trainer_name": "nnUNetTrainer",
        "inference_allowed_mirroring_axes": (0, 1, 2),
    }


def assert_same(found, expected):
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
        assert found[name].dtype == tensor.dtype, name
        assert found[name].is_contiguous(), name
        assert not found[name].requires_grad, name


def problem(path) -> str:
    """What is said about a bad file: one line that names it and what to do."""
    with pytest.raises(UserError) as error:
        read_weights(path)
    message = str(error.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    assert ";" in message or "use an earlier" in message, "no remedy"
    return message.removeprefix(f"{path}: ")


def saved(tmp_path, content):
    torch.save(content, tmp_path / "weights.pth")
    return tmp_path / "weights.pth"


def test_a_checkpoint_of_nnunet_is_read(tmp_path):
    content = nnunet_checkpoint()
    weights = read_weights(saved(tmp_path, content))
    assert (weights.kind, weights.origin) == ("network_weights", tmp_path / "weights.pth")
    assert_same(weights.tensors, content["network_weights"])
    assert weights.extra.keys() == content.keys() - {"network_weights", "optimizer_state"}
    logs = weights.extra["logging"]
    assert logs["mean_fg_dice"] == [0.5, 0.25]
    assert logs["fold_counts"] == [0, 1, 2]
    assert {type(value) for value in logs["mean_fg_dice"]} == {float}
    assert type(weights.extra["_best_ema"]) is float
    assert weights.extra["init_args"] == {**content["init_args"], "device": "cuda"}
    assert weights.extra["inference_allowed_mirroring_axes"] == (0, 1, 2)
    json.dumps({**weights.extra, "logging": None})


def test_numbers_of_numpy_1_are_read(tmp_path):
    content = {"model": network().state_dict(), "score": np.float32(0.5), "count": np.arange(2)}
    path = saved(tmp_path, content)
    with zipfile.ZipFile(path) as old:
        entries = {name: old.read(name) for name in old.namelist()}
    names = (b"numpy._core.multiarray", b"numpy.core.multiarray")
    assert any(names[0] in entry for entry in entries.values())
    with zipfile.ZipFile(path, "w") as new:
        for name, data in entries.items():
            new.writestr(name, data.replace(*names))
    assert read_weights(path).extra == {"score": 0.5, "count": [0, 1]}


def test_a_checkpoint_of_nnssl_is_read(tmp_path):
    content = {"network_weights": network().state_dict(), "nnssl_adaptation_plan": PLAN}
    weights = read_weights(saved(tmp_path, content))
    assert_same(weights.tensors, content["network_weights"])
    assert weights.extra == {"nnssl_adaptation_plan": PLAN}


@pytest.mark.parametrize("name", NAMES)
def test_a_state_dict_is_found_under_its_usual_names(tmp_path, name):
    content = {name: network().state_dict(), "epoch": 3, "best": torch.tensor(0.5)}
    weights = read_weights(saved(tmp_path, content))
    assert (weights.kind, weights.extra) == (name, {"epoch": 3})
    assert_same(weights.tensors, content[name])


def test_a_bare_state_dict_is_read_whatever_its_extension(tmp_path):
    state = network().state_dict()
    torch.save(state, tmp_path / "a b.safetensors")
    safetensors.torch.save_file(state, tmp_path / "c.pth", metadata={"made": "here"})
    from_torch = read_weights(tmp_path / "a b.safetensors")
    from_safetensors = read_weights(tmp_path / "c.pth")
    assert (from_torch.kind, from_torch.extra) == (TOP_LEVEL, {})
    assert (from_safetensors.kind, from_safetensors.extra) == ("safetensors", {"made": "here"})
    assert_same(from_torch.tensors, state)
    assert_same(dict(sorted(from_safetensors.tensors.items())), dict(sorted(state.items())))


def test_all_ordinary_dtypes_and_layouts_come_back_contiguous(tmp_path):
    floats = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
    whole = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool]
    state = {f"module.{dtype}": torch.arange(6).to(dtype) for dtype in floats + whole}
    state |= {"empty": torch.empty(0, 3), "scalar": torch.tensor(2.0)}
    safetensors.torch.save_file(state, tmp_path / "w.safetensors")
    assert_same(
        dict(sorted(read_weights(tmp_path / "w.safetensors").tensors.items())),
        dict(sorted(state.items())),
    )
    state |= {
        "last": torch.randn(2, 3, 4, 5, 6).to(memory_format=torch.channels_last_3d),
        "turned": torch.randn(3, 4).T,
        "expanded": torch.arange(4.0).expand(3, 4),
        "parameter": nn.Parameter(torch.ones(2)),
    }
    assert_same(read_weights(saved(tmp_path, state)).tensors, state)


def test_aliases_share_memory(tmp_path):
    model = network()
    model.alias, model[0].weight.data = model[0], model[0].weight.data.mT
    found = read_weights(saved(tmp_path, model.state_dict())).tensors
    assert_same(found, model.state_dict())
    for name in ("weight", "bias"):
        assert found[f"0.{name}"].data_ptr() == found[f"alias.{name}"].data_ptr()


@pytest.mark.parametrize("save", [torch.save, safetensors.torch.save_file])
def test_writing_over_the_file_leaves_what_was_read(tmp_path, save):
    path = tmp_path / "weights"
    save({"a": torch.ones(4096)}, path)
    weights = read_weights(path)
    with path.open("r+b") as file:
        file.write(b"\xff" * path.stat().st_size)
    assert torch.equal(weights.tensors["a"], torch.ones(4096))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"model": {"a": torch.ones(2)}, "state_dict": {"a": torch.ones(2)}}, "several places"),
        ({"model": {"a": torch.ones(2)}, "b": torch.ones(2)}, r"model \(1 entries\), top level"),
        ({"encoder": {"a": torch.ones(2)}, "epoch": 3}, r"only encoder \(dict of 1\), epoch"),
        ({"state": {0: {"m": torch.ones(2)}}, "param_groups": []}, "state of an optimiser"),
        ({"optimizer_state": {"state": {}}}, "state of an optimiser"),
        ({}, "only nothing"),
        ({"model": {}}, r"only model \(dict of 0\)"),
        ({"model": {"a": torch.ones(2), "b": 3}}, "model holds b, which is a int"),
        ({"model": {"a": torch.ones(2), 5: torch.ones(2)}}, "model holds 5"),
        ([torch.ones(2)], "holds a list"),
        (torch.ones(2), "holds a Tensor"),
    ],
)
def test_a_checkpoint_without_one_clear_state_dict_is_refused(tmp_path, content, words):
    path = saved(tmp_path, content)
    assert problem(path)
    with pytest.raises(UserError, match=words):
        read_weights(path)


def test_names_in_messages_stay_short_and_on_one_line(tmp_path):
    message = problem(saved(tmp_path, {"a\nb" * 1000: {"a": torch.ones(2)}}))
    assert "\\n" in message
    assert len(message) < 400


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_weights_that_are_not_finite_are_refused(tmp_path, bad, dtype):
    state = {"fine": torch.ones(5), "stem.weight": torch.ones(3, 4, dtype=dtype)}
    state["stem.weight"][1, 2:] = bad
    wrong = "tensor stem.weight has 2 of 12 values that are not finite"
    assert wrong in problem(saved(tmp_path, state))
    assert wrong in problem(
        saved(tmp_path, {"model": {**state, "stem.weight": state["stem.weight"].T}})
    )
    safetensors.torch.save_file(state, tmp_path / "w.safetensors")
    assert wrong in problem(tmp_path / "w.safetensors")


def test_a_value_that_is_not_finite_is_found_at_the_end_of_a_large_tensor(tmp_path):
    state = {"a": torch.zeros(2**22 + 5, dtype=torch.float16)}
    state["a"][-1] = np.nan
    assert "has 1 of" in problem(saved(tmp_path, state))


def test_an_optimiser_that_is_not_finite_is_of_no_concern(tmp_path):
    content = {"model": {"a": torch.ones(2)}, "optimizer": {"m": torch.tensor([np.nan])}}
    assert read_weights(saved(tmp_path, content)).extra == {}


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e4m3fn, torch.uint16])
def test_unusual_dtypes_are_refused_in_safetensors(tmp_path, dtype):
    safetensors.torch.save_file({"a": torch.zeros(2, dtype=dtype)}, tmp_path / "w.safetensors")
    assert "tensor a has dtype" in problem(tmp_path / "w.safetensors")


def header(entries, data=b""):
    text = json.dumps(entries).encode() if isinstance(entries, dict) else entries
    return len(text).to_bytes(8, "little") + text + data


def entry(shape, begin, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    "data",
    [
        header({"a": entry([2], 0, 8)}),
        header({"a": entry([2], 0, 8)}, bytes(7)),
        header({"a": entry([2], 0, 8)}, bytes(9)),
        header({"a": entry([3], 0, 8)}, bytes(8)),
        header({"a": entry([2**40], 0, 2**42)}, bytes(8)),
        header({"a": entry([2**40, 0, 2**40], 0, 8)}, bytes(8)),
        header({"a": entry([2**32, 2**32, 2], 0, 8)}, bytes(8)),
        header({"a": entry([2], 0, 8), "b": entry([2], 0, 8)}, bytes(8)),
        header({"a": entry([2], 4, 12)}, bytes(12)),
        header({"a": entry([2], 8, 0)}, bytes(8)),
        header({"a": entry([-2], 0, 8)}, bytes(8)),
        header({"a": entry([2], 0, 8, "F99")}, bytes(8)),
        header(b'{"a":' * 5000, bytes(8)),
        header(b'{"a": [', bytes(8)),
        header(b'{"\xff": 1}', bytes(8)),
        header({"a": 3}),
        header({"__metadata__": {"x": [1]}, "a": entry([1], 0, 4)}, bytes(4)),
        header({}),
        header({"__metadata__": {"x": "y"}}),
        (2**47).to_bytes(8, "little") + b"{",
    ],
)
def test_a_damaged_safetensors_file_is_refused(tmp_path, data):
    path = tmp_path / "w.safetensors"
    path.write_bytes(data)
    assert problem(path)


def test_a_huge_safetensors_header_is_refused(tmp_path):
    text = json.dumps({"a": entry([1], 0, 4)}).encode().ljust(2**24 + 1)
    (tmp_path / "w.safetensors").write_bytes(header(text, bytes(4)))
    assert f"a header of {2**24 + 1} bytes" in problem(tmp_path / "w.safetensors")
    (tmp_path / "w.safetensors").write_bytes(header(text[:-1], bytes(4)))
    assert read_weights(tmp_path / "w.safetensors").tensors == {"a": torch.zeros(1)}


def test_safetensors_cut_anywhere_are_refused(tmp_path):
    path = tmp_path / "w.safetensors"
    safetensors.torch.save_file({"a": torch.randn(5), "b": torch.ones(2, 3)}, path)
    data = path.read_bytes()
    for length in range(len(data)):
        path.write_bytes(data[:length])
        assert "copy or download it again" in problem(path) or length == 0
        if 9 <= length < 8 + int.from_bytes(data[:8], "little"):
            assert "cut short" in problem(path)


def test_a_flipped_bit_in_a_safetensors_header_never_crashes(tmp_path):
    path = tmp_path / "w.safetensors"
    safetensors.torch.save_file({"a": torch.ones(5), "b": torch.ones(2, 3).half()}, path)
    data, refused = path.read_bytes(), 0
    for bit in range((8 + int.from_bytes(data[:8], "little")) * 8):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        try:
            read_weights(path)
        except UserError:
            refused += 1
    assert refused > len(data)


def test_a_bare_pickle_that_runs_code_is_refused_and_nothing_runs(tmp_path):
    marker, path = tmp_path / "ran", tmp_path / "w.pth"

    class Attack:
        def __reduce__(self):
            return os.system, (f"touch {marker}",)

    for protocol in range(6):
        path.write_bytes(pickle.dumps(Attack(), protocol))
        assert "safetensors" in problem(path)
    assert not marker.exists()


def test_other_files_are_called_what_they_are(tmp_path):
    path = tmp_path / "w.pth"
    state = network().state_dict()
    torch.save(state, path, _use_new_zipfile_serialization=False)
    assert "torch's old, unguarded format; if you trust it, save" in problem(path)
    with tarfile.open(path, "w") as tar:
        tar.add(__file__, "storages")
    assert "a tar archive" in problem(path)
    np.savez(tmp_path / "w.npz", a=np.ones(2))
    assert "a zip archive that is no torch file" in problem(tmp_path / "w.npz")
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("w/data.pkl", "w/code/w.py", "w/constants.pkl"):
            archive.writestr(name, b"x")
    assert "TorchScript" in problem(path)
    for data, words in [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "run `git lfs pull`"),
        (b"\n<!DOCTYPE html><html>", "a web page; download the file itself"),
        (b"<HTML>", "a web page"),
        (b"\x1f\x8b\x08", "gzip"),
        (b"\x89HDF\r\n", "HDF5"),
        (b"\x93NUMPY", "NumPy"),
        (b"", "the file is empty"),
        (b"x", "neither a safetensors nor a torch file"),
        (bytes(1000), "neither a safetensors nor a torch file"),
    ]:
        path.write_bytes(data)
        assert words in problem(path)


def test_what_is_no_file_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    assert "a folder" in problem(tmp_path)
    assert "not a regular file" in problem(tmp_path / "pipe")
    assert "check the path" in problem(tmp_path / "loop")
    assert "check the path" in problem(tmp_path / ("x" * 300))
    assert "no such file" in problem(tmp_path / "missing")
    assert "no such file" in problem(tmp_path / "dangling")
    assert "no such file" in problem(tmp_path / "pipe" / "inner")
    with pytest.raises(UserError, match="no file can have this name"):
        read_weights(tmp_path / "a\0b")


def test_a_file_may_have_any_name(tmp_path):
    for name in ("ünïcode ☃", "-dash", "a'b\"c", "x" * 250):
        for save in (torch.save, safetensors.torch.save_file):
            save({"a": torch.ones(2)}, tmp_path / "plain")
            (tmp_path / "plain").rename(tmp_path / name)
            assert list(read_weights(tmp_path / name).tensors) == ["a"]
    odd = tmp_path / os.fsdecode(b"\xff\xfe")
    torch.save({"a": torch.ones(2)}, tmp_path / "plain")
    (tmp_path / "plain").rename(odd)
    assert list(read_weights(odd).tensors) == ["a"]
    safetensors.torch.save_file({"a": torch.ones(2)}, tmp_path / "plain")
    (tmp_path / "plain").rename(odd)
    with pytest.raises(UserError, match="not UTF-8; rename the file"):
        read_weights(odd)
