"""Places: files and folders on a disk or in an object store, and the local copies of what a store holds."""
