"""Runs of whole experiments, and their reports."""
