"""`idempotent` and `python -m idempotent`: what an operator can see and do. One file per command."""
