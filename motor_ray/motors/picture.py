"""What all pictures share: their colours, and how they are written.

Uses matplotlib's objects, never pyplot, whose figures are global state that outlives a call.
"""

import io

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from motor_ray import storage

BLACK, ORANGE, SKY, GREEN, BLUE, VERMILION, PURPLE, GREY = (
    "#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7", "#8C8C8C",
)  # fmt: skip
"""The colours of Okabe and Ito, told apart with any colour vision, and a grey."""

DPI = 160


def write_picture(uri: str, figure: Figure) -> None:
    """Write `figure` as a PNG; the same figure gives the same bytes. Raises StorageError if that fails."""
    picture = io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(picture, format="png", dpi=DPI, facecolor="white", metadata={"Software": None})
    storage.write_bytes(uri, picture.getvalue())
