"""Calibration and failure prediction: metrics, calibrators, records, statistics, report.

This package needs numpy, scipy, scikit-learn, matplotlib, jinja2 and pyarrow. It imports torch only
to read a file of PyTorch.
"""
