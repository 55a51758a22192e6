"""A GPU that is made up, for every Python process that has this folder on PYTHONPATH: see fake_gpu.py."""

import fake_gpu

fake_gpu.install()
