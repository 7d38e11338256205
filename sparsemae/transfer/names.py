"""The tensors of a residual-encoder U-Net, found among whatever names a file has for them.

nnU-Net, nnssl and code like theirs name the layers as `ResEncUNet` does, but put the network under
some attribute, wrap it, leave out its decoder, and store a tensor under up to four names. A forward
pass runs `encoder`, of which `decoder.encoder` is a second reference, and in every layer
`all_modules.{0,1}`, of which `conv` and `norm` are second references. nnssl's S3D breaks that: its
`convert_to_spark_cnn` (nnssl 7044864) puts two separate layers there and trains `all_modules` only.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sparsemae.data.codes import one_line
from sparsemae.errors import UserError

TAKEN = "only 3D residual-encoder U-Nets (nnU-Net's ResEnc, nnssl's ResEncL) are taken"
_WRAPPERS = ("module", "_orig_mod")  # of DistributedDataParallel and torch.compile
_STEM = re.compile(r"(|.+\.)stem\.convs\.0\.(?:conv|all_modules\.0)\.weight")
_TENSOR = r"(conv|norm)\.(weight|bias)"
_ENCODER = re.compile(
    rf"stem\.convs\.0\.{_TENSOR}|stages\.\d+\.blocks\.\d+\.(conv[12]|skip\.[01])\.{_TENSOR}"
)
_DECODER = re.compile(
    rf"stages\.\d+\.convs\.\d+\.{_TENSOR}|(transpconvs|seg_layers)\.\d+\.(weight|bias)"
)
_OTHERS = (  # what some name holds, and whose that is
    (r"(^|\.)(eva|vit|down_projection|pos_embed|cls_token|attn|self_attn)(\.|$)", "a transformer"),
    (r"(^|\.)stages\.0\.0\.convs\.0\.", "a plain U-Net (PlainConvUNet)"),
    (r"(^|\.)layer[1-4]\.0\.conv1\.", "a ResNet"),
)
_SHOWN = 5  # names in a message


@dataclass(frozen=True)
class Named:
    """Tensors under the names of `ResEncUNet.named_parameters()`, and what was done for it."""

    tensors: dict[str, Tensor]  # float32, axes as in the file
    notes: tuple[str, ...]


def canonical(tensors: Mapping[str, Tensor], origin: Path, *, encoder: str | None = None) -> Named:
    """Find the network among `tensors`; of what stands there twice take what a forward pass runs.

    Args:
        encoder: Where its encoder lies, such as "online_encoder", if the file says so.

    Raises:
        UserError: Another network, or several; says what it looks like and what is taken.
    """
    notes: list[str] = []
    named = _unwrapped(tensors, origin, notes)
    root = _encoder_root(named, origin, encoder)
    found, used, twice = _resolved(named, [root, *_second_references(root)])
    _check(found, _ENCODER, origin)
    out = {f"encoder.{name}": tensor for name, tensor in found.items()}
    if (decoder := _decoder_root(root)) is not None:
        found, more, conflicts = _resolved(named, [decoder], but=f"{decoder}encoder.")
        used, twice = used | more, twice + conflicts
        if all(map(_DECODER.fullmatch, found)):
            _check(found, _DECODER, origin)
            out |= {f"decoder.{name}": tensor for name, tensor in found.items()}
        else:
            notes.append("left out a decoder of another kind")
    if twice:
        notes.append(
            f"{twice} tensors stood there twice with different values: took those that the network "
            f"ran (encoder before decoder.encoder, all_modules before conv and norm)"
        )
    if left := [name for name in named if name not in used]:
        parts = _listed(sorted({name.removeprefix(root).split(".")[0] for name in left}))
        notes.append(f"left out {len(left)} tensors of other parts: {parts}")
    if any(tensor.dtype != torch.float32 for tensor in out.values()):
        notes.append("converted to float32")
    return Named({name: tensor.float() for name, tensor in out.items()}, tuple(notes))


def _unwrapped(tensors: Mapping[str, Tensor], origin: Path, notes: list[str]) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    removed = set()
    for name, tensor in tensors.items():
        parts = name.split(".")
        removed |= set(parts) & set(_WRAPPERS)
        short = ".".join(part for part in parts if part not in _WRAPPERS)
        if short in out and not _same(out[short], tensor):
            raise UserError(
                one_line(f"{origin}: {short} is there wrapped and not, with different values: ")
                + "save one network alone"
            )
        out[short] = tensor
    if removed:
        notes.append(f"removed {' and '.join(f'{name}.' for name in sorted(removed))} from names")
    return out


def _encoder_root(named: Mapping[str, Tensor], origin: Path, hint: str | None) -> str:
    """What the names of the encoder begin with: "encoder.", "" or longer."""
    roots = {match[1] for name in named if (match := _STEM.fullmatch(name))}
    roots = {r for r in roots if any(n.startswith(f"{r}stages.0.blocks.0.") for n in named)}
    if not roots:
        raise UserError(one_line(f"{origin}: {_what_it_is(named)}; {TAKEN}"))
    if hint is not None and f"{hint}." in roots:
        return f"{hint}."
    roots -= {second for root in roots for second in _second_references(root)}
    best, *others = sorted(roots, key=lambda r: (not _has_decoder(named, r), len(r), r))
    expected, _, _ = _resolved(named, [best])
    for other in others:
        found, _, _ = _resolved(named, [other])
        if found.keys() != expected.keys() or not all(
            _same(tensor, expected[name]) for name, tensor in found.items()
        ):
            places = ", ".join(sorted(r.rstrip(".") or "top level" for r in roots))
            raise UserError(
                one_line(f"{origin}: several encoders: {places}; save the wanted one alone")
            )
    return best


def _second_references(root: str) -> list[str]:
    """Where the encoder of `root` is named again."""
    decoder = _decoder_root(root)
    return [] if decoder is None or root == f"{decoder}encoder." else [f"{decoder}encoder."]


def _decoder_root(root: str) -> str | None:
    """What the names of the decoder that goes with an encoder begin with; None if it has none."""
    if root != "encoder." and not root.endswith(".encoder."):
        return None
    base = root.removesuffix("encoder.")
    if base == "decoder." or base.endswith(".decoder."):  # only the second reference was saved
        return base
    return f"{base}decoder."


def _has_decoder(named: Mapping[str, Tensor], root: str) -> bool:
    decoder = _decoder_root(root)
    return decoder is not None and any(n.startswith(f"{decoder}transpconvs.") for n in named)


def _resolved(
    named: Mapping[str, Tensor], roots: list[str], *, but: str | None = None
) -> tuple[dict[str, Tensor], set[str], int]:
    """What lies below `roots`, the first one preferred; names used; tensors that differ."""
    places: dict[str, list[tuple[bool, int, str]]] = {}
    for rank, root in enumerate(roots):
        for name in named:
            if name.startswith(root) and not (but and name.startswith(but)):
                local = name.removeprefix(root)
                plain = local.replace(".all_modules.0.", ".conv.").replace(
                    ".all_modules.1.", ".norm."
                )
                if root or _ENCODER.fullmatch(plain):  # at the top level other parts lie beside it
                    places.setdefault(plain, []).append((plain == local, rank, name))
    out, used, twice = {}, set(), 0
    for plain, found in places.items():
        first, *others = (named[name] for *_, name in sorted(found))
        out[plain] = first
        used |= {name for *_, name in found}
        twice += not all(_same(first, other) for other in others)
    return out, used, twice


def _check(found: Mapping[str, Tensor], known: re.Pattern, origin: Path) -> None:
    """Refuse a tensor that our network does not have, or of another number of axes."""
    for name, tensor in found.items():
        if not known.fullmatch(name):
            raise UserError(
                one_line(f"{origin}: a variant of the network, with {name} in it; {TAKEN}")
            )
        conv = name.endswith("conv.weight") or name.startswith("transpconvs")
        axes = 5 if (conv or name.startswith("seg_layers")) and name.endswith("weight") else 1
        if tensor.ndim != axes or not tensor.is_floating_point():
            what = "a 2D network" if tensor.ndim == 4 else f"{tensor.dtype}, {tensor.ndim} axes"
            raise UserError(one_line(f"{origin}: {name} is of {what}; {TAKEN}"))


def _what_it_is(named: Mapping[str, Tensor]) -> str:
    for pattern, what in _OTHERS:
        if any(re.search(pattern, name) for name in named):
            return f"the weights of {what}, by their names ({_listed(list(named))})"
    return f"no residual-encoder U-Net, by the names of its tensors ({_listed(list(named))})"


def _listed(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + ", ..." * (len(names) > _SHOWN)


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and (
        one.data_ptr() == other.data_ptr() or torch.equal(one, other)
    )
