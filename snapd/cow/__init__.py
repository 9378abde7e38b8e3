"""The COW file: what a build server ships and a device merges (COW v3; docs/spec/cow-format.md).

`format` is the layout, `reader` the checked parse, `blockmap` the parsed form that processes without numpy map,
`view` the read path, `writer` and `diff` the way in.
"""
