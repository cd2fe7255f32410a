r"""Train on labels, and on what the model is sure of elsewhere.

    ray job submit --address http://head:8265 --submission-id pseudo-label-rounds --working-dir . \
        -- python jobs/pseudo-label.py --config jobs/recipes/resnet101.yaml --archive s3://bucket/labelled \
        --labels s3://bucket/train_labels.csv --unlabelled s3://bucket/others --storage s3://bucket/runs --name rounds

Submitted again under another id, it goes on with the round where it stopped.
"""

import sys

from motor_ray.cli import main

if __name__ == "__main__":
    raise SystemExit(main(["pseudo-label", *sys.argv[1:]]))
