"""fasttrain: distributed pretraining and robust fine-tuning of vision encoders on DeepSpeed and DALI."""

import fasttrain_kernels  # noqa: F401  (which settles where caches are kept, before anything is compiled)

__version__ = "0.1.0"
