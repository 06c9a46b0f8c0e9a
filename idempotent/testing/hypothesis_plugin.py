"""What Hypothesis calls when it is imported, by entry point. It costs nothing where storms are not used."""

import sys


def register() -> None:
    """Let `st.from_type(Storm)` give storms; where their module is not imported yet, it does so itself."""
    storms = sys.modules.get("idempotent.testing.storms")
    if storms is not None:
        storms.register()
