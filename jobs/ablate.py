r"""Train with and without each part of the recipe.

    ray job submit --address http://head:8265 --submission-id ablate-parts --working-dir . \
        -- python jobs/ablate.py --config jobs/recipes/resnet101.yaml --archive s3://bucket/tomograms \
        --labels s3://bucket/train_labels.csv --storage s3://bucket/runs --name parts --or-resume

Submitted again under another id, it goes on with the trials that are left.
"""

import sys

from motor_ray.cli import main

if __name__ == "__main__":
    raise SystemExit(main(["ablate", *sys.argv[1:]]))
