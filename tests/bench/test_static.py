"""The static gate: what it reads in compilers' reports and refuses; and that what ships passes."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from sparsemae.bench import __main__ as command
from sparsemae.bench.binary import (
    Resources,
    Row,
    parse_amdgcn,
    parse_ptx,
    parse_sass,
    violations,
)
from sparsemae.bench.shipped import Kernel
from sparsemae.bench.static import CHIPS, HEADER, MAIN, json_rows, judge_all, summary
from sparsemae.errors import UserError

USAGE = """
Resource usage:
 Common:
  GLOBAL:0
 Function _gather_kernel:
  REG:151 STACK:{stack} SHARED:1024 LOCAL:0 CONSTANT[0]:584 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
SASS = """
	.section	.text._gather_kernel,"ax",@progbits
.text._gather_kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0a70*/              @!PT LDS RZ, [RZ] ;
        /*0aa0*/                   LDGSTS.E [R96+0xc000], desc[UR34][R18.64], P1 ;
        /*0ab0*/              @P2 LDGSTS.E.BYPASS.128 [R33+0x3000], desc[UR24][R28.64] ;
        /*0ac0*/              @!UP0 LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0ad0*/                   LDG.E R4, desc[UR4][R2.64] ;
        /*0b00*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24, gsb0 ;
        /*0b10*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR12], R24, gsb0 ;
        /*10000*/                  STG.E.128 desc[UR34][R2.64], R24 ;
"""
PTX = """
.visible .entry _gather_kernel(
	.param .u64 .ptr .global .align 16 _gather_kernel_param_0
)
{
	.reg .b32 	%r<9>;
$L__BB0_1:
	@%p1 ld.global.L1::evict_last.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];
	@%p1 ld.global.b32 { %r5 }, [ %rd2 + 0 ];
	cp.async.cg.shared.global [ %r48 + 0 ], [ %rd35 + 0 ], 0x10, %r49;
	@%p3 cp.async.ca.shared.global [ %r22 + 0 ], [ %rd34 + 0 ], 0x4, %r47;
	wgmma.fence.sync.aligned;
	wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%r1,%r2}, %rd67, %rd68, 1, 1, 1, 0, 1;
	mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 { %r1 }, { %r2 }, { %r3 }, { %r4 };
	ret;
}
"""
AMDGCN = """
	s_load_dwordx4 s[12:15], s[0:1], 0x28
	global_load_dword v4, v[6:7], off
	global_load_dwordx4 v[6:9], v[4:5], off
	buffer_load_dwordx4 v[2:5], v1, s[4:7], 0 offen
	v_mfma_f32_32x32x8_bf16_1k v[0:15], v[16:17], v[18:19], v[0:15]
	s_endpgm
    .group_segment_fixed_size: 0
    .private_segment_fixed_size: 24
    .sgpr_spill_count: 1
    .vgpr_count:     188
    .vgpr_spill_count: 5
"""
GOOD = Resources(151, 0, 0, 49664, 1472, 24, 27, {"HGMMA": 8})
UNIT = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCMMA", "gfx942": "MFMA"}


def row(chip: str = "sm_90", main: bool = True, **changes) -> Row:
    found = replace(GOOD, **({"matrix": {UNIT[chip]: 8}} | changes))
    return Row(chip, "_gather_kernel", "bfloat16", "CI=32", main, found)


def test_sass_is_counted():
    found = parse_sass(SASS, USAGE.format(stack=0), 49664)
    assert found == Resources(151, 0, 0, 49664, 9, 2, 2, {"HGMMA": 2}, "sass")
    spilled = SASS + "        /*10010*/                  STL [R1+0x8], R2 ;\n"
    spilled += "        /*10020*/              @P0 LDL.LU R2, [R1+0x8] ;\n"
    found = parse_sass(spilled, USAGE.format(stack=16), 0)
    assert (found.spills, found.stack) == (2, 16)
    blackwell = SASS.replace("HGMMA.64x64x16.F32.BF16", "UTCHMMA")
    assert parse_sass(blackwell, USAGE.format(stack=0), 0).matrix == {"UTCMMA": 2}


def test_ptx_is_counted_where_there_is_no_disassembly():
    found = parse_ptx(PTX, USAGE.format(stack=8), 1024)
    assert found == Resources(151, 8, 0, 1024, 8, 2, 2, {"HGMMA": 1, "HMMA": 1}, "ptx")
    assert parse_ptx(
        "\ttcgen05.mma.cta_group::1.kind::f16 [ %r1 ];", USAGE.format(stack=0), 0
    ).matrix


def test_amd_assembly_is_counted():
    found = parse_amdgcn(AMDGCN, 24576)
    assert found == Resources(188, 24, 5, 24576, 6, 2, 0, {"MFMA": 1}, "amdgcn")


@pytest.mark.parametrize(
    ("parse", "text"), [(parse_sass, "no kernel"), (parse_ptx, ""), (parse_amdgcn, "")]
)
def test_a_report_without_a_kernel_is_no_pass(parse, text):
    arguments = (text, 0) if parse is parse_amdgcn else (text, text, 0)
    with pytest.raises(ValueError, match=r"no resource usage|no kernel metadata"):
        parse(*arguments)


@pytest.mark.parametrize("chip", CHIPS)
def test_a_good_kernel_passes(chip):
    assert violations(row(chip, shared=65536)) == []
    assert violations(row(chip, main=False, shared=65536, matrix={})) == []


@pytest.mark.parametrize(
    ("chip", "changes", "message"),
    [
        ("sm_90", {"stack": 16}, "16 bytes of stack"),
        ("sm_100", {"spills": 3}, "3 spill instructions"),
        ("gfx942", {"spills": 2, "source": "amdgcn"}, "2 spill registers"),
        ("sm_80", {"shared": 166913}, "166913 bytes of shared memory, sm_80 has 166912"),
        ("sm_90", {"shared": 232449}, "232449 bytes of shared memory, sm_90 has 232448"),
        ("gfx942", {"shared": 65537}, "65537 bytes of shared memory, gfx942 has 65536"),
        ("sm_90", {"matrix": {"HMMA": 64}}, "no HGMMA: 64 HMMA"),
        ("sm_90", {"matrix": {"HGMMA": 8, "HMMA": 4}}, "falls back beside HGMMA: 4 HMMA"),
        ("sm_100", {"matrix": {"HMMA": 64}}, "no UTCMMA: 64 HMMA"),
        ("sm_80", {"matrix": {}}, "no HMMA: no matrix instruction"),
        ("gfx942", {"matrix": {}}, "no MFMA: no matrix instruction"),
    ],
)
def test_a_broken_rule_is_named(chip, changes, message):
    assert violations(row(chip, **changes)) == [message]


def test_a_kernel_that_does_not_compile_is_a_violation():
    failed = replace(row(), found=None, error="CompilationError: no")
    assert violations(failed) == ["does not compile: CompilationError: no"]
    (line,) = summary([failed])
    assert line[3] == "0"
    assert json_rows([failed], {"torch": "2"})[0]["violations"]


def test_the_summary_gives_ranges_and_json_everything():
    rows = [row(), row(registers=90, shared=1, matrix={"HGMMA": 8, "HMMA": 2}), row("sm_80")]
    assert summary(rows) == [
        ["gather", "bfloat16", "sm_80", "1", "151", "0", "0", "49", "1472", "8 HMMA", "24", "27"],
        [
            *("gather", "bfloat16", "sm_90", "2", "90-151", "0", "0", "1-49", "1472"),
            *("8 HGMMA, 0-2 HMMA", "24", "27"),
        ],
    ]
    assert len(HEADER) == 12
    line = json.loads(json.dumps(json_rows(rows, {"torch": "2", "commit": "c"})[1]))
    assert {"case", "backend", "device", "torch", "commit", "ms", "ratio"} <= set(line)
    assert (line["device"], line["registers"]) == ("sm_90", 90)
    assert line["violations"] == ["falls back beside HGMMA: 2 HMMA"]


def test_a_shape_names_what_is_on():
    constants = (("CI", 32), ("BLOCK", (16, 16, 16)), ("STRIDE", (1, 2, 2)), ("MIRROR", True))
    constants += (("MEAN", False), ("bias_ptr", None))
    kernel = Kernel("sm_90", "m", "_k", (("x_ptr", "*bf16"), ("M", "i32")), constants, 4, 2)
    assert kernel.shape == "CI=32 BLOCK=16 STRIDE=(1,2,2) MIRROR warps=4 stages=2"
    assert kernel.dtype == "bfloat16"


def test_interpreted_kernels_cannot_be_compiled():
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("kernels are compiled here")
    result = CliRunner().invoke(command.app, ["static", "--chip", "sm_90"])
    assert isinstance(result.exception, UserError)
    assert "unset it" in str(result.exception)
    result = CliRunner().invoke(command.app, ["static", "--chip", "sm_91"])
    assert "--chip sm_91: choose from sm_80, sm_90" in str(result.exception)


def without_interpreter(*arguments: str, **extra: str) -> subprocess.CompletedProcess:
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = [sys.executable, *arguments]
    return subprocess.run(run, env=kept | extra, capture_output=True, text=True)


BROKEN = """
import triton
import triton.language as tl

@triton.jit(do_not_specialize=["M"])
def _gather_kernel(x_ptr, y_ptr, M, ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr):
    rows, cols, ks = tl.arange(0, ROWS), tl.arange(0, COLS), tl.arange(0, DEPTH)
    acc = tl.zeros([ROWS, COLS], dtype=tl.float32)
    for i in range(M):
        a = tl.load(x_ptr + i * ROWS * DEPTH + rows[:, None] * DEPTH + ks[None, :])
        b = tl.load(x_ptr + i * COLS * DEPTH + ks[:, None] * COLS + cols[None, :])
        acc = tl.dot(a, b, acc)
    tl.store(y_ptr + rows[:, None] * COLS + cols[None, :], acc.to(y_ptr.dtype.element_ty))
"""
SCRIPT = """
import torch
import triton
from triton.runtime.driver import driver

import broken
from sparsemae.bench.binary import violations
from sparsemae.bench.shipped import Kernel
from sparsemae.bench.static import TARGETS, judge

def kernel(rows, cols, depth, warps, stages):
    signature = (("x_ptr", "*bf16"), ("y_ptr", "*bf16"), ("M", "i32"))
    constants = (("ROWS", rows), ("COLS", cols), ("DEPTH", depth))
    return Kernel("sm_90", "broken", "_gather_kernel", signature, constants, warps, stages)

good = kernel(64, 64, 64, 4, 2)
for sizes in ((64, 64, 64, 4, 2), (16, 64, 64, 4, 2), (128, 256, 128, 8, 4), (256, 256, 32, 4, 2)):
    print(*violations(judge(kernel(*sizes))), sep=", ")

class Driver:  # of an H100 that is not here
    get_current_target = lambda self: TARGETS["sm_90"]
    get_current_device = lambda self: 0
    get_current_stream = lambda self, device: 0

hits = []
driver.set_active(Driver())
triton.knobs.compilation.listener = lambda **event: hits.append(event["cache_hit"])
x = torch.zeros(64, dtype=torch.bfloat16)
broken._gather_kernel.warmup(
    x, x, 100, 64, 64, 64, grid=(1,), num_warps=good.warps, num_stages=good.stages
)
print(hits)
"""


@pytest.mark.slow
def test_compiled_faults_are_found_and_the_launcher_reuses_what_was_compiled(tmp_path):
    (tmp_path / "broken.py").write_text(BROKEN)
    cache = tmp_path / "cache"
    done = without_interpreter("-c", SCRIPT, PYTHONPATH=str(tmp_path), TRITON_CACHE_DIR=str(cache))
    assert done.returncode == 0, done.stderr
    good, fallback, shared, spills, hits = done.stdout.splitlines()
    assert good == ""
    assert "no HGMMA" in fallback
    assert "HMMA" in fallback
    assert "bytes of shared memory, sm_90 has 232448" in shared
    assert "bytes of stack" in spills
    assert hits == "[True]"


@pytest.mark.slow
def test_a_compiler_that_crashes_fails_its_kernel_only(tmp_path, monkeypatch):
    (tmp_path / "deadly.py").write_text("import os\nos._exit(6)\n")
    monkeypatch.syspath_prepend(tmp_path)  # which spawned processes inherit
    names = ("deadly", "missing1", "deadly", "missing2")
    kernels = {
        Kernel("sm_90", name, f"_k{i}", (("x_ptr", "*fp32"),), (), 4, 1): ("case",)
        for i, name in enumerate(names)
    }
    errors = {row.kernel: row.error for row in judge_all(kernels)}
    assert sorted(errors) == ["_k0", "_k1", "_k2", "_k3"]
    assert errors["_k0"] == errors["_k2"] == "the compiler took its process down"
    assert "No module named 'missing1'" in errors["_k1"]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_shipped_kernel_keeps_the_rules(tmp_path):
    record, document = tmp_path / "static.jsonl", tmp_path / "kernels.md"
    done = without_interpreter(
        *("-m", "sparsemae.bench", "static", "--json", str(record), "--markdown", str(document))
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    rows = [json.loads(line) for line in record.read_text().splitlines()]
    assert {row["device"] for row in rows} == set(CHIPS)
    for chip in CHIPS:  # every kernel that must be fast is there, and was looked at
        main = [row for row in rows if row["device"] == chip and row["main"]]
        assert {row["kernel"] for row in main} == set(MAIN)
        assert all(row["matrix"].get(UNIT[chip]) for row in main)
    assert not [row["violations"] for row in rows if row["violations"]]
    assert document.read_text().count("| gather |") >= len(CHIPS)
