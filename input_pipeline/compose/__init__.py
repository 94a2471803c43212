"""Data sets that can only be solved by listening, drawn and mixed."""
