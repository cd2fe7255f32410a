"""Every setting of a run, as one tree of frozen models.

Lengths end in ``_angstrom``; shapes and counts are in voxels, pixels or heatmap cells, as each docstring
says. Order is z, y, x. The defaults are the published recipe (ResNet-101, 720 x 720 frames).
"""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

HEATMAP_STRIDE = 4
"""Frame pixels per heatmap cell: 720 x 720 frames have 180 x 180 cells."""

LEVEL_STRIDES = (HEATMAP_STRIDE, 8, 16)
"""Frame pixels per cell of the pyramid's levels P2, P3 and P4."""


class Settings(BaseModel):
    """A group of settings: immutable, and an unknown name is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class ArchiveSettings(Settings):
    """How tomograms are read."""

    anonymous: bool = False
    """Read public buckets without credentials."""

    timeout_seconds: float = Field(30.0, gt=0)
    """A request to object storage that is silent for so long is tried again."""

    attempts: int = Field(8, ge=1)
    """Tries of a request to object storage, with growing random pauses between them."""

    mrc_mode_0: Literal["auto", "int8", "uint8"] = "auto"
    """MRC mode 0 is int8 by the standard, but many writers meant uint8. 'auto' believes IMOD's stamp and else reads
    uint8; signed bytes then look wrapped, which `repair` undoes."""

    voxel_spacing_angstrom: float | None = Field(None, gt=0)
    """The true voxel spacing of tomograms whose files do not say it, or say it wrongly; of an OME-Zarr the finest
    level's."""

    zarr_level: int = Field(0, ge=0)
    """Resolution level of OME-Zarr tomograms that is looked at; 0 is the finest."""

    repair: bool = True
    """Undo wrapped bytes and inverted contrast where the grey values show them."""


class FrameSettings(Settings):
    """How a slice becomes the square frame that the network sees."""

    mode: Literal["fit", "spacing"] = "fit"
    """'fit': the longest edge becomes `size`; 'spacing': resample, in as few frames as it takes."""

    size: int = Field(720, ge=64, le=4096, multiple_of=16)
    """Edge of a frame in pixels."""

    spacing_angstrom: float = Field(16.0, gt=0)
    """Angstrom per frame pixel in mode 'spacing'."""


class PreprocessSettings(Settings):
    """Grey levels, before the network sees them."""

    clip_percentiles: tuple[float, float] = (0.5, 99.5)
    """Slices that are not 8-bit are clipped to these percentiles and stretched to 0-255."""

    clahe: bool = True
    """Contrast-limited adaptive histogram equalisation."""

    clahe_clip: float = Field(2.0, gt=0)
    """Clip limit of CLAHE."""

    clahe_tiles: int = Field(8, ge=1, le=64)
    """CLAHE tiles along each edge of the slice as it is resampled for frames."""

    @model_validator(mode="after")
    def _percentiles_ascend(self) -> "PreprocessSettings":
        low, high = self.clip_percentiles
        if not 0 <= low < high <= 100:
            raise ValueError(f"clip_percentiles must ascend within 0-100, got {low:g} and {high:g}")
        return self


class AugmentSettings(Settings):
    """Random changes of a training frame; its boxes move along."""

    rotation_degrees: float = Field(15.0, ge=0, le=180)
    """Rotation by up to this angle either way."""

    scaling: float = Field(0.1, ge=0, lt=1)
    """Zoom by up to this fraction either way."""

    translation_pixels: float = Field(20.0, ge=0)
    """Shift by up to this many frame pixels along each axis."""

    flips: bool = False
    """Mirror along y and x, each with probability one half."""

    poisson_probability: float = Field(0.5, ge=0, le=1)
    """Share of frames whose pixels become Poisson draws with the pixel's intensity as their mean."""

    blur_sigma_max: float = Field(1.5, ge=0)
    """Gaussian blur with a sigma drawn from 0 to this, in frame pixels."""


class TargetSettings(Settings):
    """What the network is asked to predict."""

    box_pixels: float = Field(100.0, gt=0)
    """Edge of the box drawn around a motor, in frame pixels. The labels are points; the boxes are ours."""

    box_angstrom: float | None = Field(None, gt=0)
    """Edge of that box in angstrom instead, so that it follows the voxel spacing and the frame's scale. In frames of
    mode 'fit' an untrained network still starts from boxes of `box_pixels`."""

    sigma: float = Field(2.0, gt=0)
    """Standard deviation of a centre's Gaussian, in heatmap cells; with several levels in cells of the box's own."""

    reach_angstrom: float = Field(60.0, ge=0)
    """A slice shows a motor if it lies within this distance of the motor's centre along z."""

    fade_angstrom: float | None = Field(None, gt=0)
    """Standard deviation along z of a Gaussian by which a motor's target fades on slices away from its centre, as a
    slice of a 3-D Gaussian does. When not given, every slice within reach shows it fully."""


Backbone = Literal["resnet18", "resnet34", "resnet50", "resnet101", "efficientnet_b3"]

Attention = Literal["none", "cbam"]


class ModelSettings(Settings):
    """The network."""

    backbone: Backbone = "resnet101"
    """Feature extractor, truncated after its last stage."""

    pretrained: str = "imagenet"
    """'imagenet' (torchvision's weights), 'none', or the path or URI of a state dict of the backbone."""

    in_slices: Literal[1, 3] = 1
    """1: the slice as a grey image. 3: the slices z-k, z, z+k as the three channels."""

    slice_step: int = Field(1, ge=1, le=64)
    """k, in slices, when `in_slices` is 3."""

    slice_step_angstrom: float | None = Field(None, gt=0)
    """k in angstrom instead: in each tomogram the nearest number of slices, at least one. Where the voxel spacing is
    unknown, `link.assumed_spacing_angstrom` is taken for it."""

    neck: Literal["pyramid", "deconvolution", "light"] = "pyramid"
    """Between backbone and heads. 'pyramid': a feature pyramid. 'deconvolution': three transposed convolutions on the
    coarsest features, as in the plain CenterNet. 'light': a pyramid and heads of separable convolutions and half the
    channels, for speed with a small backbone."""

    attention: Attention = "none"
    """'cbam': channel and spatial attention (Woo et al. 2018, arXiv 1807.06521) on the pyramid's sums and before the
    heads; it starts as if it were not there."""

    levels: Literal[1, 2, 3] = 1
    """Levels of the pyramid that have heads: P2, of stride 4; P3, for boxes of 64 frame pixels and more; P4, of 128 and
    more."""

    neck_channels: int = Field(256, ge=8)
    """Channels of the feature pyramid; a light one has half of them. Of the transposed convolutions the first has so
    many, the last a quarter."""

    head_channels: int = Field(64, ge=8)
    """Channels between a head's two convolutions; half of them with a light neck."""

    @model_validator(mode="after")
    def _levels_have_features(self) -> "ModelSettings":
        if self.levels > 1 and self.neck == "deconvolution":
            raise ValueError(
                f"model.levels {self.levels} needs features of several strides, but model.neck deconvolution makes "
                "stride 4 alone; choose --model.neck pyramid or light, or --model.levels 1"
            )
        return self

    @model_validator(mode="after")
    def _step_is_of_use(self) -> "ModelSettings":
        if self.slice_step_angstrom is None:
            return self
        if self.in_slices == 1:
            raise ValueError(
                f"model.slice_step_angstrom {self.slice_step_angstrom:g} says how far apart three slices lie, but "
                "model.in_slices is 1; set --model.in-slices 3, or leave the step out"
            )
        if self.slice_step != 1:
            raise ValueError(
                f"model.slice_step_angstrom {self.slice_step_angstrom:g} and model.slice_step {self.slice_step} say "
                "the same thing in two ways; leave one of them out"
            )
        return self


class LossSettings(Settings):
    """The parts of the loss, and what each weighs."""

    heatmap: Literal["focal", "bce"] = "focal"
    """Penalty-reduced focal loss, or plain binary cross-entropy."""

    heatmap_weight: float = Field(1.0, ge=0)
    """Weight of the centre heatmap."""

    offset_weight: float = Field(1.0, ge=0)
    """Weight of the L1 distance of the sub-cell offset."""

    size_weight: float = Field(0.1, ge=0)
    """Weight of the L1 distance of the box's size, in heatmap cells."""

    giou_weight: float = Field(1.0, ge=0)
    """Weight of 1 - GIoU of the box at each centre."""

    presence_weight: float = Field(1.0, ge=0)
    """Weight of the binary cross-entropy of 'this slice shows a motor'."""


class TrainSettings(Settings):
    """Optimisation, and what a run leaves behind."""

    epochs: int = Field(100, ge=1)
    """Passes over the training slices."""

    batch_size: int = Field(4, ge=1)
    """Frames a worker takes through the network at a time."""

    accumulate: int = Field(1, ge=1)
    """Batches of each worker that make one step of the optimizer."""

    learning_rate: float = Field(2e-4, gt=0)
    """AdamW's peak learning rate, for steps of 4 frames."""

    scale_learning_rate: Literal["no", "sqrt", "linear"] = "sqrt"
    """How the learning rate grows with the frames of a step, those of all workers; for Adam the square root keeps
    training alike (Malladi et al. 2022, arXiv 2205.10287)."""

    schedule: Literal["cosine", "cyclic"] = "cosine"
    """The learning rate falls to zero along a cosine, once or in `cycles`; after each cycle a snapshot is kept."""

    cycles: int = Field(5, ge=1)
    """Cycles of the cyclic schedule (Huang et al. 2017, arXiv 1704.00109); they must divide `epochs`."""

    weight_decay: float = Field(1e-5, ge=0)
    """AdamW's weight decay."""

    clip_norm: float = Field(5.0, gt=0)
    """Gradients are scaled down to this norm."""

    ema_decay: float = Field(0.0, ge=0, lt=1)
    """Weights are averaged over the steps, with this decay, and the averages are what is validated and kept; 0 for
    the plain weights."""

    batch_norm: Literal["batch", "sync", "frozen"] = "batch"
    """Statistics of batch normalisation: of each worker's batch, of all workers' together (on GPUs), or those that the
    backbone came with. For small batches one of the latter two."""

    mixed_precision: bool = True
    """Compute in bfloat16 where that is safe."""

    channels_last: bool = True
    """Lay images out as convolutions are fastest with."""

    compile: bool = False
    """torch.compile the network: the first steps take minutes, the others less."""

    start_from: str | None = None
    """Checkpoint whose weights training starts from, such as another run's best."""

    patience: int = Field(15, ge=1)
    """Stop after so many validations of which none was better, by mAP@0.5, or if that is equal by mAP@0.7 and 0.9; not
    with the cyclic schedule."""

    negatives_per_positive: float = Field(1.0, ge=0)
    """Slices without a motor for each slice with one. Of a slice that makes several frames only one may show it."""

    empty_share: float = Field(0.5, ge=0, le=1)
    """Share of the slices without a motor that come from tomograms without one; the others lie far from any motor."""

    slices_per_motor: int = Field(9, ge=1)
    """At most this many slices within a motor's reach, evenly spaced, are training samples."""

    validate_steps: int | None = Field(None, ge=1)
    """Validate after every so many steps, too, not only after every epoch."""

    tomograms: Literal["no", "end", "during"] = "end"
    """When whole validation tomograms are looked at: after training, or also beside it, if the cluster has room."""

    tomograms_epochs: int = Field(5, ge=1)
    """With `tomograms` during: after every so many epochs."""

    checkpoint_steps: int = Field(1000, ge=1)
    """Steps after which a checkpoint to go on from is kept, besides that after every epoch."""

    max_failures: int = Field(3, ge=0)
    """How often training goes on by itself after losing a worker or a node; preempted nodes are not counted."""

    worker_cpus: int = Field(1, ge=1)
    """CPUs of a worker; a worker without GPU computes on this many threads."""

    worker_resources: dict[str, float] = {}
    """What else a worker takes, by the names of the cluster's resources."""

    cache: str | None = None
    """Folder on every node's own disk for decoded frames; one in the folder for temporary files when not given."""

    tensorboard: bool = True
    """Write metrics for TensorBoard to the run's folder."""

    mlflow: str | None = None
    """Tracking URI of an MLflow server or database that metrics go to, as well; one that all nodes understand."""

    seed: int = Field(420, ge=0)
    """Seed of the choice of slices, the initial weights and the augmentation."""

    split_seed: int = Field(420, ge=0)
    """Seed of the split into tomograms to train on, to validate with and to leave alone."""

    @model_validator(mode="after")
    def _cycles_divide_epochs(self) -> "TrainSettings":
        if self.schedule == "cyclic" and self.epochs % self.cycles:
            raise ValueError(f"cycles must divide epochs, got {self.cycles} and {self.epochs}")
        return self


Augmentation = Literal["off", "fast", "full"]
"""Test-time augmentation."""

PASSES: dict[Augmentation, int] = {"off": 1, "fast": 2, "full": 8}
"""Times that a frame goes through each network with it."""

Averaging = Literal["logit", "probability"]
"""How heatmaps become one."""


class DetectSettings(Settings):
    """From slices to scored boxes."""

    score_threshold: float = Field(0.1, ge=0, le=1)
    """Peaks below this are not reported. Low, because slices that agree make a motor of weak peaks."""

    max_detections: int = Field(20, ge=1)
    """Detections kept per slice, best first."""

    slab_slices: int = Field(19, ge=1, le=64)
    """Slices of one tomogram that are read together and travel as one row, at most: fewer where their frames would
    weigh more than 10 MB."""

    batch_frames: int = Field(8, ge=1)
    """Frames that pass through the network at a time on a GPU; a CPU is fastest one by one."""

    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile; 'auto' compiles when the archive is long enough to pay for it."""

    mixed_precision: bool = True
    """Compute in bfloat16."""

    tta: Augmentation = "off"
    """Test-time augmentation: 'fast' looks at each frame twice, as it is and mirrored; 'full' eight times, mirrored,
    turned, with another gamma and with CLAHE switched, too. Their heatmaps are averaged."""

    ensemble: Averaging = "probability"
    """How heatmaps of several models, and of several looks at a frame, are averaged. With 'logit' one that is sure to
    see nothing silences the others."""

    features: bool = False
    """Keep a few numbers of what the network saw at each detection, which `motor-ray rescore` learns from; always so
    with a model that has learned it."""

    exhaustive: bool = False
    """Look at every slice, not first at every `z_stride`-th and then closely where there may be a motor."""

    z_stride: int | None = Field(None, ge=1)
    """The first look takes every so-manieth slice. When not given, as many as fit between two looks without a motor
    of the reach that the model was trained with falling between them."""

    candidate_score: float = Field(0.1, ge=0, le=1)
    """A detection of the first look with this score or more has the slices around it looked at."""

    good_share: float = Field(0.5, ge=0, le=1)
    """A tomogram of which a smaller share of slices can be read is listed as a failure."""

    loaders: int | None = Field(None, ge=1)
    """Preprocessing actors, at most; chosen from the cluster's CPUs when not given."""

    slabs_per_loader: int = Field(4, ge=1, le=16)
    """Slabs that a preprocessing actor has in hand at a time, so that it decodes one while it waits for another."""

    scorers: int | None = Field(None, ge=1)
    """Inference actors, at most; one per GPU, or a single one without GPUs, when not given."""

    @property
    def contrasts(self) -> int:
        """Versions of each frame that the network needs: 2 are with CLAHE and without."""
        return 2 if self.tta == "full" else 1


class LinkSettings(Settings):
    """From boxes on slices to motors in three dimensions."""

    merge_distance_angstrom: float = Field(400.0, gt=0)
    """Two motors nearer than this are one; the closest pair in the public labels is 432 angstrom apart."""

    max_gap_angstrom: float = Field(100.0, ge=0)
    """A motor may go unseen along z for this long."""

    min_slices: int = Field(2, ge=1)
    """A motor seen on fewer slices is dropped, unless the tomogram has fewer."""

    evidence_angstrom: float = Field(160.0, gt=0)
    """A motor's score is the mean over its best slices, as many as this holds along z; slices without a detection count
    0. A motor is 450 angstrom wide; much of what is taken for one is seen for less."""

    assumed_spacing_angstrom: float = Field(13.3, gt=0)
    """Voxel spacing of a tomogram whose own is unknown; the commonest of the public data."""


USUAL_THRESHOLD = 0.1
"""Score from which a motor counts where nothing was learned: a guess, which finds too little with a detector that was
trained for a short time. Those in `motor-ray bench accuracy` learn 0.05 to 0.1, and lose up to 0.16 of F2 with this."""


class EvaluateSettings(Settings):
    """How detections are compared with labels."""

    threshold: float | None = Field(None, ge=0, le=1)
    """Score from which a motor counts. When not given, what `motor-ray calibrate` learned for the model, else 0.1.
    For scores that are probabilities the best threshold for an F-beta is that F-beta / (1 + beta^2) (Lipton et al.
    2014, arXiv 1402.1892): below 0.2 for F2, which forgives a false motor."""

    radius_angstrom: float = Field(1000.0, gt=0)
    """A motor within this distance of the truth is a hit (the official metric)."""

    @property
    def threshold_or_usual(self) -> float:
        """`threshold`, or 0.1 if it is not given."""
        return USUAL_THRESHOLD if self.threshold is None else self.threshold


class PretrainSettings(Settings):
    """What a backbone is taught without labels: to say what the next slice shows, from one with parts hidden."""

    slices_per_tomogram: int = Field(32, ge=1)
    """At most this many slices of each tomogram, evenly spaced, are learned from."""

    mask_share: float = Field(0.3, ge=0, lt=1)
    """Share of the frame that is hidden; 0 leaves only the noise to be told from what is there."""

    mask_pixels: int = Field(32, ge=4)
    """Edge of a hidden patch in frame pixels."""

    neighbour: int = Field(1, ge=1, le=64)
    """How many slices away the slice is that a network which sees one slice is to say. More where the noise of adjacent
    slices is alike, as in tomograms that were filtered or interpolated along z."""


class PseudoSettings(Settings):
    """Which of a model's own findings it is taught as if they were labels."""

    positive_score: float | None = Field(None, ge=0, le=1)
    """A motor that scores this much is taken for one. When not given, the lowest score from which on `precision` of
    the motors found in validation tomograms are true."""

    min_slices: int = Field(4, ge=1)
    """And must be seen on so many slices."""

    negative_score: float | None = Field(None, ge=0, le=1)
    """A tomogram whose best motor scores less is taken to hold none. When not given, the highest score that all but
    1 - `precision` of the validation tomograms with a motor reach. In a tomogram with a sure motor, slices near one
    that scores between the two are not learned from."""

    precision: float = Field(0.95, gt=0, le=1)
    """Share of what a model says of validation tomograms that must be right, where the two scores are not given."""

    share: float = Field(1.0, gt=0)
    """Pseudo-labelled tomograms for each labelled one that is trained on, at most; also of those with a motor alone."""

    @model_validator(mode="after")
    def _scores_leave_room_for_doubt(self) -> "PseudoSettings":
        low, high = self.negative_score, self.positive_score
        if low is not None and high is not None and low > high:
            raise ValueError(f"negative_score {low:g} must not exceed positive_score {high:g}")
        return self


class CareSettings(Settings):
    """Which labels deserve a second look."""

    missing_score: float = Field(0.2, ge=0, le=1)
    """A motor that scores this much and has no label is a likely missing one: twice USUAL_THRESHOLD, for a score is the
    mean of many slices, of which a detector is sure of few."""

    wrong_score: float = Field(0.1, ge=0, le=1)
    """A label is likely wrong if nothing near it scores this much on any slice."""

    radius_angstrom: float = Field(1000.0, gt=0)
    """A label and a detection within this distance may be of one motor."""

    agree_angstrom: float = Field(300.0, gt=0)
    """Farther apart than this they disagree about where it is; a motor is about 450 angstrom wide."""

    tiles: int = Field(20, ge=1, le=100)
    """Suspects on a page of the contact sheet."""

    @model_validator(mode="after")
    def _wrong_is_less_than_missing(self) -> "CareSettings":
        if self.wrong_score > self.missing_score:
            raise ValueError(f"wrong_score {self.wrong_score:g} must not exceed missing_score {self.missing_score:g}")
        return self


class RunSettings(Settings):
    """Every setting there is."""

    archive: ArchiveSettings = ArchiveSettings()
    frame: FrameSettings = FrameSettings()
    preprocess: PreprocessSettings = PreprocessSettings()
    augment: AugmentSettings = AugmentSettings()
    targets: TargetSettings = TargetSettings()
    model: ModelSettings = ModelSettings()
    loss: LossSettings = LossSettings()
    train: TrainSettings = TrainSettings()
    detect: DetectSettings = DetectSettings()
    link: LinkSettings = LinkSettings()
    evaluate: EvaluateSettings = EvaluateSettings()
    pretrain: PretrainSettings = PretrainSettings()
    pseudo: PseudoSettings = PseudoSettings()
    care: CareSettings = CareSettings()

    @model_validator(mode="after")
    def _frozen_statistics_come_from_somewhere(self) -> "RunSettings":
        if self.train.batch_norm == "frozen" and self.model.pretrained == "none" and not self.train.start_from:
            raise ValueError(
                "train.batch_norm frozen keeps the statistics that the backbone came with, but model.pretrained is "
                "none and there is no train.start_from; a network from random weights cannot learn so"
            )
        return self
