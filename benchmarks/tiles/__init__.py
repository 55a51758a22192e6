"""The tile tuner: kernels/tiles/<arch>.json, measured."""
