"""The worker: the process that answers a device's block requests from a COW over a base.

It holds no state but caches, so it may be killed at any instant and another one started in its place.
"""
