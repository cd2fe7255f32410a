"""Test-time augmentation: a frame is looked at in several ways, and what is said of each is moved back to the frame.

A view is data: what is done to the pixels, and so what has to be undone to the prediction. Cells are blocks of pixels,
so mirroring a frame whose edges are multiples of the stride mirrors its cells, and a centre that lay ``o`` into its
cell then lies ``1 - o`` into it, exactly.
"""

from typing import NamedTuple

import torch

from motor_ray.config import HEATMAP_STRIDE, Augmentation
from motor_ray.detector.model import Prediction
from motor_ray.errors import ConfigError

ROWS, COLUMNS = -2, -1
"""Dimensions of frames and maps: along y and x."""

GAMMA = 0.8
"""Draws dark greys apart, among which dense matter lies, as mildly as the microscopes of an archive differ."""


class View(NamedTuple):
    """A way of looking at frames: transposed first, then mirrored, then with other grey levels."""

    name: str
    transposed: bool = False
    mirrored: tuple[int, ...] = ()
    """Along which of ROWS and COLUMNS."""

    gamma: float = 1.0
    """Grey levels, from 0 to 1, are raised to this power."""

    switches_clahe: bool = False
    """Looks at the frame as it is without CLAHE; with it, if the model was trained without."""

    def forward(
        self, frames: torch.Tensor, switched: torch.Tensor | None = None, *, stride: int = HEATMAP_STRIDE
    ) -> torch.Tensor:
        """What this view shows of uint8 `frames` `(b, c, H, W)`, which `switched` are with CLAHE switched.

        Raises ConfigError if the view moves cells and the frames' edges are no multiples of the `stride` of the
        coarsest ones, or if it transposes them and they are not square; ValueError without the `switched` frames that
        it needs.
        """
        self._check(frames, stride)
        shown = frames
        if self.switches_clahe:
            if switched is None:
                raise ValueError(f"view {self.name!r} needs frames with CLAHE switched, got none")
            shown = switched
        if self.transposed:
            shown = shown.transpose(ROWS, COLUMNS)
        if self.mirrored:
            shown = shown.flip(self.mirrored)
        return shown if self.gamma == 1 else brightened(shown, self.gamma)

    def inverse(self, prediction: Prediction) -> Prediction:
        """What a `prediction` for this view says of the frames themselves."""
        for axis in self.mirrored:
            prediction = unmirrored(prediction, axis)
        return transposed(prediction) if self.transposed else prediction

    def _check(self, frames: torch.Tensor, stride: int) -> None:
        height, width = frames.shape[ROWS:]
        if self.transposed and height != width:
            raise ConfigError(
                f"detect.tta: the view {self.name!r} needs square frames, got {height} x {width} pixels; "
                "set --detect.tta fast or off"
            )
        if (self.transposed or self.mirrored) and (height % stride or width % stride):
            raise ConfigError(
                f"detect.tta: the view {self.name!r} needs frames whose edges are multiples of {stride} "
                f"pixels, got {height} x {width}; set --detect.tta off"
            )


AS_IT_IS = View("as it is")
FAST = (AS_IT_IS, View("mirrored along x", mirrored=(COLUMNS,)))

VIEWS: dict[Augmentation, tuple[View, ...]] = {
    "off": (AS_IT_IS,),
    "fast": FAST,
    # Each of the usual changes once and alone, so that none takes the frame far from what the network was trained on,
    # and one that it does not bear weighs an eighth.
    "full": (
        *FAST,
        View("mirrored along y", mirrored=(ROWS,)),
        View("turned by 90 degrees", transposed=True, mirrored=(ROWS,)),
        View("turned by 180 degrees", mirrored=(ROWS, COLUMNS)),
        View("turned by 270 degrees", transposed=True, mirrored=(COLUMNS,)),
        View("other gamma", gamma=GAMMA),
        View("CLAHE switched", switches_clahe=True),
    ),
}
"""What each setting looks at."""


def brightened(frames: torch.Tensor, gamma: float) -> torch.Tensor:
    """uint8 `frames` with grey levels, taken from 0 to 1, raised to the power `gamma`."""
    levels = torch.arange(256, device=frames.device, dtype=torch.float32) / 255
    table = (255 * levels**gamma).round().to(torch.uint8)
    return table[frames.long()]


def unmirrored(prediction: Prediction, axis: int) -> Prediction:
    """A prediction for frames that were mirrored along `axis`, ROWS or COLUMNS, as one for the frames."""
    heatmap, size, offset = (maps.flip(axis) for maps in prediction[:3])  # copies, so the last may be changed
    offset[:, axis - ROWS] = 1 - offset[:, axis - ROWS]
    return Prediction(heatmap, size, offset, prediction.presence)


def transposed(prediction: Prediction) -> Prediction:
    """A prediction for frames whose y and x were exchanged, as one for the frames; and the other way round."""
    heatmap, size, offset = (maps.transpose(ROWS, COLUMNS) for maps in prediction[:3])
    return Prediction(heatmap, size.flip(1), offset.flip(1), prediction.presence)
