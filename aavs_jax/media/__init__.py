"""Videos in and out, and what is drawn over frames."""
