"""The network, its sampling, its counting of experts and its file format: what training and serving share.

Nothing is imported here, so that reading a configuration or checking a checkpoint does not cost an ``import torch``.
"""
