r"""Put a model behind the cluster's endpoint, where it stays after the job.

    ray job submit --address http://head:8265 --submission-id serve-resnet101 --working-dir . \
        -- python jobs/serve.py --model s3://bucket/runs/resnet101/best --host 0.0.0.0 \
        --serve.storage s3://bucket/served --serve.keys-file /etc/motor-ray/keys

Submitted with another model, under another id, the endpoint changes over to it.
"""

import sys

from motor_ray.cli import main

if __name__ == "__main__":
    raise SystemExit(main(["serve", *sys.argv[1:]]))
