"""Published experiments and the small ones that run anywhere; each is a delta on base.py."""
