"""Weights into networks that differ: what is copied, adapted, fresh, tensor by tensor."""

import io
from pathlib import Path

import pytest
import torch
from rich.console import Console

from sparsemae.errors import UserError
from sparsemae.models.resenc import ResEncUNet
from sparsemae.transfer import Pretrained, check_useful, transfer


@pytest.fixture
def source(trained, unique):
    """Pre-trained weights of a network of a plan."""

    def make(plan=None, **options):
        network = trained(**({"plan": plan} if plan else {}), **options)
        return Pretrained(Path("some.pth"), "state dict", unique(network), network.topology)

    return make


def move(source, network, scope="encoder+decoder"):
    """The table, and which tensors of the network changed."""
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    table = transfer(source, network, scope)
    changed = {n for n, p in network.named_parameters() if not torch.equal(p, before[n])}
    return table, changed


def parts(table, what):
    return {row.part for row in table.rows if getattr(row, what)[0]}


def test_into_the_same_topology_all_but_the_heads(source, small, unique):
    origin, network = source(num_classes=1), ResEncUNet(1, 5, **small)
    table, changed = move(origin, network)
    names = set(unique(network))
    assert changed == {name for name in names if "seg_layers" not in name}
    assert all(torch.equal(unique(network)[name], origin.tensors[name]) for name in changed)
    assert [row.part for row in table.rows] == [
        *("stem", "encoder stage 0", "encoder stage 1", "encoder stage 2"),
        *("decoder level 0", "decoder level 1", "heads"),
    ]
    assert parts(table, "fresh") == {"heads"}
    assert parts(table, "adapted") == set()
    assert set(table.unused) == {name for name in names if "seg_layers" in name}
    assert table.encoder_share == 1
    total = sum(p.numel() for p in network.parameters())
    assert table.total("copied") + table.total("fresh") == total
    assert table.total("fresh") == sum(p.numel() for p in network.decoder.seg_layers.parameters())
    check_useful(table)


def test_heads_are_fresh_even_where_they_would_fit(source, small):
    network = ResEncUNet(1, 2, **small)
    _, changed = move(source(num_classes=2), network)
    assert not any("seg_layers" in name for name in changed)


def test_the_encoder_alone(source, small):
    table, changed = move(source(), ResEncUNet(1, 2, **small), "encoder")
    assert changed
    assert all(name.startswith("encoder.") for name in changed)
    assert parts(table, "fresh") == {"decoder level 0", "decoder level 1", "heads"}
    assert table.encoder_share == 1


def test_one_input_channel_is_shared_by_three(source, small, unique):
    origin, network = source(), ResEncUNet(3, 2, **small)
    table, _ = move(origin, network)
    stem = "encoder.stem.convs.0.conv.weight"
    expected = origin.tensors[stem].repeat(1, 3, 1, 1, 1) / 3
    torch.testing.assert_close(unique(network)[stem], expected)
    (row,) = [row for row in table.rows if row.adapted[0]]
    assert (row.part, row.remarks) == ("stem", ["1 -> 3 input channels"])
    assert row.adapted == [1, expected.numel()]


def test_other_kernels_and_strides(source, small, unique):
    origin = source()
    flat = {**small, "kernel_sizes": ((1, 3, 3), 3, 3), "strides": (1, (1, 2, 2), 2)}
    network = ResEncUNet(1, 2, **flat)
    table, changed = move(origin, network)
    found = unique(network)
    assert changed == {name for name in found if "seg_layers" not in name}
    for name in ("encoder.stem.convs.0.conv.weight", "decoder.stages.1.convs.0.conv.weight"):
        torch.testing.assert_close(found[name], origin.tensors[name].mean(2, keepdim=True))
    up = "decoder.transpconvs.1.weight"  # the finest level's, deepest first
    torch.testing.assert_close(found[up], origin.tensors[up].mean(2, keepdim=True))
    same = "encoder.stages.1.blocks.0.conv1.conv.weight"  # its stride is no weight
    assert torch.equal(found[same], origin.tensors[same])
    remarks = {row.part: row.remarks for row in table.rows if row.remarks}
    assert sorted(remarks["decoder level 0"]) == ["kernel 3x3x3 -> 1x3x3", "stride 2x2x2 -> 1x2x2"]
    assert remarks["encoder stage 0"] == ["kernel 3x3x3 -> 1x3x3"]
    assert table.encoder_share == 1


def test_a_shortcut_without_a_pool_before_it_is_the_same_shortcut(source, small, unique):
    origin = source()
    network = ResEncUNet(1, 2, **{**small, "strides": (1, 1, 2)})
    move(origin, network)
    expected = origin.tensors["encoder.stages.1.blocks.0.skip.1.conv.weight"]
    assert torch.equal(unique(network)["encoder.stages.1.blocks.0.skip.0.conv.weight"], expected)


def test_more_stages_and_blocks_than_the_source_has(source, unique):
    origin = source()
    deep = {
        "features_per_stage": (4, 6, 8, 8),
        "strides": (1, 2, 2, 2),
        "n_blocks_per_stage": (1, 3, 1, 2),
    }
    network = ResEncUNet(1, 2, **deep)
    table, changed = move(origin, network)
    found = unique(network)
    fresh = {n for n in found if n not in changed and "seg_layers" not in n}
    prefixes = (
        "encoder.stages.1.blocks.2.", "encoder.stages.3.", "decoder.transpconvs.0.",
        "decoder.stages.0.",
    )  # fmt: skip
    assert fresh - {n for n in fresh if n.startswith(prefixes)} == set()
    assert {n for n in found if n.startswith(prefixes)} & changed == set()
    for ours, theirs in (("1", "0"), ("2", "1")):  # deepest first: one more comes before them
        name = "decoder.stages.{}.convs.0.conv.weight"
        assert torch.equal(found[name.format(ours)], origin.tensors[name.format(theirs)])
        name = "decoder.transpconvs.{}.weight"
        assert torch.equal(found[name.format(ours)], origin.tensors[name.format(theirs)])
    assert "decoder level 2" in parts(table, "fresh")
    assert parts(table, "copied") >= {"decoder level 0", "decoder level 1"}


def test_fewer_stages_than_the_source_has(source, trained):
    shallow = {
        "features_per_stage": (4, 6),
        "strides": (1, 2),
        "n_blocks_per_stage": (1, 1),
    }
    origin, network = source(), ResEncUNet(1, 2, **shallow)
    table, changed = move(origin, network)
    assert "decoder.transpconvs.0.weight" in changed
    name = "decoder.stages.{}.convs.0.conv.weight"
    own = dict(network.named_parameters())[name.format(0)]
    assert torch.equal(own, origin.tensors[name.format(1)])
    assert {n for n in table.unused if n.startswith("encoder.stages.2.")}
    assert {n for n in table.unused if n.startswith("encoder.stages.1.blocks.1.")}


def test_a_stage_of_another_width_is_fresh_and_what_reads_it_too(source, small):
    wide = {**small, "features_per_stage": (4, 7, 8)}
    table, changed = move(source(), ResEncUNet(1, 2, **wide))
    assert not any(name.startswith("encoder.stages.1.") for name in changed)
    assert not any(name.startswith("encoder.stages.2.blocks.0.") for name in changed)
    assert any(name.startswith("encoder.stages.0.") for name in changed)
    (row,) = [row for row in table.rows if row.part == "encoder stage 1"]
    assert row.copied == [0, 0]
    assert row.remarks[0] == "6x4 features in the source, 7x4 here"


def test_an_initialisation_is_kept_where_nothing_is_copied(source, small):
    torch.manual_seed(3)
    network = ResEncUNet(1, 2, **{**small, "features_per_stage": (4, 7, 8)})
    torch.manual_seed(3)
    untouched = ResEncUNet(1, 2, **{**small, "features_per_stage": (4, 7, 8)})
    _, changed = move(source(), network)
    for (name, one), other in zip(network.named_parameters(), untouched.parameters(), strict=True):
        assert (name in changed) != torch.equal(one, other)


def test_a_transfer_that_brings_next_to_nothing_is_refused(source, small):
    wide = {**small, "features_per_stage": (4, 12, 24)}
    table, _ = move(source(), ResEncUNet(1, 2, **wide))
    with pytest.raises(
        UserError, match=r"some.pth: only \d+% of the encoder's weights fit .*stage 1: 6x4 features"
    ):
        check_useful(table)


def test_a_decoder_that_lacks_skips_does_not_fit(source, small):
    origin = source()
    tensors = dict(origin.tensors)
    name = "decoder.stages.0.convs.0.conv.weight"
    tensors[name] = tensors[name][:, :6]
    network = ResEncUNet(1, 2, **small)
    table, changed = move(Pretrained(origin.origin, origin.kind, tensors), network)
    assert name not in changed
    assert "decoder.stages.0.convs.0.norm.weight" not in changed
    assert "decoder level 1" in parts(table, "fresh")


def test_the_table_says_what_happened(source, small):
    table, _ = move(source(), ResEncUNet(2, 2, **small))
    console = Console(width=100, file=io.StringIO())
    console.print(table.table())
    text = console.file.getvalue()
    assert "1 -> 2 input channels" in text
    assert [line.split()[0] for line in text.splitlines()[1:]][:2] == ["stem", "encoder"]
    assert table.summary().startswith("parameters: 0.0")
    assert "100% of the encoder; 4 tensors unused" in table.summary()
