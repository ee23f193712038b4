"""Checkers of part 4: adapting without labels."""

from __future__ import annotations

# ---------------------------------------------------------------- 4.1 Entropy as a teacher


# ---------------------------------------------------------------- 4.2 A mask to share


# ---------------------------------------------------------------- 4.3 A mixture instead of a merge
