"""Bytes on disk: headers, lazy reads, planned writes and atomic commits. Knows no method."""
