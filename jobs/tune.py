r"""Search better settings.

    ray job submit --address http://head:8265 --submission-id tune-search --working-dir . \
        -- python jobs/tune.py --config jobs/recipes/resnet101.yaml --archive s3://bucket/tomograms \
        --labels s3://bucket/train_labels.csv --storage s3://bucket/runs --name search --or-resume

Submitted again under another id, it goes on with the trials that are left.
"""

import sys

from motor_ray.cli import main

if __name__ == "__main__":
    raise SystemExit(main(["tune", *sys.argv[1:]]))
