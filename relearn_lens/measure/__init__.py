"""What a model does and how it does it, in numbers: at one moment, or along a training."""
