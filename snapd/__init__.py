"""snapd updates running systems: a COW file, a served snapshot, a merge that can be undone until confirmed.

The rooms of this package import downward only; `docs/architecture.md` has the picture and a test holds it.
"""

__version__ = "0.1.0"
