"""motor_ray finds bacterial flagellar motors in cryo-electron tomograms."""

__version__ = "0.1.0"
