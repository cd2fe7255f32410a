"""Pixels to tensors: where a slice lies in a frame, grey levels, augmentation and targets."""
