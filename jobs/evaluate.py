r"""Compare what was found with labels; the last lines of the job's log are the result.

    ray job submit --address http://head:8265 --submission-id evaluate-2026-11 --working-dir . \
        -- python jobs/evaluate.py --detections s3://bucket/motors --labels labels.csv

Labels are read from the working directory here, or from s3://.
"""

import sys

from motor_ray.cli import main

if __name__ == "__main__":
    raise SystemExit(main(["evaluate", *sys.argv[1:]]))
