"""fasttrain's own kernels: each folder holds a public function, its plain reference and its GPU version."""

import os

from fasttrain_kernels import caches

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read when torch is imported; see threads.py for why
caches.settle()
