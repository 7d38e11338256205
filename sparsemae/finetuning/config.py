"""The configuration of a fine-tuning run."""

from typing import Any, ClassVar, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from sparsemae.config import Size, Strict
from sparsemae.data.loading.affine import AugmentConfig, Probability
from sparsemae.errors import UserError
from sparsemae.kinds import FINETUNING
from sparsemae.planning.plan import Spacing
from sparsemae.segmentation.library import has_library
from sparsemae.segmentation.samples import LIBRARY, PLAIN
from sparsemae.training.options import RESUMABLE, TrainConfig, check_train, without

NONE = "none"  # in place of a file to start from: from scratch
_PEAKS = {"default": 1e-2}  # learning rates; a pre-trained start takes a tenth of nnU-Net's
_PRETRAINED_PEAK = 1e-3


class PlanConfig(Strict):
    """`[plan]`: which voxels, patches and network. A resumed run keeps the plan it has."""

    # auto: like_pretrained if there are weights whose network is known, else nnunet
    mode: Literal["auto", "like_pretrained", "nnunet"] = "auto"
    file: str | None = None  # an nnU-Net plans.json that decides instead
    configuration: str = "3d_fullres"  # in that file
    like: str | None = None  # what like_pretrained follows, if not the weights of --init
    preset: Literal["M", "L", "XL"] = "L"  # nnU-Net's planner
    memory_gb: PositiveFloat | None = None  # of the GPU to plan for; the preset's 8, 24 or 40
    spacing: Spacing | None = None  # mm, in place of the planned


class LabelledDataConfig(AugmentConfig):
    """`[data]` of fine-tuning."""

    patch_size: Size | None = None  # voxels, in place of the planned
    batch_size: PositiveInt | None = None  # of all ranks together, in place of the planned
    workers: NonNegativeInt = 0  # loader processes of each rank
    timeout: PositiveFloat = Field(300.0, le=86400)  # seconds for one patch, then the run stops
    foreground: Probability = 0.33  # share of a batch that is sure to show a class
    # who varies patches: batchgenerators is nnU-Net's library, plain does the same on the device;
    # auto takes the library where it is installed
    augmentation: Literal["auto", "batchgenerators", "plain", "none"] = "auto"
    validation: PositiveInt = 32  # fixed patches of held-out cases scored at every checkpoint


class FinetuneConfig(Strict):
    """Everything that defines a fine-tuning run but the data set."""

    recipes: ClassVar[str] = "finetuning"
    command: ClassVar[str] = FINETUNING.command

    seed: NonNegativeInt = 0
    init: str = NONE  # the weights to start from
    transfer: Literal["encoder+decoder", "encoder"] = "encoder+decoder"  # what is taken of them
    fold: NonNegativeInt | Literal["all"] = 0
    splits: str | None = None  # a splits_final.json in place of the data set's
    # sawtooth: the decoder is warmed up alone, then everything, then the rate falls; warmup: at
    # once everything; default: no warm-up; frozen: the encoder is not trained. auto: sawtooth from
    # pre-trained weights, default from scratch
    schedule: Literal["auto", "sawtooth", "warmup", "default", "frozen"] = "auto"
    # share of the steps that each warm-up takes; train.warmup says it in steps instead
    warmup: float = Field(0.1, ge=0, lt=0.5)
    plan: PlanConfig = PlanConfig()
    data: LabelledDataConfig = LabelledDataConfig()
    train: TrainConfig

    @property
    def pretrained(self) -> bool:
        """Whether the run starts from weights."""
        return self.init != NONE

    def resolved(self) -> "FinetuneConfig":
        """With schedule, warm-up, peak learning rate and augmentation spelled out.

        Raises:
            UserError: `train` says otherwise, the schedule does not fit the start, or the library
                that is to augment is not installed.
        """
        schedule = self.schedule
        if schedule == "auto":
            schedule = "sawtooth" if self.pretrained else "default"
        if schedule in ("sawtooth", "frozen") and not self.pretrained:
            raise UserError(
                f"schedule {schedule}: it protects pre-trained weights, and there are none; give "
                f"--init, or choose default or warmup"
            )
        peak = _PEAKS.get(schedule, _PRETRAINED_PEAK)
        curve = "sawtooth" if schedule == "sawtooth" else "poly"
        given = self.train.model_fields_set
        if "schedule" in given and self.train.schedule != curve:
            raise UserError(
                f"train.schedule {self.train.schedule}: schedule {schedule} makes it {curve}; "
                f"leave it out, and set schedule"
            )
        steps = 0 if schedule == "default" else max(1, round(self.warmup * self.train.steps))
        derived = {"schedule": curve, "warmup": steps, "lr": peak}
        derived = {k: v for k, v in derived.items() if k == "schedule" or k not in given}
        train = self.train.model_copy(update=derived)
        check_train(train)
        data = self.data.model_copy(update={"augmentation": _augmentation(self.data.augmentation)})
        return self.model_copy(update={"schedule": schedule, "data": data, "train": train})

    def going_on(self, before: "FinetuneConfig") -> "FinetuneConfig":
        """This, given again to resume a run of `before`; what it leaves open is the run's.

        Raises:
            UserError: It asks for another start or plan than the run has.
        """
        if self.init != before.init:
            raise UserError(
                f"--init {self.init}: the run started from {before.init} and goes on from its own "
                f"checkpoints; leave --init out, or start a new run in another folder"
            )
        if self.plan not in (before.plan, PlanConfig()):
            raise UserError(
                "plan: a resumed run keeps its plan; leave these keys out, or start a new run"
            )
        update = {"plan": before.plan, "splits": before.splits}
        if "warmup" not in self.train.model_fields_set:
            update["train"] = self.train.model_copy(update={"warmup": before.train.warmup})
            update["train"].model_fields_set.add("warmup")
        return self.model_copy(update=update)

    def defining(self) -> dict[str, Any]:
        """What a resumed run must have in common with this one, as plain data."""
        values = self.resolved().model_dump(mode="json")
        del values["plan"]  # the plan itself counts
        del values["init"]  # it has been taken in; the file may have moved
        del values["splits"]  # so have the cases of the fold
        return without(values, RESUMABLE)


def usual_recipe(init: str | None) -> str:
    """The recipe where no configuration is named, by what is started from."""
    return "scratch" if init == NONE else "finetune"


def _augmentation(asked: str) -> str:
    if asked == "auto":
        return LIBRARY if has_library() else PLAIN
    if asked == LIBRARY and not has_library():
        raise UserError(
            "data.augmentation batchgenerators: batchgeneratorsv2 is not installed; run "
            "`pip install 'sparsemae[augmentation]'`, or set plain, which does the same"
        )
    return asked
