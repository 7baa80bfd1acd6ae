"""fasttrain: distributed pretraining and robust fine-tuning of vision encoders on DeepSpeed and DALI."""

__version__ = "0.1.0"
