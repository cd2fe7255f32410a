r"""Find motors in every tomogram of an archive.

    ray job submit --address http://head:8265 --submission-id detect-2026-11 --working-dir . \
        -- python jobs/detect.py --archive s3://bucket/tomograms --model s3://bucket/runs/resnet101/best \
        --out s3://bucket/motors

Submitted again with the same --out, under another id, it goes on where it stopped.
"""

import sys

from motor_ray.cli import main

if __name__ == "__main__":
    raise SystemExit(main(["detect", *sys.argv[1:]]))
