r"""Teach a backbone what unlabelled slices look like.

    ray job submit --address http://head:8265 --submission-id pretrain-slices --working-dir . \
        -- python jobs/pretrain.py --config jobs/recipes/resnet101.yaml --archive s3://bucket/tomograms \
        --storage s3://bucket/runs --name slices --or-resume

Submitted again under another id, it goes on from the last checkpoint.
"""

import sys

from motor_ray.cli import main

if __name__ == "__main__":
    raise SystemExit(main(["pretrain", *sys.argv[1:]]))
