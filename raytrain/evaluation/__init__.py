"""Accuracy of a trained network: validation, test-set attacks, confidence intervals and checks."""
