"""What all tests share."""

import os

from hypothesis import settings

# A shared machine breaks hypothesis's deadline of 200 ms; timings belong in `motor-ray bench`.
settings.register_profile("motor_ray", deadline=None)
settings.load_profile("motor_ray")

os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
