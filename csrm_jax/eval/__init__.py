"""Evaluation: suites, judges, calibration, the report and its plots."""
