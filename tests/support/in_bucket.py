"""Trains with a workdir in a bucket as `train` does, but with a short lease, short waits and little patience:

python tests/support/in_bucket.py FLAGS OF TRAIN
"""

import pytest
from bucket import hurry

from llada_jax import train
from llada_jax.cli import entry_point
from llada_jax.storage import lease, objects, retries
from llada_jax.training import home

lease.SECONDS, lease.RENEWAL_SECONDS = 4.0, 1.0
retries.POLICY = retries.Policy(first_wait=0.02, longest_wait=0.2)
home.UPLOAD_SECONDS = 0.5
hurry(pytest.MonkeyPatch())
objects._IDLE_SECONDS = 5  # then a request that gets no answer is sent again

if __name__ == "__main__":
    entry_point.run(train.main)
