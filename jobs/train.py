r"""Train a detector.

    ray job submit --address http://head:8265 --submission-id train-resnet101 --working-dir . \
        -- python jobs/train.py --config jobs/recipes/resnet101.yaml --archive s3://bucket/tomograms \
        --labels s3://bucket/train_labels.csv --storage s3://bucket/runs --name resnet101 --workers 2:8 --or-resume

Submitted again under another id, it goes on from the last checkpoint.
"""

import sys

from motor_ray.cli import main

if __name__ == "__main__":
    raise SystemExit(main(["train", *sys.argv[1:]]))
