"""The COW file: what a build server ships and a device merges (docs/spec/cow-format.md).

Here: the layout (`format`, `header`, `op`, `cursor`), the codecs (`compress`), and what lies beside a COW (`digests`,
`claim`, `history`). In the folders, each importing only those before it: `image`, the read path; `parse`, from bytes to
checked ops; `write`, the writers; `diff`, from two images to ops; `verbs`, what `snapctl cow` does.
"""
