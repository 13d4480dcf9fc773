"""What a run leaves behind when the disk, the user or the power stops it at any moment."""
