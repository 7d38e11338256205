"""Scores of label maps against references: metrics, cases, their record and its table."""
