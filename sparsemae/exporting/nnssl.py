"""The plan that nnssl puts beside weights: which network, trained on what, where its parts are.

Form of `AdaptationPlan.serialize()` in nnssl, as nnU-Net's `nnUNetv2_preprocess_like_nnssl` and
`PretrainedTrainer` read it; Python's own types only, or `weights_only=True` would refuse the file.
"""

from typing import Any

from sparsemae.exporting.nnunet import IMPORTED, architecture
from sparsemae.models.topology import Topology
from sparsemae.planning.nnunet_plans import NORMALIZATIONS, in_network_axes, to_network_axes
from sparsemae.transfer.pretrained import Pretrained
from sparsemae.triples import Triple

RESENC_L = Topology.preset("L")
PATCH = 160  # voxels, recommended where nothing is known
_STEM = "encoder.stem.convs.0"
_SCHEMES = {ours: theirs for theirs, ours in NORMALIZATIONS.items()}


def adaptation_plan(pretrained: Pretrained, topology: Topology, axes: Triple) -> dict[str, Any]:
    """For weights whose axis i is our axis `axes[i]`; `topology` is in our axes."""
    turned = in_network_axes(topology, axes)
    patch = [PATCH] * 3
    if pretrained.patch_size is not None:
        patch = list(to_network_axes(pretrained.patch_size, axes))
    named = topology == RESENC_L
    return {
        "architecture_plans": {
            "arch_class_name": "ResEncL" if named else "ResidualEncoderUNet",
            "arch_kwargs": None if named else architecture(turned),
            "arch_kwargs_requiring_import": None if named else list(IMPORTED),
        },
        "pretrain_plan": _pretrain_plan(pretrained, patch, axes),
        "pretrain_num_input_channels": pretrained.input_channels,
        "recommended_downstream_patchsize": list(patch),
        "key_to_encoder": "encoder.stages",
        "key_to_stem": "encoder.stem",
        "keys_to_in_proj": [f"{_STEM}.conv", f"{_STEM}.all_modules.0"],
        "key_to_lpe": None,
    }


def _pretrain_plan(pretrained: Pretrained, patch: list[int], axes: Triple) -> dict[str, Any]:
    spacing, style = None, "noresample"
    if pretrained.spacing is not None:
        spacing = list(to_network_axes(pretrained.spacing, axes))
        style = "onemmiso" if set(spacing) == {1.0} else "median"
    forward = [2 - axis for axis in axes]
    channels = pretrained.input_channels
    return {
        "dataset_name": "Dataset000_sparsemae",
        "plans_name": "nnsslPlans",
        "original_median_spacing_after_transp": spacing or [1.0, 1.0, 1.0],
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": forward,
        "transpose_backward": [forward.index(axis) for axis in range(3)],
        "experiment_planner_used": "ExperimentPlanner",
        "configurations": {
            style: {
                "data_identifier": f"nnsslPlans_{style}",
                "preprocessor_name": "DefaultPreprocessor",
                "spacing_style": style,
                "normalization_schemes": [_scheme(pretrained.normalization)] * channels,
                "use_mask_for_norm": [False] * channels,
                "resampling_fn_data": "resample_data_or_seg_to_shape",
                "resampling_fn_data_kwargs": _resampling(3),
                "resampling_fn_mask": "resample_data_or_seg_to_shape",
                "resampling_fn_mask_kwargs": _resampling(1),
                "spacing": spacing,
                "patch_size": list(patch),
            }
        },
    }


def _scheme(normalization: str | None) -> str:
    """The nearest of nnU-Net's."""
    return _SCHEMES.get(normalization or "", "ZScoreNormalization")


def _resampling(order: int) -> dict[str, Any]:
    return {"is_seg": False, "order": order, "order_z": 0, "force_separate_z": None}
