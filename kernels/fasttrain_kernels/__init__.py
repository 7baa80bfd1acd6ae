"""fasttrain's own kernels: each folder holds a public function, its plain reference and its GPU version."""
