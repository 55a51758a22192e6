"""The main job: a real DINOv2 on real photos, checked against timm and ONNX Runtime, timed, and drawn."""
