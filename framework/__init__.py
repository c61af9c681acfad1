"""Residual networks, transfer learning and unsupervised domain adaptation on image folders, on PyTorch Lightning."""

__version__ = "0.1.0"
