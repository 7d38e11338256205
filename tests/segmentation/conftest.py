import pytest

from sparsemae.planning.plan import ChannelPlan, Plan
from sparsemae.segmentation.dataset import read_dataset
from sparsemae.segmentation.making import prepare_store


@pytest.fixture(scope="session")
def make_plan():
    """`make_plan(count=1, **changes)`: a plan of a very small network."""

    def make(count=1, **changes):
        names = [f"MR{i}" for i in range(count)]
        raw = {
            "planner": "nnunet",
            "spacing": [1.0, 1.0, 1.0],
            "patch_size": [16, 12, 8],
            "batch_size": 2,
            "channels": [ChannelPlan(name=name) for name in names],
            "features_per_stage": [4, 6],
            "strides": [1, 2],
            "n_blocks_per_stage": [1, 1],
            "kernel_sizes": [3, 3],
            "n_conv_per_stage_decoder": [1],
        }
        return Plan.model_validate(raw | changes)

    return make


@pytest.fixture(scope="session")
def prepared(tmp_path_factory, labelled, make_plan):
    """The labelled data set as a store; not to be changed."""
    dataset = read_dataset(labelled)
    return prepare_store(dataset, make_plan(), tmp_path_factory.mktemp("prepared"))
