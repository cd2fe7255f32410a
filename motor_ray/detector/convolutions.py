"""3 x 3 convolutions, plain or separable."""

from torch import nn


def convolution(in_channels: int, out_channels: int, *, separable: bool) -> nn.Module:
    """A 3 x 3 convolution that keeps the map's size.

    `separable`: one 3 x 3 kernel for each channel, then a 1 x 1 convolution, at about a ninth of the multiplications
    (Howard et al. 2017, arXiv 1704.04861).
    """
    if not separable:
        return nn.Conv2d(in_channels, out_channels, 3, padding=1)
    each = nn.Conv2d(in_channels, in_channels, 3, padding=1, groups=in_channels)
    return nn.Sequential(each, nn.Conv2d(in_channels, out_channels, 1))
