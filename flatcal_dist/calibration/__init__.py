"""Calibration and failure prediction: metrics, calibrators, records, statistics, report.

Needs numpy, scipy, scikit-learn, matplotlib, jinja2 and pyarrow; never torch.
"""
