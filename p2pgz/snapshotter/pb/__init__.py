"""Generated from snapshots.proto by `.ci/snapshots-pb`."""
