"""fasttrain's own kernels: each folder holds a public function, its plain reference and its GPU version."""

from fasttrain_kernels import caches

caches.settle()
