"""Generated stubs of the API; `protos/` is the source, `protos/generate.py` makes them."""
